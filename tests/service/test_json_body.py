"""Bodies are read strictly, whichever router takes them."""

from __future__ import annotations

from service.api.json_body import JsonRoute
from service.api.routes import ROUTERS


def test_every_router_reads_its_bodies_strictly() -> None:
    assert [router.tags for router in ROUTERS if router.route_class is not JsonRoute] == []
