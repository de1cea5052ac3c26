"""The gateway's side of the audit log: many appends per write, futures resolved as groups become durable.

One group is under way at a time: what is appended meanwhile becomes the next group, so that load makes
groups larger instead of more frequent, and the auditor is woken once per group. `append` never blocks and never raises: its future fails with AuditUnavailable at once while the auditor is
away, and at the deadline when it is silent. A lost connection is made again by itself.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from gateway.audit import protocol
from gateway.audit.errors import AuditUnavailable

MAX_PENDING = 65536
RECONNECT_S = 0.1

Located = tuple[str, int]


class _Connection(asyncio.Protocol):
    def __init__(self, client: "AuditClient") -> None:
        self._client = client
        self._buffer = b""
        self.transport: asyncio.Transport | None = None
        self.log_id = ""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data if self._buffer else data
        if not self.log_id:
            if len(data) < protocol.HELLO_BYTES:
                self._buffer = data
                return
            self.log_id = data[: protocol.HELLO_BYTES].rstrip(b"\x00").decode("ascii", "replace")
            data = data[protocol.HELLO_BYTES :]
            self._client.greeted(self)
        whole = len(data) - len(data) % protocol.ANSWER.size
        self._buffer = data[whole:]
        self._client.answered(protocol.ANSWER.iter_unpack(data[:whole] if self._buffer else data), whole)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost(self)


class AuditClient:
    """A connection to the auditor that heals itself."""

    def __init__(self, socket_path: Path, deadline_s: float) -> None:
        self._path, self._deadline_s = socket_path, deadline_s
        self._loop = asyncio.get_running_loop()
        self._connection: _Connection | None = None
        self._encode = msgspec.json.Encoder().encode
        self._pending: dict[int, asyncio.Future[Located]] = {}
        self._ages: deque[tuple[int, float]] = deque()
        self._out: list[bytes] = []
        self._under_way = 0  # records sent and not yet answered
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, socket_path: Path, *, deadline_s: float = 1.0) -> "AuditClient":
        """A client that is connected, or keeps trying: it never raises for an absent auditor."""
        client = cls(socket_path, deadline_s)
        await client._try_once()
        if client._connection is None:
            client._reconnect()
        else:
            for _ in range(100):
                if client.healthy:
                    break
                await asyncio.sleep(0.01)
        return client

    @property
    def healthy(self) -> bool:
        """Whether records can be appended now."""
        return self._connection is not None and self._connection.log_id != ""

    @property
    def state(self) -> str:
        """`ok`, or `sealed` while no record can become durable."""
        return "ok" if self.healthy else "sealed"

    @property
    def log_id(self) -> str:
        """The log's id, empty before the first connection."""
        return self._connection.log_id if self._connection else ""

    def append(self, kind: str, fields: dict[str, Any]) -> "asyncio.Future[Located]":
        """Record something: the future gives (log id, leaf index) once it is durable."""
        future: asyncio.Future[Located] = self._loop.create_future()
        if not self.healthy or len(self._pending) >= MAX_PENDING:
            future.set_exception(AuditUnavailable("the auditor cannot be reached"))
            return future
        self._number = number = (self._number + 1) & 0xFFFFFFFF
        payload = self._encode((kind, fields))
        if len(payload) > protocol.MAX_PAYLOAD_BYTES:
            future.set_exception(AuditUnavailable("the record is too large"))
            return future
        self._pending[number] = future
        self._ages.append((number, self._loop.time()))
        if not self._out and not self._under_way:
            self._loop.call_soon(self._flush)
        self._out += (protocol.REQUEST.pack(len(payload), number), payload)
        if self._timer is None:
            self._timer = self._loop.call_later(self._deadline_s, self._check_deadline)
        return future

    async def close(self) -> None:
        """Close the connection; records not yet durable fail."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.close()
        self._fail_all()

    def greeted(self, connection: _Connection) -> None:
        """The auditor has named its log."""

    def answered(self, answers: Iterator[tuple[int, int, int]], length: int) -> None:
        """Some records are durable, or refused."""
        pending, connection = self._pending, self._connection
        self._under_way -= length // protocol.ANSWER.size
        for number, status, index in answers:
            future = pending.pop(number, None)
            if future is None or future.done():
                continue
            if status == protocol.OK and connection is not None:
                future.set_result((connection.log_id, index))
            else:
                future.set_exception(AuditUnavailable("the auditor refused the record"))
        if self._out and self._under_way <= 0:
            self._flush()

    def lost(self, connection: _Connection) -> None:
        """The connection is gone: nothing pending will be acknowledged."""
        if connection is self._connection:
            self._connection = None
            self._fail_all()
            if not self._closed:
                self._reconnect()

    def _flush(self) -> None:
        out, self._out = self._out, []
        if out and self._connection is not None and self._connection.transport is not None:
            self._under_way = len(out) // 2
            self._connection.transport.write(b"".join(out))

    def _check_deadline(self) -> None:
        self._timer = None
        now, ages = self._loop.time(), self._ages
        while ages and ages[0][0] not in self._pending:
            ages.popleft()
        if not ages:
            return
        if ages[0][1] + self._deadline_s <= now:
            if self._connection is not None and self._connection.transport is not None:
                self._connection.transport.abort()
            return
        self._timer = self._loop.call_later(ages[0][1] + self._deadline_s - now, self._check_deadline)

    def _fail_all(self) -> None:
        pending, self._pending = self._pending, {}
        self._ages.clear()
        self._out.clear()
        self._under_way = 0
        for future in pending.values():
            if not future.done():
                future.set_exception(AuditUnavailable("the auditor is gone"))

    def _reconnect(self) -> None:
        self._task = self._loop.create_task(self._keep_trying())

    async def _keep_trying(self) -> None:
        delay = RECONNECT_S
        while self._connection is None and not self._closed:
            await asyncio.sleep(delay)
            await self._try_once()
            delay = min(1.0, delay * 1.5)

    async def _try_once(self) -> None:
        try:
            _, connection = await self._loop.create_unix_connection(lambda: _Connection(self), str(self._path))
        except OSError:
            return
        self._connection = connection
