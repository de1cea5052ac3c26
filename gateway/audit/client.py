"""The gateway's side of the audit log: many appends per write, futures resolved as groups become durable.

One group is under way at a time: what is appended meanwhile becomes the next group, so that load makes
groups larger instead of more frequent, and the auditor is woken once per group. `append` never blocks and
never raises: its future fails with AuditUnavailable at once while the auditor is away, and at the deadline
when it is silent. A lost connection is made again by itself.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec

from gateway.audit import protocol
from gateway.audit.errors import AuditUnavailable

MAX_WAITING = 65536
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
        indices = protocol.unpack_answer(data)
        if indices is None:
            self._buffer = data
            return
        self._buffer = b""
        self._client.answered(indices)

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.lost(self)


class AuditClient:
    """A connection to the auditor that heals itself."""

    def __init__(self, socket_path: Path, deadline_s: float) -> None:
        self._path, self._deadline_s = socket_path, deadline_s
        self._loop = asyncio.get_running_loop()
        self._connection: _Connection | None = None
        self._encode = msgspec.json.Encoder().encode
        self._out: list[bytes] = []
        self._waiting: list[asyncio.Future[Located]] = []
        self._sent: list[asyncio.Future[Located]] = []
        self._sent_s = 0.0
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
        connection = self._connection
        if connection is None or not connection.log_id or len(self._waiting) >= MAX_WAITING:
            future.set_exception(AuditUnavailable("the auditor cannot be reached"))
            return future
        try:
            payload = self._encode((kind, fields))
        except UnicodeEncodeError:  # a lone surrogate in a client's text becomes a question mark
            payload = json.dumps((kind, fields), ensure_ascii=False).encode(errors="replace")
        if len(payload) > protocol.MAX_RECORD_PAYLOAD_BYTES:
            future.set_exception(AuditUnavailable("the record is too large"))
            return future
        if not self._out and not self._sent:
            self._loop.call_soon(self._flush)
        self._out.append(payload)
        self._waiting.append(future)
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

    def answered(self, indices: tuple[int, ...]) -> None:
        """The group under way is durable."""
        sent, self._sent = self._sent, []
        if self._connection is None or len(indices) != len(sent):
            self._abort()
            self._fail(sent)
            return
        log_id = self._connection.log_id
        for future, index in zip(sent, indices, strict=True):
            if future.done():
                continue
            if index == protocol.REFUSED:
                future.set_exception(AuditUnavailable("the auditor refused the record"))
            else:
                future.set_result((log_id, index))
        if self._out:
            self._flush()

    def lost(self, connection: _Connection) -> None:
        """The connection is gone: nothing pending will be acknowledged."""
        if connection is self._connection:
            self._connection = None
            self._fail_all()
            if not self._closed:
                self._reconnect()

    def _flush(self) -> None:
        connection, count = self._connection, len(self._out)
        if not count or self._sent or connection is None or connection.transport is None:
            return
        while count > 1 and sum(map(len, self._out[:count])) + count > protocol.MAX_GROUP_BYTES:
            count //= 2
        group, self._out = b",".join(self._out[:count]), self._out[count:]
        self._sent, self._waiting = self._waiting[:count], self._waiting[count:]
        self._sent_s = self._loop.time()
        connection.transport.write(b"%b[%b]" % (protocol.LENGTH.pack(len(group) + 2), group))
        if self._timer is None:
            self._timer = self._loop.call_later(self._deadline_s, self._check_deadline)

    def _check_deadline(self) -> None:
        """While a group is under way: give the auditor up when it has been silent for the deadline."""
        self._timer = None
        if self._sent:
            left_s = self._sent_s + self._deadline_s - self._loop.time()
            if left_s <= 0:
                self._abort()
            else:
                self._timer = self._loop.call_later(left_s, self._check_deadline)

    def _abort(self) -> None:
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.abort()

    def _fail(self, futures: list["asyncio.Future[Located]"]) -> None:
        for future in futures:
            if not future.done():
                future.set_exception(AuditUnavailable("the auditor is gone"))

    def _fail_all(self) -> None:
        futures = self._sent + self._waiting
        self._sent, self._waiting, self._out = [], [], []
        self._fail(futures)

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
