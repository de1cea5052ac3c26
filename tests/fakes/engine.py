"""A small engine that speaks enough of vLLM's HTTP to test what stands in front of it.

What it does is chosen by the last user text, `word:argument`: `words:5` answers five words, `slow:40` five
words a second apart by 40 ms, `die:3` drops the connection after three chunks, and so on (`_SCRIPTS`). It runs
on a thread of its own, keeps every body it was sent, and knows how many requests are running.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

USAGE = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
EVENT_STREAM, JSON = "text/event-stream", "application/json"


class FakeEngine:
    """An engine on a unix socket and on TCP at once; use it as a context manager."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.port = 0
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.sent: list[bytes] = []
        self.running = 0
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    def drop_connections(self) -> None:
        """Close every connection at once, as a killed engine would."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        unix = await asyncio.start_unix_server(self._connection, self.socket)
        tcp = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = tcp.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        for server in (unix, tcp):
            server.close()
        self._abort_all()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        request, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, path, _ = request.split(" ")
        if method == "GET":
            await self._plain(writer, 200, self._metrics() if path == "/metrics" else b"", "text/plain")
            return True
        document = json.loads(body)
        self.seen.append((path, headers, document))
        self.running += 1
        gone = asyncio.ensure_future(reader.read(1))  # nothing is pipelined: a byte or an end means it is over
        work = asyncio.ensure_future(self._answer(writer, path, document))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return False
            return bool(work.result())
        finally:
            self.running -= 1
            gone.cancel()
            work.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)

    def _metrics(self) -> bytes:
        lines = [
            "# HELP vllm:num_requests_running Running.",
            "# TYPE vllm:num_requests_running gauge",
            f'vllm:num_requests_running{{engine="0"}} {float(self.running)}',
        ]
        return ("\n".join(lines) + "\n").encode()

    async def _answer(self, writer: asyncio.StreamWriter, path: str, document: dict[str, Any]) -> bool:
        word, _, argument = last_text(document).partition(":")
        if word == "hang":
            await asyncio.sleep(3600)
        if word == "garbage":
            writer.write(b"HELLO THIS IS NOT HTTP\r\n\r\n")
            await writer.drain()
            return False
        if word == "status":
            error = {"error": {"message": "refused by the engine", "type": "BadRequestError", "code": int(argument)}}
            await self._plain(writer, int(argument), json.dumps(error).encode())
            return True
        if word == "headers":
            writer.write(b"HTTP/1.1 200 OK\r\n" + b"x-pad: " + b"p" * int(argument) + b"\r\n")
            await writer.drain()
            await asyncio.sleep(3600)
        if word == "break":
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
            await writer.drain()
            return False
        if document.get("stream"):
            return await self._stream(writer, path, document, word, argument)
        count = int(argument) if word == "words" else 5
        if word == "slow":
            await asyncio.sleep(int(argument) * 5 / 1000)
        text = " ".join(["word"] * count)
        await self._plain(writer, 200, whole_answer(path, document, text))
        return True

    async def _plain(self, writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = JSON) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        writer.write(body)
        await writer.drain()

    async def _stream(
        self, writer: asyncio.StreamWriter, path: str, document: dict[str, Any], word: str, argument: str
    ) -> bool:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-type: {EVENT_STREAM}\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        count = int(argument) if word in {"words", "die", "end"} else 5
        events = stream_events(path, document, count)
        async for event in _paced(events, int(argument) / 1000 if word == "slow" else 0.0):
            if word in {"die", "end"} and event is events[-1]:
                if word == "end":
                    writer.write(b"0\r\n\r\n")
                await writer.drain()
                return False
            self.sent.append(event)
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


async def _paced(events: list[bytes], pause_s: float) -> AsyncIterator[bytes]:
    for event in events:
        yield event
        if pause_s:
            await asyncio.sleep(pause_s)


def last_text(document: dict[str, Any]) -> str:
    """The script: the last user text wherever this API keeps it."""
    turns = document.get("messages") or document.get("input") or document.get("prompt") or ""
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        content = turns[-1].get("content", "")
        return content if isinstance(content, str) else str(content[0].get("text", "")) if content else ""
    return turns if isinstance(turns, str) else ""


def whole_answer(path: str, document: dict[str, Any], text: str) -> bytes:
    """One answer that is not streamed."""
    anthropic = {"input_tokens": 7, "output_tokens": 5}
    if path == "/v1/messages":
        content = [{"type": "text", "text": text}]
        answer: dict[str, Any] = {"id": "m", "type": "message", "role": "assistant", "content": content}
        return json.dumps({**answer, "usage": anthropic, "model": document["model"]}).encode()
    if path == "/v1/responses":
        return json.dumps({"id": "r", "object": "response", "status": "completed", "usage": anthropic}).encode()
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"id": "c", "model": document["model"], "choices": [choice], "usage": USAGE}).encode()


def stream_events(path: str, document: dict[str, Any], count: int) -> list[bytes]:
    """The events of one streamed answer, the terminal one last."""
    if path == "/v1/messages":
        return [_event(item) for item in _message_events(count)]
    if path == "/v1/responses":
        return [_event(item) for item in _response_events(count)]
    events = [
        b"data: %b\n\n" % json.dumps({"id": "c", "choices": [{"index": 0, "delta": {"content": f"w{n} "}}]}).encode()
        for n in range(count)
    ]
    if (document.get("stream_options") or {}).get("include_usage"):
        events.append(b"data: %b\n\n" % json.dumps({"id": "c", "choices": [], "usage": USAGE}).encode())
    return [*events, b"data: [DONE]\n\n"]


def _message_events(count: int) -> list[dict[str, Any]]:
    block = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word "}}
    return [
        {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 7, "output_tokens": 0}}},
        *[block] * count,
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    ]


def _response_events(count: int) -> list[dict[str, Any]]:
    return [
        {"type": "response.created"},
        *[{"type": "response.output_text.delta", "delta": "word "}] * count,
        {"type": "response.completed", "response": {"id": "r", "usage": {"input_tokens": 7, "output_tokens": 5}}},
    ]


def _event(content: dict[str, Any]) -> bytes:
    return f"event: {content['type']}\ndata: {json.dumps(content)}\n\n".encode()
