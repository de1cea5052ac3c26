"""The streaming client to an engine: pooled HTTP/1.1 connections over a unix socket or TCP, no task per chunk.

An answer is treated as hostile: header count and bytes, status, silence and total size are bounded, and a
breach ends the exchange with `EngineAnswerError`. One connection carries one exchange at a time. Sources:
RFC 9112 sections 2 to 7 and 9.3.1 (reuse and retry of idle connections).
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import httptools

MAX_HEADER_BYTES = 64 << 10
MAX_HEADER_COUNT = 128
IDLE_S = 4.0  # vLLM closes idle connections after 5 s
SWEEP_S = 1.0
CONNECT_S = 5.0
QUEUE_FULL_S = 0.02


class EngineUnreachable(Exception):
    """No connection to the engine could be made; nothing was sent."""


class EngineAnswerError(Exception):
    """The engine broke off, or answered what cannot be passed on; `timed_out` when it stayed silent."""

    def __init__(self, message: str, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out


class AnswerSink(Protocol):
    """Who receives an answer; called from the event loop's read callback, so nothing here may wait."""

    def answer_started(self, status: int, headers: dict[bytes, bytes]) -> None:
        """Status line and header fields (names in lower case, first value wins)."""

    def answer_data(self, pieces: list[bytes]) -> None:
        """The body bytes of one read, one item per chunk as the engine framed them."""

    def answer_ended(self) -> None:
        """The answer is complete as framed."""

    def answer_failed(self, error: EngineAnswerError) -> None:
        """The answer will not be completed; nothing more is called."""


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine listens: `unix:/path` or `http://host:port`, and the headers it wants."""

    url: str
    authorization: str = ""
    silence_s: float = 600.0
    max_answer_bytes: int = 1 << 30

    def head(self, path: bytes, request_id: str, length: int, *, method: bytes = b"POST") -> bytes:
        """The request line and header fields; nothing of the client's headers goes through."""
        return (
            b"%b %b HTTP/1.1\r\nhost: engine\r\ncontent-type: application/json\r\n"
            b"x-request-id: %b\r\n%bcontent-length: %d\r\n\r\n"
            % (
                method,
                path,
                request_id.encode(),
                b"authorization: Bearer " + self.authorization.encode() + b"\r\n" if self.authorization else b"",
                length,
            )
        )


