"""Tokens per second through HTTP streaming against the engine alone, and how responsive HTTP stays meanwhile.

The service is a process of its own, started by its own command; so are the clients. The engine alone runs in this
process while they are idle. All three share the machine, so what clients and sockets cost is in the ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from statistics import median
from typing import Any

from bench.goals import goal
from bench.measurement import Entry, interleave, quantity, ratio
from bench.plan import Plan
from bench.probe import QUANTITIES, probe
from bench.processes import chat_body, converse, running_clients, running_service
from bench.serving import Row, serving
from bench.subject import Subject

_WORDS = ("graft", "scion", "stock", "bud", "bark", "root", "sap", "leaf", "twig", "branch", "fruit", "seed", "vine")


def measure(subject: Subject, plan: Plan, tick: Callable[[str], None]) -> list[Entry]:
    """All rows at once on the base, the same chat prompts on both sides; from the first byte sent to the last."""
    questions = [_question(index) for index in range(plan.num_rows)]
    rows = [Row(tuple(subject.base.render_chat([{"role": "user", "content": text}]))) for text in questions]
    with ExitStack() as stack:
        rig = stack.enter_context(serving(subject.base, {}, max_num_seqs=plan.num_rows))
        service = stack.enter_context(running_service(subject, plan))
        clients = stack.enter_context(running_clients())

        def http(num_tokens: int) -> dict[str, Any]:
            return converse(clients, service, [chat_body("bench", text, num_tokens) for text in questions])

        def through_http() -> Mapping[str, float]:
            answer = http(plan.streaming_tokens)
            return {
                "end to end": answer["tokens"] / answer["seconds"],
                "first token": median(answer["first_text_seconds"]) * 1e3,
            }

        def engine_alone() -> Mapping[str, float]:
            timeline = rig.run(rows, plan.streaming_tokens)
            first = median(times[0] - timeline.submitted_at for times in timeline.token_times)
            return {"end to end": timeline.tokens_per_second, "first token": first * 1e3}

        rig.run(rows, 4)
        http(4)
        variants = {"engine alone": engine_alone, "HTTP streaming": through_http}
        samples = interleave(variants, plan.streaming_rounds, tick)

        def probing(load: Callable[[], Any]) -> Callable[[], Mapping[str, float]]:
            return lambda: probe(service.url, service.ops_url, service.key, load)

        loads = {
            "service idle": probing(lambda: time.sleep(plan.probe_idle_seconds)),
            "engine saturated": probing(lambda: http(plan.streaming_tokens)),
        }
        probes = interleave(loads, plan.probe_rounds, tick)  # in rounds of their own: they would slow the answers
    of = ("HTTP streaming.end to end", "engine alone.end to end")
    return [
        *(quantity(f"{name}.end to end", samples, "tokens/s") for name in variants),
        *(quantity(f"{name}.first token", samples, "ms") for name in variants),
        ratio("HTTP ÷ engine", samples, *of, goal("HTTP ÷ engine", cuda=subject.is_cuda)),
        *(quantity(f"{name}.{measured}", probes, "ms") for name in loads for measured in QUANTITIES),
    ]


def _question(index: int) -> str:
    return " ".join(_WORDS[(index + i) % len(_WORDS)] for i in range(3))
