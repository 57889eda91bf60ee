"""What a tenant has chosen for itself. Knows no HTTP."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict, dataclass
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import Database, lock_tenant
from service.erasure import Forgotten, forget, forget_old
from service.tables import tenant_settings

DEFAULT_CAPTURE_DAYS = 30
MAX_CAPTURE_DAYS = 365
CONSENT_SECONDS = 5.0
"""How long another process may go on collecting after consent was given or withdrawn here. What it collects without
consent is left out when it is written (`service.captures`)."""


class RetrainingPolicy(StrEnum):
    """What drift or falling quality leads to: nothing, a proposal, or a job at once."""

    OFF = "off"
    PROPOSE = "propose"
    AUTO = "auto"


@dataclass(frozen=True)
class TenantChoices:
    """`capture`: prompts, answers and corrected texts may be stored, for `capture_days`."""

    capture: bool = False
    capture_days: int = DEFAULT_CAPTURE_DAYS
    retraining: RetrainingPolicy = RetrainingPolicy.PROPOSE


class TenantSettings:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._consents: dict[str, tuple[float, bool]] = {}

    def get(self, tenant_id: str) -> TenantChoices:
        with self._database.read() as connection:
            return choices_of(connection, tenant_id)

    def change(
        self,
        tenant_id: str,
        *,
        capture: bool | None = None,
        capture_days: int | None = None,
        retraining: RetrainingPolicy | None = None,
    ) -> TenantChoices:
        """None leaves a choice as it is. Turning capture off also erases what was captured."""
        mine = tenant_settings.c.tenant_id == tenant_id
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            before = choices_of(connection, tenant_id)
            choices = TenantChoices(
                before.capture if capture is None else capture,
                before.capture_days if capture_days is None else capture_days,
                before.retraining if retraining is None else retraining,
            )
            if connection.execute(tenant_settings.update().where(mine).values(asdict(choices))).rowcount == 0:
                connection.execute(tenant_settings.insert().values(tenant_id=tenant_id, **asdict(choices)))
            if not choices.capture:
                forget(connection, tenant_id)
            elif choices.capture_days < before.capture_days:
                forget_old(connection, tenant_id)
        with self._lock:
            self._consents.pop(tenant_id, None)
        return choices

    def forget(self, tenant_id: str, user: str | None) -> Forgotten:
        """Erase what was captured, of all end users or of one."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            return forget(connection, tenant_id, user)

    def captures(self, tenant_id: str) -> bool:
        """Whether the tenant consents, as of a few seconds ago at most. Not on an event loop."""
        now = time.monotonic()
        with self._lock:
            known = self._consents.get(tenant_id)
        if known is not None and now < known[0]:
            return known[1]
        capture = self.get(tenant_id).capture
        with self._lock:
            self._consents[tenant_id] = (now + CONSENT_SECONDS, capture)
        return capture


def choices_of(connection: Connection, tenant_id: str) -> TenantChoices:
    row = connection.execute(sa.select(tenant_settings).where(tenant_settings.c.tenant_id == tenant_id)).one_or_none()
    if row is None:
        return TenantChoices()
    return TenantChoices(row.capture, row.capture_days, RetrainingPolicy(row.retraining))
