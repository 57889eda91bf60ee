"""The dashboard of jobs: do they get on, does training disturb answers, are new versions good."""

from __future__ import annotations

from tools.monitoring.grafana import Dashboard, Panel, Query, Section, quantiles
from tools.monitoring.objectives import INTER_TOKEN_SECONDS
from tools.monitoring.rule import SERVICE, TENANTS, TRAINING
from tools.monitoring.service_dashboard import INTER_TOKEN, JOB, JOBS, RATE, USERS, rate


def in_an_hour(metric: str, by: str) -> Query:
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return Query(f"sum by ({by}) (increase({metric}{{{JOB}}}[1h]))", legend)


_JOBS = Section(
    "Do jobs get on?",
    [
        Panel(
            "Unfinished jobs",
            "Queued ones wait for a worker, paused ones for their tenant.",
            "short",
            [Query(f"sum by (state) (rootstock_jobs_unfinished{{{JOB}}})", "{{state}}")],
            stacked=True,
        ),
        Panel(
            "Silence",
            "Since the latest event of the job that has shown nothing for longest, by state.",
            "s",
            [Query(f"max by (state) (rootstock_job_silence_seconds_max{{{JOB}}})", "{{state}}")],
        ),
        Panel(
            "Oldest heartbeat",
            "Of a running job. Above the lease, another worker may take it.",
            "s",
            [Query(f"max(rootstock_lease_age_seconds_max{{{JOB}}})", "heartbeat")],
            bad_from=120,
        ),
        Panel(
            "Jobs entering a state, in an hour",
            "failed beside succeeded: the job's events say why.",
            "short",
            [in_an_hour("rootstock_jobs_total", "state")],
            stacked=True,
        ),
        Panel(
            "How long a run takes",
            "Median and 95th percentile, by how it ended.",
            "s",
            [
                Query(
                    f"histogram_quantile({quantile}, sum by (le, outcome)"
                    f" (rate(rootstock_training_job_seconds_bucket{{{JOB}}}[1h])))",
                    f"{{{{outcome}}}} p{quantile * 100:.0f}",
                )
                for quantile in (0.5, 0.95)
            ],
        ),
        Panel(
            "Writes of workers that had lost their job",
            "Refused, so harmless; many of them mean slow heartbeats: look at the database.",
            "cps",
            [Query(rate("rootstock_job_fenced_writes_total"), "refused")],
        ),
    ],
)

_BESIDE = Section(
    "Training beside answers",
    [
        Panel(
            "Tokens learned from",
            "Per second, over all jobs.",
            "short",
            [Query(rate("rootstock_tokens_total", f'{JOB}, type="training"'), "training")],
        ),
        Panel(
            "Share of the time that training may run",
            "While answers are written. 0.1 is the floor: the latency target cannot be met.",
            "percentunit",
            [Query(f"min(rootstock_training_pace_ratio{{{JOB}}})", "may run")],
        ),
        Panel(
            "Held back",
            "Share of the time for which training waited for answers, summed over jobs.",
            "percentunit",
            [Query(rate("rootstock_training_held_seconds_total"), "held back")],
        ),
        Panel(
            "Decode steps beside training",
            "99th percentile of the latest steps; what --itl-target-ms steers.",
            "s",
            [Query(f"max(rootstock_decode_step_p99_seconds{{{JOB}}})", "p99")],
            width=12,
        ),
        Panel(
            "What users see: between tokens",
            "Dots are single requests.",
            "s",
            quantiles(INTER_TOKEN, USERS),
            width=12,
            bad_from=float(INTER_TOKEN_SECONDS),
        ),
    ],
)

_VERSIONS = Section(
    "New versions",
    [
        Panel(
            "Retraining proposed",
            "Because of drift or of falling quality, and what became of it; in an hour.",
            "short",
            [in_an_hour("rootstock_retraining_proposals_total", "trigger, outcome")],
        ),
        Panel(
            "Canaries that ended by themselves",
            "rolled_back: the new version was worse.",
            "short",
            [in_an_hour("rootstock_canary_ends_total", "outcome, reason")],
        ),
        Panel(
            "Requests of aliases with a canary",
            "By the side that answered.",
            "reqps",
            [Query(rate("rootstock_canary_requests_total", by="arm, outcome"), "{{arm}} {{outcome}}")],
        ),
        Panel(
            "Copies for shadows",
            "By what became of them.",
            "reqps",
            [Query(rate("rootstock_shadow_requests_total", by="outcome"), "{{outcome}}")],
        ),
        Panel(
            "Feedback",
            "By rating.",
            "cps",
            [Query(rate("rootstock_feedback_total", by="rating"), "{{rating}}")],
        ),
        Panel(
            "Answers feedback cannot refer to",
            "Their records were dropped: the database was too slow.",
            "cps",
            [Query(f"sum(rate(rootstock_completion_records_dropped_total{{{JOB}}}{RATE}))", "dropped")],
        ),
    ],
)

TRAINING_DASHBOARD = Dashboard(
    uid=TRAINING,
    title="Rootstock: training",
    description="Do jobs get on, does training disturb answers, are new versions good.",
    variables=[JOBS],
    sections=[_JOBS, _BESIDE, _VERSIONS],
    others={SERVICE: "Service", TENANTS: "Tenants and drift"},
)
