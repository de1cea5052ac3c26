"""Engine: sends the request, passes the answer on as it comes, and holds its end for the end record.

Runs in the read callbacks of the engine connection: no task switch per chunk. Every exit settles once: a
complete answer, an engine that dies or stays silent, a client that leaves, an audit log that fails. After
the response has started nothing tries to send a second one.
"""

import asyncio
import re
from typing import Any

from gateway import errors
from gateway.audit.errors import AuditUnavailable
from gateway.domain import Usage
from gateway.engine.client import EngineAnswerError, EngineConnection, EngineUnreachable
from gateway.errors import Refusal
from gateway.guard.exchange import Exchange
from gateway.guard.records import Records
from gateway.guard.stream import StreamGate, StreamTooLarge, usage_of
from gateway.telemetry.metrics import CHUNK_SECONDS, Tally, Telemetry

MAX_USAGE_BYTES = 8 << 20
_HEADER_VALUE = re.compile(rb"[\x20-\x7e]{1,256}")
_EVENT_STREAM = b"text/event-stream"


class Relay:
    """One answer on its way from the engine to the client."""

    __slots__ = (
        "_bytes_out",
        "_chunked",
        "_connection",
        "_exchange",
        "_failure",
        "_finished",
        "_first_s",
        "_gaps",
        "_gate",
        "_head",
        "_held",
        "_kept",
        "_last_s",
        "_loop",
        "_records",
        "_responder",
        "_settled",
        "_status",
        "_telemetry",
    )

    def __init__(
        self, exchange: Exchange, records: Records, telemetry: Telemetry, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._exchange, self._records, self._telemetry, self._loop = exchange, records, telemetry, loop
        self._responder = exchange.responder
        self._connection: EngineConnection | None = None
        self._finished: asyncio.Future[None] = loop.create_future()
        self._gate: StreamGate | None = None
        self._head = b""
        self._chunked = True
        self._held = b""
        self._kept: list[bytes] = []
        self._bytes_out = 0
        self._first_s = self._last_s = 0.0
        self._gaps: Tally | None = None
        self._status = 0
        self._settled = False
        self._failure: Refusal | None = None

    async def run(self) -> Refusal | None:
        """Relay one exchange to its end; returns the Refusal to answer with when nothing was sent yet."""
        exchange = self._exchange
        target = exchange.target
        pool = target.choose() if target else None
        self._responder.owner = self
        try:
            if pool is None:
                raise EngineUnreachable("no replica is ready")
            connection = await pool.acquire()
        except EngineUnreachable:
            exchange.outcome = "engine_unreachable"
            return await self._refuse(errors.engine_loading())
        if self._responder.disconnected:
            pool.release(connection, reusable=True)
            exchange.outcome = "disconnected"
            return await self._refuse(errors.our_bug())
        address, operation = pool.address, exchange.operation
        path = operation.engine_path if operation else b"/"
        self._telemetry.request_started(stream=exchange.stream)
        self._connection = connection
        connection.start(address.head(path, exchange.request_id, len(exchange.payload)) + exchange.payload, self)
        exchange.payload = b""
        exchange.document = {}
        try:
            await self._finished
        finally:
            self._leave()
        return self._failure

    def connection_replaced(self, connection: EngineConnection) -> None:
        """The request was sent again over another connection."""
        self._connection = connection
        if self._settled:
            connection.abort()

    def answer_started(self, status: int, headers: dict[bytes, bytes]) -> None:
        """See AnswerSink."""
        exchange = self._exchange
        if status in (401, 403) or 300 <= status < 400 or status > 599:
            message = (
                "The engine refused the gateway's own credential."
                if status in (401, 403)
                else "The engine's answer is unusable."
            )
            self._break(errors.engine_failed("engine_misconfigured", message), "engine_failed")
            return
        content_type = headers.get(b"content-type", b"application/json")
        if not _HEADER_VALUE.fullmatch(content_type):
            content_type = b"application/octet-stream"
        exchange.status = self._status = status
        streamed = content_type.startswith(_EVENT_STREAM)
        if streamed:
            self._gate = StreamGate(exchange.dialect, strip_usage=exchange.strip_usage)
            self._gaps = Tally(CHUNK_SECONDS)
        length = b"" if streamed else headers.get(b"content-length", b"")
        self._chunked = not length.isdigit()
        digest = exchange.target.digest if exchange.target else ""
        self._head = b"content-type: %b\r\nx-request-id: %b\r\nx-audit-receipt: %b\r\n%b%b" % (
            content_type,
            exchange.request_id.encode(),
            str(exchange.receipt).encode(),
            b"x-model-digest: " + digest.encode() + b"\r\n" if digest else b"",
            b"" if self._chunked else b"content-length: " + length + b"\r\n",
        )

    def answer_data(self, pieces: list[bytes]) -> None:
        """See AnswerSink."""
        if self._settled:
            return
        now = self._loop.time()
        if not self._first_s:
            self._first_s = now
        elif self._gaps is not None:
            self._gaps.add(now - self._last_s)
        self._last_s = now
        gate = self._gate
        if gate is None:
            self._whole(pieces)
            return
        try:
            for piece in pieces:
                out = gate.feed(piece)
                if out:
                    self._send(out)
        except StreamTooLarge:
            self._break(errors.engine_failed(), "engine_failed")

    def answer_ended(self) -> None:
        """See AnswerSink."""
        self._connection = None
        if self._settled:
            return
        gate, exchange = self._gate, self._exchange
        if gate is not None:
            self._held = gate.held
            exchange.usage = gate.usage
            if not gate.ended:
                self._break(
                    errors.engine_failed("engine_incomplete", "The engine ended the stream early."), "engine_failed"
                )
                return
            exchange.outcome = "engine_error" if gate.failed else "ok"
        else:
            if self._kept:
                exchange.usage = usage_of(b"".join(self._kept))
                self._kept = []
            exchange.outcome = "ok" if self._status < 400 else "engine_refused"
        self._settle(self._deliver)

    def answer_failed(self, error: EngineAnswerError) -> None:
        """See AnswerSink."""
        self._connection = None
        if error.timed_out:
            self._break(errors.engine_timed_out(), "engine_timeout")
        else:
            self._break(errors.engine_failed(), "engine_failed")

    def client_gone(self) -> None:
        """The client has left: the engine stops generating at once."""
        if not self._settled:
            self._drop_connection()
            if self._gate is not None:
                self._exchange.usage = self._gate.usage
            self._exchange.outcome = "disconnected"
            self._settle(lambda _: self._done())

    def client_paused(self, paused: bool) -> None:
        """The client reads slower than the engine writes."""
        if self._connection is not None:
            self._connection.pause(paused)

    def _whole(self, pieces: list[bytes]) -> None:
        """Forward all but the last piece of a whole answer."""
        if self._bytes_out <= MAX_USAGE_BYTES:
            self._kept += pieces
        else:
            self._kept = []
        for piece in pieces:
            if self._held:
                self._send(self._held)
            self._held = piece

    def _send(self, data: bytes) -> None:
        self._bytes_out += len(data)
        if self._head:
            self._responder.begin(self._status, self._head, chunked=self._chunked, payload=data)
            self._head = b""
        else:
            self._responder.write(data)

    def _deliver(self, recorded: bool) -> None:
        """The end record is durable: let the terminal event go."""
        responder = self._responder
        if not recorded:
            self._fail(errors.audit_unavailable())
        elif self._head:
            responder.begin(self._status, self._head, chunked=self._chunked, payload=self._held)
            self._head = b""
            responder.finish() if self._chunked else responder.end()
        else:
            responder.finish(self._held)
        self._done()

    def _break(self, refusal: Refusal, outcome: str) -> None:
        """The answer cannot be completed: record it, then say so in the API's own form."""
        if self._settled:
            return
        self._drop_connection()
        self._exchange.outcome = outcome
        self._telemetry.refused("engine", refusal.reason)
        if not self._responder.started:
            self._exchange.status = refusal.status

        def conclude(recorded: bool) -> None:
            self._fail(refusal if recorded else errors.audit_unavailable())
            self._done()

        self._settle(conclude)

    def _fail(self, refusal: Refusal) -> None:
        if not self._responder.started:
            self._failure = refusal
            return
        streamed = self._gate is not None
        event = errors.stream_event(refusal, self._exchange.dialect, self._exchange.request_id) if streamed else b""
        self._responder.abort(event)

    async def _refuse(self, refusal: Refusal) -> Refusal:
        """Record an exchange that never reached the engine."""
        self._settled = True
        self._exchange.status = refusal.status
        self._telemetry.refused("engine", refusal.reason)
        try:
            await self._records.end(self._exchange, bytes_out=0, first_byte_s=0.0)
        except AuditUnavailable:
            return errors.audit_unavailable()
        return refusal

    def _settle(self, then: Any) -> None:
        """Append the end record exactly once; `then(recorded)` follows when it is durable or cannot be."""
        self._settled = True
        appended_s = self._loop.time()
        recorded = self._records.end(
            self._exchange, bytes_out=self._bytes_out + len(self._held), first_byte_s=self._first_s
        )

        def resolved(future: "asyncio.Future[tuple[str, int]]") -> None:
            failed = future.cancelled() or future.exception() is not None
            if not failed:
                self._telemetry.audit_write(self._loop.time() - appended_s)
            then(not failed)

        recorded.add_done_callback(resolved)

    def _done(self) -> None:
        if not self._finished.done():
            self._finished.set_result(None)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()

    def _leave(self) -> None:
        """Every exit passes here: nothing stays running at the engine, the metrics add up."""
        exchange = self._exchange
        self._drop_connection()
        self._responder.owner = None
        usage: Usage = exchange.usage
        principal, operation = exchange.principal, exchange.operation
        self._telemetry.request_ended(
            (operation.name if operation else "", exchange.model, principal.tenant if principal else ""),
            exchange.outcome or "cancelled",
            stream=exchange.stream,
            first_byte_s=self._first_s - exchange.started_s if self._first_s else None,
            total_s=self._loop.time() - exchange.started_s,
            tokens=(usage.input_tokens or 0, usage.output_tokens or 0),
            gaps=self._gaps,
        )