class EngineConnection(asyncio.Protocol):
    """One keep-alive connection, one exchange at a time."""

    def __init__(self, pool: "EnginePool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._sink: AnswerSink | None = None
        self._request = b""
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._header_bytes = self._header_count = 0
        self._answer_bytes = 0
        self._headers_done = self._ended = self._interim = self._reusable = False
        self._paused = False
        self.exchanges = 0
        self.touched_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @property
    def usable(self) -> bool:
        """Whether a next exchange may be started."""
        return self._transport is not None and not self._transport.is_closing()

    def start(self, request: bytes, sink: AnswerSink) -> None:
        """Send one whole request; everything that comes back goes to `sink`."""
        transport = cast("asyncio.Transport", self._transport)
        self._sink = sink
        self._request = request if self.exchanges else b""
        self._headers = {}
        self._header_bytes = self._header_count = self._answer_bytes = 0
        self._headers_done = self._ended = self._interim = False
        self.exchanges += 1
        self.touched_s = self._pool.now()
        transport.write(request)

    def abort(self) -> None:
        """Close at once: the engine sees the disconnect and stops generating."""
        self._sink = None
        self._pool.forget(self)
        if self._transport is not None:
            self._transport.abort()

    def pause(self, paused: bool) -> None:
        """Stop or resume reading, for a client that reads slower than the engine writes."""
        if self._transport is None or self._transport.is_closing() or paused == self._paused:
            return
        self._paused = paused
        if paused:
            self._transport.pause_reading()
        else:
            self.touched_s = self._pool.now()
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        sink = self._sink
        if sink is None:
            self.abort()  # bytes nobody asked for
            return
        self.touched_s = self._pool.now()
        self._request = b""
        try:
            if not self._headers_done:
                self._header_bytes += len(data)
            self._parser.feed_data(data)
            if not self._headers_done and self._header_bytes > MAX_HEADER_BYTES:
                raise EngineAnswerError("the answer's headers are too large")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, EngineAnswerError) as error:
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
            self._fail(
                cause if isinstance(cause, EngineAnswerError) else EngineAnswerError("the answer is not valid HTTP")
            )
            return
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            sink.answer_data(pieces)
        if self._ended and self._sink is sink:
            self._sink = None
            self._pool.release(self, reusable=self._reusable)
            sink.answer_ended()

    def eof_received(self) -> None:
        if self._sink is not None and self._headers_done and not self._ended:
            framed = b"content-length" in self._headers or b"transfer-encoding" in self._headers
            if not framed:  # RFC 9112 section 6.3 rule 8: the body ends with the connection
                sink, self._sink = self._sink, None
                self._pool.forget(self)
                sink.answer_ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        sink, self._sink = self._sink, None
        if sink is None:
            return
        if self._request:  # a reused idle connection that the engine closed before a byte came back: RFC 9112 9.3.1
            self._pool.restart(self._request, sink)
        else:
            sink.answer_failed(EngineAnswerError("the engine closed the connection"))

    def fail_if_silent(self, deadline_s: float) -> None:
        """End the exchange when nothing was read since `deadline_s`."""
        if self._sink is not None and self.touched_s < deadline_s:
            self._fail(EngineAnswerError("the engine stayed silent", timed_out=True))

    def _fail(self, error: EngineAnswerError) -> None:
        sink = self._sink
        self.abort()
        if sink is not None:
            sink.answer_failed(error)

    def on_message_begin(self) -> None:
        if self._ended:
            raise EngineAnswerError("the engine sent more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        if self._header_count > MAX_HEADER_COUNT:
            raise EngineAnswerError("the answer has too many headers")
        self._headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._interim = status < 200
        if self._interim:
            if status == 101:
                raise EngineAnswerError("the engine switched protocols")
            self._headers = {}
            return
        self._headers_done = True
        if self._sink is not None:
            self._sink.answer_started(status, self._headers)

    def on_body(self, body: bytes) -> None:
        self._answer_bytes += len(body)
        if self._answer_bytes > self._pool.address.max_answer_bytes:
            raise EngineAnswerError("the answer is too large")
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._ended = not self._interim
        self._reusable = self._parser.should_keep_alive()  # forgotten afterwards


class EnginePool:
    """Connections to one engine replica, reused last in, first out."""

    def __init__(self, address: EngineAddress, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self._loop = loop
        self.now: Callable[[], float] = loop.time
        self._idle: list[EngineConnection] = []
        self._open: set[EngineConnection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._retries: set[asyncio.Task[None]] = set()

    @property
    def open_connections(self) -> int:
        """Connections that exist, busy and idle."""
        return len(self._open)

    async def acquire(self) -> EngineConnection:
        """A connection ready for one exchange; raises EngineUnreachable when none can be made."""
        fresh_since = self.now() - IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.touched_s >= fresh_since:
                return connection
            connection.abort()
        return await self._connect()

    def release(self, connection: EngineConnection, *, reusable: bool) -> None:
        """Take a connection back after its exchange."""
        if reusable and connection.usable:
            self._idle.append(connection)
        else:
            connection.abort()

    def forget(self, connection: EngineConnection) -> None:
        """The connection is gone."""
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def restart(self, request: bytes, sink: AnswerSink) -> None:
        """Send a request once more, over a new connection."""
        task = self._loop.create_task(self._restart(request, sink))
        self._retries.add(task)
        task.add_done_callback(self._retries.discard)

    async def _restart(self, request: bytes, sink: AnswerSink) -> None:
        try:
            connection = await self._connect()
        except EngineUnreachable as error:
            sink.answer_failed(EngineAnswerError(str(error)))
            return
        adopt = getattr(sink, "connection_replaced", None)
        if adopt is not None:
            adopt(connection)
        connection.start(request, sink)

    def close(self) -> None:
        """Close every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in list(self._open):
            connection.abort()

    async def _connect(self) -> EngineConnection:
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await self._open_one()
                while connection is None:  # the engine's listen queue is full: unix(7), EAGAIN
                    await asyncio.sleep(QUEUE_FULL_S)
                    connection = await self._open_one()
        except (OSError, TimeoutError) as error:
            raise EngineUnreachable(f"the engine cannot be reached ({type(error).__name__})") from error
        self._open.add(connection)
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        return connection

    async def _open_one(self) -> EngineConnection | None:
        url = self.address.url
        try:
            if url.startswith("unix:"):
                return (await self._loop.create_unix_connection(lambda: EngineConnection(self), url[5:]))[1]
            host, _, port = url.removeprefix("http://").rpartition(":")
            host = host.removeprefix("[").removesuffix("]")
            return (await self._loop.create_connection(lambda: EngineConnection(self), host, int(port)))[1]
        except BlockingIOError:
            return None

    def _sweep(self) -> None:
        now = self.now()
        for connection in [idle for idle in self._idle if idle.touched_s < now - IDLE_S]:
            connection.abort()
        for connection in list(self._open):
            connection.fail_if_silent(now - self.address.silence_s)
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep) if self._open else None
