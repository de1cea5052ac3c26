"""The gateway as one ASGI application: the stages of the guard in the order that a request passes them.

Every request ends in exactly one answer and its records. A Refusal raised by any stage becomes the answer;
anything else that is raised is a bug of ours: a 500 without details, and one line in the log.
"""

import asyncio
import hashlib
import hmac
import secrets
from typing import Any

from gateway import errors
from gateway.domain import Principal
from gateway.engine.directory import EngineDirectory
from gateway.errors import Refusal
from gateway.guard import body, detect, front, identity, limits, models, policy
from gateway.guard.engine import Relay
from gateway.guard.exchange import Exchange
from gateway.guard.protocol import RESPONDER
from gateway.guard.records import Records
from gateway.guard.routes import dialect_of
from gateway.identity.keyring import KeyRing
from gateway.telemetry.logs import Log
from gateway.telemetry.metrics import Telemetry

SERVED = "req.served"
REFUSED = "req.refused"


class Gateway:
    """The data plane of one gateway worker."""

    def __init__(
        self,
        *,
        ring: KeyRing,
        directory: EngineDirectory,
        records: Records,
        telemetry: Telemetry,
        log: Log,
        salt_key: bytes,
        max_body_bytes: int,
    ) -> None:
        self._ring, self._directory, self._records = ring, directory, records
        self._telemetry, self._log = telemetry, log
        self._salt_key, self._max_body_bytes = salt_key, max_body_bytes
        self._salts: dict[tuple[str, str], str] = {}
        self._loop = asyncio.get_running_loop()
        self._run_id, self._count = secrets.token_hex(6), 0
        self.draining = False

    def new_request_id(self) -> str:
        """A request id that no other request of any worker has."""
        self._count += 1
        return f"req-{self._run_id}{self._count:010x}"

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Serve one request. Source: ASGI 3.0; answers go straight to the protocol's responder."""
        exchange = Exchange(scope, scope["extensions"][RESPONDER], self.new_request_id(), self._loop.time())
        try:
            refusal = await self._serve(exchange, receive)
        except Refusal as raised:
            refusal = await self._refuse(exchange, raised)
        except Exception as error:  # noqa: BLE001  the boundary: no traceback reaches a caller, none holds a prompt
            self._log.line("error", "bug", request=exchange.request_id, error=type(error).__name__, where=_where(error))
            refusal = await self._refuse(exchange, errors.our_bug())
        if refusal is not None:
            self._answer(exchange, refusal)

    async def _serve(self, exchange: Exchange, receive: Any) -> Refusal | None:
        front.admit(exchange)
        if self.draining:
            raise errors.draining()
        await identity.identify(exchange, self._ring)
        if exchange.method == "GET":
            await self._list_models(exchange)
            return None
        raw = await body.read(exchange, receive, self._max_body_bytes)
        if raw is None:
            exchange.outcome = "disconnected"
            await self._records.single(exchange, REFUSED, errors.too_slow())
            return None
        body.understand(exchange, raw)
        self._choose_target(exchange)
        detect.inspect(exchange)
        policy.decide(exchange)
        body.prepare(exchange, self._salt(exchange.principal))
        limits.reserve(exchange)
        try:
            await self._records.begin(exchange)
            return await Relay(exchange, self._records, self._telemetry, self._loop).run()
        finally:
            limits.settle(exchange)

    def _choose_target(self, exchange: Exchange) -> None:
        if not exchange.model and len(names := self._directory.names()) == 1:
            exchange.model = names[0]
        exchange.target = self._directory.get(exchange.model)
        if exchange.target is None:
            raise errors.unknown_model()

    async def _list_models(self, exchange: Exchange) -> None:
        policy_model, exchange.model = exchange.model, ""
        operation, principal = exchange.operation, exchange.principal
        if operation and principal and principal.operations is not None and operation.name not in principal.operations:
            exchange.model = policy_model
            raise errors.forbidden("policy_denied", f"This key may not use {operation.name}.")
        answer = models.answer(exchange, self._directory)
        exchange.status, exchange.outcome = 200, "ok"
        await self._records.single(exchange, SERVED)
        head = _json_head(len(answer), exchange)
        if not exchange.responder.disconnected:
            exchange.responder.begin(200, head, chunked=False, payload=answer)
            exchange.responder.end()
        self._telemetry.request_answered(self._key(exchange), "ok")

    async def _refuse(self, exchange: Exchange, refusal: Refusal) -> Refusal | None:
        """Record a refusal by a stage; returns what to answer, `None` when the client is not there any more."""
        exchange.status = refusal.status
        self._telemetry.refused(_stage(exchange), refusal.detail or refusal.reason)
        if exchange.principal is None:
            if exchange.responder.disconnected:
                return None  # the protocol has refused and counted it already
            self._records.refused_before_identity(exchange.source, refusal)
        elif refusal.reason != "audit_unavailable":
            self._telemetry.request_answered(self._key(exchange), "refused")
            try:
                await self._records.single(exchange, REFUSED, refusal)
            except Refusal as unavailable:
                return unavailable
        return refusal

    def protocol_refused(self, source: str, refusal: Refusal, request_id: str) -> None:
        """The protocol has refused what could not be parsed."""
        self._telemetry.refused("front", refusal.reason)
        self._records.refused_before_identity(source or "unix", refusal)
        self._log.line(
            "warning", "refused", request=request_id, source=source, status=refusal.status, reason=refusal.reason
        )

    def _answer(self, exchange: Exchange, refusal: Refusal) -> None:
        self._log.line(
            "warning",
            "refused",
            request=exchange.request_id,
            source=exchange.source,
            status=refusal.status,
            reason=refusal.detail or refusal.reason,
        )
        responder = exchange.responder
        if responder.disconnected:
            return
        if responder.started:
            responder.abort()
            return
        dialect = exchange.operation.dialect if exchange.operation else dialect_of(exchange.path)
        content = errors.body(refusal, dialect, exchange.request_id)
        extra = "".join(f"{name}: {value}\r\n" for name, value in refusal.headers.items())
        if refusal.close:
            extra += "connection: close\r\n"
        head = _json_head(len(content), exchange) + extra.encode()
        responder.begin(refusal.status, head, chunked=False, payload=content)
        if refusal.close:
            responder.abort()
        else:
            responder.end()

    def _salt(self, principal: Principal | None) -> str:
        """Keeps the engine's prefix cache apart per tenant and label."""
        key = (principal.tenant, principal.label) if principal else ("", "")
        salt = self._salts.get(key)
        if salt is None:
            text = f"{len(key[0])}:{key[0]}:{key[1]}".encode()
            salt = self._salts[key] = hmac.digest(self._salt_key, b"cache-salt:" + text, hashlib.sha256).hex()
        return salt

    def _key(self, exchange: Exchange) -> tuple[str, str, str]:
        known = exchange.model if self._directory.get(exchange.model) is not None else ""
        operation, principal = exchange.operation, exchange.principal
        return (operation.name if operation else "", known, principal.tenant if principal else "")


def _json_head(length: int, exchange: Exchange) -> bytes:
    receipt = f"x-audit-receipt: {exchange.receipt}\r\n" if exchange.receipt is not None else ""
    fixed = f"content-type: application/json\r\ncontent-length: {length}\r\n"
    return f"{fixed}x-request-id: {exchange.request_id}\r\n{receipt}".encode()


def _stage(exchange: Exchange) -> str:
    if exchange.operation is None or exchange.token is not None:
        return "front"
    if exchange.principal is None:
        return "identity"
    return "body" if exchange.target is None else "policy" if exchange.receipt is None else "engine"


def _where(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}" if trace is not None else ""
