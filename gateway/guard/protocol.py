"""Front, first half: uvicorn's httptools protocol with bounds, deadlines, shaped errors and a direct relay.

Plain uvicorn waits for ever for a request and takes any number of headers. This subclass bounds header
count and bytes, sets one absolute deadline for receiving a request (slow headers and bodies included),
answers unparsable input in the API's error shape and reports it, and lets a relay write chunks straight
to the transport. Sources: RFC 9112 sections 3, 5 and 6; uvicorn's HttpToolsProtocol.
"""

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from gateway import errors
from gateway.errors import Refusal
from gateway.guard.routes import dialect_of

SWEEP_S = 0.5
MAX_READ_BYTES = 256 << 10  # what the loop reads at once
RESPONDER = "cloister.responder"
NOT_HTTP = "The request is not valid HTTP/1.1."
_VERSIONS = frozenset({"1.0", "1.1"})


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much of a request is read and how long that may take."""

    header_count: int
    header_bytes: int
    body_bytes: int
    deadline_s: float
    idle_s: float
    connections: int


class ConnectionOwner(Protocol):
    """What is told about the client of a running request."""

    def client_gone(self) -> None:
        """The connection is lost; nothing more can be delivered."""

    def client_paused(self, paused: bool) -> None:
        """The client reads slower than it is written to, or reads again."""


class Front:
    """What all connections of a worker share: bounds, who is still sending a request, who hears of refusals."""

    def __init__(
        self,
        config: Config,
        bounds: Bounds,
        new_request_id: Callable[[], str],
        refused: Callable[[str, Refusal, str], None],
    ) -> None:
        self.config, self.bounds = config, bounds
        self.new_request_id, self.refused = new_request_id, refused
        self.state = ServerState()
        self.receiving: dict[GuardProtocol, float] = {}  # both in the order of their deadlines
        self.idle: dict[GuardProtocol, float] = {}
        self._loop = asyncio.get_running_loop()
        self._sweeping = False

    def connect(self) -> "GuardProtocol":
        """Protocol factory for `loop.create_server`."""
        return GuardProtocol(self, self._loop)

    def watch(self, protocol: "GuardProtocol") -> None:
        """Start the deadline for receiving a request, unless it runs already."""
        if protocol not in self.receiving:
            self.receiving[protocol] = self._loop.time() + self.bounds.deadline_s
            self._keep_sweeping()

    def rest(self, protocol: "GuardProtocol") -> None:
        """The connection waits for a next request, for a while."""
        self.idle[protocol] = self._loop.time() + self.bounds.idle_s
        if not self._sweeping:
            self._keep_sweeping()

    def _keep_sweeping(self) -> None:
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        now = self._loop.time()
        for protocol in _due(self.receiving, now):
            protocol.expire()
        for protocol in _due(self.idle, now):
            protocol.transport.close()
        self._sweeping = False
        if self.receiving or self.idle:
            self._keep_sweeping()


def _due(deadlines: "dict[GuardProtocol, float]", now: float) -> "list[GuardProtocol]":
    due = []
    for protocol, deadline in deadlines.items():
        if deadline > now:
            break
        due.append(protocol)
    for protocol in due:
        del deadlines[protocol]
    return due


def _nothing() -> None:
    pass


class Cycle(RequestResponseCycle):
    """One request and its response, writable without an ASGI message per chunk."""

    owner: ConnectionOwner | None = None
    task: asyncio.Task[None] | None = None

    async def serve(self, app: Any, tasks: set[asyncio.Task[None]]) -> None:
        """Run the application, which answers every exception itself; an answer it left open ends visibly broken."""
        try:
            await app(self.scope, self.receive, self.send)
        finally:
            tasks.discard(cast("asyncio.Task[None]", self.task))
            self.task = None
            if not self.response_complete and not self.disconnected:
                self.transport.close()
            self.on_response = _nothing

    @property
    def started(self) -> bool:
        """Whether any byte of the response was handed to the transport."""
        return self.response_started

    def begin(self, status: int, headers: bytes, *, chunked: bool, payload: bytes = b"") -> None:
        """Write the head and a first payload in one go; `headers` are complete lines ending in CRLF."""
        self.response_started = True
        self.waiting_for_100_continue = False
        self.chunked_encoding = chunked
        self.expected_content_length = 0
        parts = [STATUS_LINE[status]]
        for name, value in self.default_headers:
            parts += (name, b": ", value, b"\r\n")
        parts.append(headers)
        if not self.keep_alive:
            parts.append(b"connection: close\r\n")
        parts.append(b"transfer-encoding: chunked\r\n\r\n" if chunked else b"\r\n")
        if payload and self.scope["method"] != "HEAD":
            parts.append(b"%x\r\n%b\r\n" % (len(payload), payload) if chunked else payload)
        self.transport.write(b"".join(parts))

    def write(self, payload: bytes) -> None:
        """Pass on one piece of the body at once."""
        if not self.disconnected:
            self.transport.write(b"%x\r\n%b\r\n" % (len(payload), payload) if self.chunked_encoding else payload)

    def finish(self, payload: bytes = b"") -> None:
        """Write the last piece and end the response cleanly."""
        if self.disconnected or self.response_complete:
            return
        if self.chunked_encoding:
            self.transport.write((b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b"") + b"0\r\n\r\n")
        elif payload:
            self.transport.write(payload)
        self._complete()

    def end(self) -> None:
        """Mark the response complete after `begin` carried all of it."""
        if not self.disconnected and not self.response_complete:
            self._complete()

    def abort(self, payload: bytes = b"") -> None:
        """End the response visibly broken: a last payload, then the connection closes without a clean end."""
        if not self.disconnected and not self.response_complete:
            if payload:
                self.write(payload)
            self.keep_alive = False
            self._complete()

    def _complete(self) -> None:
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


class GuardProtocol(HttpToolsProtocol):
    """One client connection, bounded in everything it may send."""

    def __init__(self, front: Front, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(front.config, front.state, {}, loop)
        self.front = front
        self.access_log = False
        self.header_bytes = self.read_bytes = self.body_bytes = 0
        self.message_open = self.in_body = False
        self.refusal: Refusal | None = None
        self.running: Cycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.front.bounds.connections:
            self._refuse(
                errors.unavailable("too_many_connections", "This gateway has no connection left. Try again shortly.")
            )
            return
        self.front.watch(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.front.receiving.pop(self, None)
        self.front.idle.pop(self, None)
        self.pipeline.clear()
        super().connection_lost(exc)
        running = self.running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
            if running.owner is not None:
                running.owner.client_gone()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        idle = self.front.idle
        if idle:
            idle.pop(self, None)
        self.read_bytes = len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._read_no_further(cast("Cycle", self.cycle))  # answered as plain HTTP/1.1 (RFC 9110 section 7.8)
            return
        except httptools.HttpParserError:
            self._refuse(self.refusal or errors.bad_request("malformed_http", NOT_HTTP, close=True))
            return
        if self.message_open:
            if not self.in_body:
                self.header_bytes += self.read_bytes
                if self._headers_too_large():
                    self._refuse(errors.headers_too_large())
                    return
            if not self.pipeline:
                self.front.watch(self)
        elif self.front.receiving:
            self.front.receiving.pop(self, None)

    def expire(self) -> None:
        """The deadline for receiving a request has passed."""
        if self.header_bytes or self.message_open:
            self._refuse(errors.too_slow())
        else:
            self.transport.close()

    def _refuse(self, refusal: Refusal) -> None:
        """Answer in the API's shape if nothing was answered yet, then close: the input cannot be framed."""
        request_id = self.front.new_request_id()
        self.front.receiving.pop(self, None)
        self.front.refused(self.client[0] if self.client else "", refusal, request_id)
        running = self.running
        if running is not None and not running.response_complete:
            if running.response_started or not running.more_body:
                self._read_no_further(running)  # a good request is being answered: only what follows it is refused
                return
            running.disconnected = True
            running.message_event.set()
        elif running is not None and self.message_open and running is self.cycle:
            self.transport.close()  # this request has its answer; a second one would be taken for the next
            return
        body = errors.body(refusal, dialect_of(getattr(self, "url", b"").partition(b"?")[0]), request_id)
        head = [STATUS_LINE[refusal.status]]
        for name, value in self.server_state.default_headers:
            head += (name, b": ", value, b"\r\n")
        for key, text in refusal.headers.items():
            head.append(f"{key}: {text}\r\n".encode())
        head.append(
            b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\nconnection: close\r\n\r\n"
            % (len(body), request_id.encode())
        )
        self.transport.write(b"".join(head) + body)
        self.transport.close()

    def _read_no_further(self, running: "Cycle") -> None:
        self.front.receiving.pop(self, None)
        self.flow.pause_reading()
        self.pipeline.clear()
        running.keep_alive = False

    def _stop(self, refusal: Refusal) -> None:
        self.refusal = refusal
        raise ValueError(refusal.reason)

    def on_message_begin(self) -> None:
        self.header_bytes = self.body_bytes = 0
        self.message_open, self.in_body = True, False
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_headers_complete(self) -> None:
        self.in_body = True
        self.header_bytes += self.read_bytes
        if len(self.headers) > self.front.bounds.header_count or self._headers_too_large():
            self._stop(errors.headers_too_large())
        self._open_cycle()

    def _headers_too_large(self) -> bool:
        """By what is parsed; what one read may add to that and a header still open are allowed for."""
        bound = self.front.bounds.header_bytes
        if self.header_bytes <= bound:
            return False
        parsed = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        return parsed > bound or self.header_bytes > bound + MAX_READ_BYTES

    def _open_cycle(self) -> None:
        parser = self.parser
        scope: dict[str, Any] = cast("dict[str, Any]", self.scope)
        scope["method"] = parser.get_method().decode("ascii")
        version = parser.get_http_version()
        if version not in _VERSIONS:
            self._stop(errors.bad_request("malformed_http", NOT_HTTP, close=True))
        scope["http_version"] = version
        raw_path, _, query = self.url.partition(b"?")
        if not raw_path.startswith(b"/"):
            raw_path = httptools.parse_url(self.url).path or b"/"
        scope["raw_path"] = raw_path
        scope["path"] = raw_path.decode("latin-1")
        scope["query_string"] = query
        existing = self.cycle
        cycle = Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        scope["extensions"] = {RESPONDER: cycle}
        self.cycle = cycle
        if existing is None or existing.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self.running = running = cast("Cycle", cycle)
        running.task = task = self.loop.create_task(running.serve(app, self.tasks), context=contextvars.Context())
        self.tasks.add(task)

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        if self.body_bytes > self.front.bounds.body_bytes:
            self._stop(errors.too_large(self.front.bounds.body_bytes))
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.body += body
            if len(cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            cycle.message_event.set()

    def on_message_complete(self) -> None:
        self.message_open = False
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self.front.rest(self)

    def pause_writing(self) -> None:
        self.flow.pause_writing()
        self._tell_paused(True)

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        self._tell_paused(False)

    def _tell_paused(self, paused: bool) -> None:
        running = self.running
        if running is not None and running.owner is not None:
            running.owner.client_paused(paused)
