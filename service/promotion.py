"""Moves a job's alias to its new version, or leaves it, in the transaction that ends the job. Knows no evaluation."""

from __future__ import annotations

from typing import Any

from sqlalchemy.engine import Connection

from service.aliases import MoveKind, active_model, move_alias
from service.job import EventLevel, GateDecision, Job
from service.job_rows import insert_event


def promote(connection: Connection, job: Job, model: str, decision: GateDecision | None) -> dict[str, Any] | None:
    """Say what the gate decided, act on it, and return how it reads in the report. None decides nothing: no gate, the
    alias moves.

    A verdict holds for the version that the candidate was compared with. When the alias was moved meanwhile, by its
    tenant or by another job, it stays there: nobody knows whether the candidate is better than that.
    """
    alias = job.spec.alias
    if decision is None:
        if alias is not None:
            move_alias(connection, job.tenant_id, alias, model, MoveKind.PUBLISHED)
        return None
    verdict = decision.verdict
    passed, reasons = verdict.passed, list(verdict.reasons)
    if alias is not None and job.spec.gate.enabled:
        active = active_model(connection, job.tenant_id, alias)
        if active != decision.compared_with:
            passed = False
            reasons.append(f"alias '{alias}' was moved to {active} after the comparison")
    moved = passed and alias is not None
    if moved:
        assert alias is not None
        move_alias(connection, job.tenant_id, alias, model, MoveKind.PUBLISHED)
    told = _message(alias, passed, reasons)
    level = EventLevel.INFO if passed or alias is None else EventLevel.WARN
    found = {**verdict.as_dict(), "passed": passed, "reasons": reasons, "alias": alias, "alias_moved": moved}
    found |= {"compared_with": decision.compared_with, "policy": job.spec.gate.as_dict()}
    insert_event(connection, job.id, told, level=level, data=found)
    return found


def _message(alias: str | None, passed: bool, reasons: list[str]) -> str:
    parts = ["Gate passed" if passed else "Gate not passed"]
    if alias is not None:
        parts.append(f"alias '{alias}' moves to the new model" if passed else f"alias '{alias}' stays where it is")
    return ", ".join(parts) + (": " + "; ".join(reasons) if reasons else "")
