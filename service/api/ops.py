"""The ops port, for the cluster only: /metrics, /livez, /readyz. Knows no tenant and asks for no key."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from service.api.errors import install_error_handlers
from service.health import Health
from service.metrics import Metrics


def create_ops_app(metrics: Metrics, health: Health) -> FastAPI:
    app = FastAPI(title="Rootstock operations", docs_url=None, redoc_url=None, openapi_url=None)
    install_error_handlers(app)

    @app.get("/metrics")
    def scrape(request: Request) -> Response:
        content, content_type = metrics.exposition(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})

    @app.get("/livez")
    async def live() -> JSONResponse:
        return _verdict(health.trouble())

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        return _verdict(health.not_ready())

    return app


def _verdict(problem: str | None) -> JSONResponse:
    if problem is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable", "reason": problem}, 503)
