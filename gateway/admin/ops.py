"""The ops port as a FastAPI application: /metrics, /metrics/engines, /livez, /readyz, /admin/v1/status.

Everything it reports is handed in, so it holds no state of its own. Answers name no path, key or prompt.
"""

import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.middleware.base import RequestResponseEndpoint

from gateway.audit.client import AuditClient
from gateway.engine.health import fetch
from gateway.engine.state import READY, EngineState

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{.*\})? (.+)$")
_COMMENT = re.compile(r"^# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) ")
_LOCAL_HOSTS = {"localhost", "127.0.0.1", "[::1]"}
_SECURITY = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True, slots=True)
class OpsSources:
    """What the ops port reports about."""

    metrics_dir: Path
    audit: AuditClient
    engines: Callable[[], list[EngineState]]
    external: Callable[[], Awaitable[dict[str, bool]]]
    workers: Callable[[], tuple[int, int]]
    models_rule: str
    durability: str
    loopback: bool


class StateCollector:
    """Gauges of what the supervisor knows: engines, seals, workers, the audit log."""

    def __init__(self, sources: OpsSources) -> None:
        self._sources = sources

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        engines = self._sources.engines()
        up = GaugeMetricFamily("cloister_engine_up", "Whether a replica serves requests.", labels=["engine", "replica"])
        sealed = GaugeMetricFamily(
            "cloister_engine_sealed", "Whether a replica's seal was checked and holds.", labels=["engine", "replica"]
        )
        for state in engines:
            labels = [state.name, str(state.replica)]
            up.add_metric(labels, float(state.state == READY))
            sealed.add_metric(labels, float(state.seal == "sealed"))
        yield up
        yield sealed
        yield GaugeMetricFamily(
            "cloister_audit_available", "Whether records can become durable.", float(self._sources.audit.healthy)
        )
        running, wanted = self._sources.workers()
        yield GaugeMetricFamily("cloister_workers", "Gateway workers running.", running)
        yield GaugeMetricFamily("cloister_workers_wanted", "Gateway workers configured.", wanted)
        receipted = float(self._sources.models_rule == "receipted")
        yield GaugeMetricFamily(
            "cloister_models_receipted", "Whether only models from verified bundles are served.", receipted
        )
        fsync = float(self._sources.durability == "fsync")
        yield GaugeMetricFamily("cloister_audit_fsync", "Whether audit records survive a power cut.", fsync)


def _protect(sources: OpsSources) -> Callable[[Request, RequestResponseEndpoint], Awaitable[Response]]:
    async def protect(request: Request, call_next: RequestResponseEndpoint) -> Response:
        """Refuse foreign Host names on a loopback listener (DNS rebinding), set security headers."""
        host = re.sub(r":[0-9]+$", "", request.headers.get("host", ""))
        if sources.loopback and host not in _LOCAL_HOSTS:
            return JSONResponse({"error": {"message": "Use the address this port listens on as Host."}}, 421)
        response = await call_next(request)
        response.headers.update(_SECURITY)
        return response

    return protect


def build_ops(sources: OpsSources) -> FastAPI:
    """The ops application."""
    app = FastAPI(title="Cloister ops", docs_url=None, redoc_url=None, openapi_url=None)

    app.middleware("http")(_protect(sources))

    @app.get("/metrics")
    async def metrics() -> Response:
        """Our own metrics, of all workers."""
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(sources.metrics_dir))  # type: ignore[no-untyped-call]
        registry.register(StateCollector(sources))
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/metrics/engines")
    async def engine_metrics() -> Response:
        """The engines' own metrics with engine and replica labels."""
        return Response(await _engine_metrics(sources.engines()), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/livez")
    async def livez() -> JSONResponse:
        """The supervisor lives."""
        return JSONResponse({"ok": True})

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """Whether requests can be served now, and if not, why."""
        reasons = await _reasons(sources)
        return JSONResponse({"ok": not reasons, "reasons": reasons}, 503 if reasons else 200)

    @app.get("/admin/v1/status")
    async def status() -> JSONResponse:
        """Engines, workers and the audit log at a glance."""
        running, wanted = sources.workers()
        engines = [
            {
                "name": e.name,
                "replica": e.replica,
                "state": e.state,
                "seal": e.seal,
                "digest": e.model_digest,
                "detail": e.detail,
            }
            for e in sources.engines()
        ]
        external = await sources.external()
        audit = {"state": sources.audit.state, "log": sources.audit.log_id}
        workers = {"running": running, "wanted": wanted}
        return JSONResponse({"engines": engines, "external": external, "audit": audit, "workers": workers})

    return app


async def _reasons(sources: OpsSources) -> list[str]:
    reasons = []
    if not sources.audit.healthy:
        reasons.append("audit_unavailable")
    if not sources.workers()[0]:
        reasons.append("no_worker")
    ready = [state for state in sources.engines() if state.state == READY]
    if not ready and not any((await sources.external()).values()):
        reasons.append("no_engine_ready")
    return reasons


async def _engine_metrics(engines: list[EngineState]) -> bytes:
    """Merge the engines' expositions: each family's comments once, each sample labelled with where it is from."""
    families: dict[str, list[str]] = {}
    for state in engines:
        if state.state != READY:
            continue
        try:
            status, body = await fetch(f"unix:{state.socket}", "/metrics")
        except (OSError, ValueError, TimeoutError):
            continue
        if status == 200:
            _merge(body.decode(errors="replace"), f'engine="{state.name}",replica="{state.replica}"', families)
    return ("\n".join(line for lines in families.values() for line in lines) + "\n").encode()


def _merge(text: str, labels: str, families: dict[str, list[str]]) -> None:
    family = ""
    for line in text.splitlines():
        comment = _COMMENT.match(line)
        if comment:
            family = comment[2]
            lines = families.setdefault(family, [])
            if line not in lines:
                lines.append(line)
            continue
        sample = _SAMPLE.match(line)
        if sample is None:
            continue
        inner = (sample[2] or "{}")[1:-1].rstrip(",")
        inner = re.sub(r'(^|,)engine="', r'\1engine_index="', inner)
        joined = f"{labels},{inner}" if inner else labels
        families.setdefault(family or sample[1], []).append(f"{sample[1]}{{{joined}}} {sample[3]}")
