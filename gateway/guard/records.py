"""Records: what the guard writes to the audit log, and when.

One durable record before the engine sees a prompt, one before the terminal event; refusals after identity
one by one, refusals before identity in aggregate per source and second, so that an anonymous flood fills
neither disk nor log. No record holds a prompt, an answer or a credential.
"""

import asyncio
from typing import Any

from gateway import errors
from gateway.audit.client import AuditClient
from gateway.audit.errors import AuditUnavailable
from gateway.domain import JsonObject, Receipt
from gateway.errors import Refusal
from gateway.guard.exchange import Exchange
from gateway.telemetry.metrics import Telemetry

MAX_SOURCES = 256
MAX_TEXT = 256
OTHER_SOURCES = "others"
FLUSH_S = 1.0


class Records:
    """Writes the guard's records through the auditor."""

    def __init__(self, audit: AuditClient, telemetry: Telemetry) -> None:
        self._audit = audit
        self._telemetry = telemetry
        self._loop = asyncio.get_running_loop()
        self._aggregate: dict[tuple[str, str], int] = {}
        self._flush_timer: asyncio.TimerHandle | None = None

    @property
    def available(self) -> bool:
        """Whether a record can become durable now."""
        return self._audit.healthy

    async def begin(self, exchange: Exchange) -> None:
        """Return once the begin record is durable; raises the 503 Refusal otherwise."""
        started = self._loop.time()
        try:
            log_id, index = await self._audit.append("req.begin", _begin_fields(exchange))
        except AuditUnavailable:
            raise errors.audit_unavailable() from None
        exchange.receipt = Receipt(log_id, index)
        self._telemetry.audit_write(self._loop.time() - started)

    def end(self, exchange: Exchange, *, bytes_out: int, first_byte_s: float) -> "asyncio.Future[tuple[str, int]]":
        """Append the end record; the future resolves once it is durable."""
        now = self._loop.time()
        usage = exchange.usage
        fields: JsonObject = {
            "bytes_out": bytes_out,
            "outcome": exchange.outcome,
            "request": exchange.request_id,
            "status": exchange.status,
            "timings": {
                "first_us": int((first_byte_s - exchange.started_s) * 1e6) if first_byte_s else None,
                "total_us": int((now - exchange.started_s) * 1e6),
            },
            "usage": {"cached": usage.cached_tokens, "input": usage.input_tokens, "output": usage.output_tokens},
        }
        return self._audit.append("req.end", fields)

    async def single(self, exchange: Exchange, kind: str, refusal: Refusal | None = None) -> None:
        """One durable record for a request that never reaches an engine; raises the 503 Refusal otherwise."""
        fields = _begin_fields(exchange)
        fields["status"] = refusal.status if refusal else exchange.status
        fields["outcome"] = "refused" if refusal else exchange.outcome
        fields["reason"] = refusal.reason if refusal else ""
        try:
            log_id, index = await self._audit.append(kind, fields)
        except AuditUnavailable:
            raise errors.audit_unavailable() from None
        exchange.receipt = Receipt(log_id, index)

    def refused_before_identity(self, source: str, refusal: Refusal) -> None:
        """Count a refusal; the counts of a second become one record."""
        key = (source, refusal.reason)
        if key not in self._aggregate and len(self._aggregate) >= MAX_SOURCES:
            key = (OTHER_SOURCES, refusal.reason)
        self._aggregate[key] = self._aggregate.get(key, 0) + 1
        if self._flush_timer is None:
            self._flush_timer = self._loop.call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write the aggregate record now, keeping the counts where the auditor cannot take them."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        if not self._aggregate:
            return
        counts, self._aggregate = self._aggregate, {}
        refusals = [{"count": count, "reason": reason, "source": source} for (source, reason), count in counts.items()]
        written = self._audit.append("refused.aggregate", {"refusals": refusals, "window_s": int(FLUSH_S)})
        written.add_done_callback(lambda done: self._keep(counts) if done.exception() else None)

    def _keep(self, counts: dict[tuple[str, str], int]) -> None:
        for key, count in counts.items():
            where = key if key in self._aggregate or len(self._aggregate) < MAX_SOURCES else (OTHER_SOURCES, key[1])
            self._aggregate[where] = self._aggregate.get(where, 0) + count
        if self._flush_timer is None:
            self._flush_timer = self._loop.call_later(FLUSH_S, self.flush)


def _begin_fields(exchange: Exchange) -> JsonObject:
    principal, operation, target, decision = exchange.principal, exchange.operation, exchange.target, exchange.decision
    return {
        "content": {"bytes": exchange.body_bytes, "mode": "none"},
        "label": principal.label if principal else "",
        "method": exchange.method,
        "model": {"digest": target.digest if target else "", "requested": exchange.model[:MAX_TEXT]},
        "operation": operation.name if operation else "",
        "parameters": _parameters(exchange.document, exchange.stream),
        "policy": {
            "decision": "permit" if decision.permitted else "deny",
            "obligations": list(decision.obligations),
            "reasons": list(decision.reasons),
        },
        "principal": {"id": principal.id, "name": principal.name, "type": principal.kind} if principal else None,
        "request": exchange.request_id,
        "source": exchange.source,
        "tenant": principal.tenant if principal else "",
    }


def _parameters(document: JsonObject, stream: bool) -> JsonObject:
    ceiling: Any = (
        document.get("max_tokens") or document.get("max_completion_tokens") or document.get("max_output_tokens")
    )
    temperature: Any = document.get("temperature")
    return {
        "max_tokens": ceiling if type(ceiling) is int else None,
        "stream": stream,
        "temperature": repr(temperature) if type(temperature) in (int, float) else None,
        "tools": bool(document.get("tools")),
    }
