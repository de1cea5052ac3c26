"""Which bytes of an event stream go out at once, and which wait for the end record.

Only the terminal event is held: `[DONE]`; `message_stop`; `response.completed`, `.incomplete`, `.failed`.
Nothing is parsed but the events that can end a stream or carry its usage. Chunk boundaries of the engine
do not matter: an event split anywhere is recognised. Source: HTML Living Standard, server-sent events.
"""

import re

import msgspec

from gateway.domain import NO_USAGE, Usage

MAX_HELD_BYTES = 64 << 20
_END_OF_EVENT = re.compile(rb"\r?\n\r?\n")
_RESPONSES_END = (b"response.completed", b"response.incomplete", b"response.failed")


class StreamTooLarge(Exception):
    """The engine sent a terminal event larger than is held."""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _UsageBlock(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None


class _Whole(msgspec.Struct):
    usage: _UsageBlock | None = None
    response: "_Whole | None" = None
    message: "_Whole | str | None" = None


_DECODER = msgspec.json.Decoder(_Whole)


def usage_of(document: bytes, known: Usage | None = None) -> Usage:
    """The usage an answer or event states; what it does not state stays as `known`."""
    known = known or NO_USAGE
    try:
        whole = _DECODER.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return known
    nested = whole.response or (whole.message if isinstance(whole.message, _Whole) else None)
    block = whole.usage or (nested.usage if nested else None)
    if block is None:
        return known
    details = block.prompt_tokens_details or block.input_tokens_details
    cached = details.cached_tokens if details else block.cache_read_input_tokens
    read = block.input_tokens if block.prompt_tokens is None else block.prompt_tokens
    written = block.output_tokens if block.completion_tokens is None else block.completion_tokens
    return Usage(
        known.input_tokens if read is None else read,
        known.output_tokens if written is None else written,
        known.cached_tokens if cached is None else cached,
    )


def _data_of(event: bytes) -> bytes:
    for line in event.splitlines():
        if line.startswith(b"data:"):
            return line[5:].strip()
    return b""


class StreamGate:
    """Splits an event stream into what is forwarded now and what is held for the end record.

    Attributes:
        held: the bytes that wait: the terminal event and all after it, or a tail that may become one.
        ended: whether the terminal event has been seen.
        failed: whether the engine reported an error inside the stream.
        usage: the tokens reported so far.
    """

    __slots__ = ("_dialect", "_inside", "_strip_usage", "ended", "failed", "held", "usage")

    def __init__(self, dialect: str, *, strip_usage: bool) -> None:
        self._dialect = dialect
        self._strip_usage = strip_usage
        self._inside = False  # within an event whose beginning was already forwarded
        self.held = b""
        self.ended = False
        self.failed = False
        self.usage: Usage = NO_USAGE

    def feed(self, data: bytes) -> bytes:
        """Take the next bytes of the engine, return those that go out now."""
        if self._dialect == "openai":
            if (
                not self.held
                and data[-2:] == b"\n\n"
                and b'"choices":[]' not in data
                and b"[DONE]" not in data
                and b'"error"' not in data
                and b'"choices": []' not in data
            ):
                self._inside = False
                return data
        elif not self.held and data[-2:] == b"\n\n" and not self._interesting(data):
            self._inside = False
            return data
        return self._split(data)

    def _interesting(self, data: bytes) -> bool:
        if self._dialect == "anthropic":
            return b"message_" in data or b"event: error" in data
        return b"response.completed" in data or b"response.incomplete" in data or b"response.failed" in data

    def _split(self, data: bytes) -> bytes:
        buffer = self.held + data
        self.held = b""
        if self.ended:
            self._hold(buffer)
            return b""
        out: list[bytes] = []
        position = 0
        for match in _END_OF_EVENT.finditer(buffer):
            event = buffer[position : match.end()]
            if self._inside:
                self._inside = False
                out.append(event)
            elif self._terminal(event):
                self.ended = True
                self._note(event)
                self._hold(buffer[position:])
                return b"".join(out)
            elif self._note(event):
                out.append(event)
            position = match.end()
        tail = buffer[position:]
        if tail and not self._inside and self._undecided(tail):
            self._hold(tail)
        elif tail:
            self._inside = True
            out.append(tail)
        return b"".join(out)

    def _hold(self, data: bytes) -> None:
        if len(data) > MAX_HELD_BYTES:
            raise StreamTooLarge
        self.held = data

    def _terminal(self, event: bytes) -> bool:
        if self._dialect == "openai":
            return _data_of(event) == b"[DONE]"
        name = event.partition(b"\n")[0].removeprefix(b"event:").strip()
        return name == b"message_stop" if self._dialect == "anthropic" else name in _RESPONSES_END

    def _undecided(self, tail: bytes) -> bool:
        """Whether an unfinished event must wait: it may be terminal, or the usage event to be removed."""
        if self._dialect == "openai":
            if self._strip_usage:
                return True
            start = tail.replace(b" ", b"").rstrip(b"\r\n")
            return b"data:[DONE]".startswith(start) or start.startswith(b"data:[DONE]")
        names = (
            (b"message_stop", b"message_delta", b"message_start") if self._dialect == "anthropic" else _RESPONSES_END
        )
        name = tail.partition(b"\n")[0].removeprefix(b"event:").strip()
        if b"\n" not in tail:
            return b"event:".startswith(tail) or any(known.startswith(name) for known in names)
        return name in names

    def _note(self, event: bytes) -> bool:
        """Take usage and errors from an event; returns whether it is forwarded."""
        data = _data_of(event)
        if self._dialect == "openai":
            if data.startswith((b'{"error"', b'{ "error"')):
                self.failed = True
            elif b'"usage"' in data and (b'"choices":[]' in data or b'"choices": []' in data):
                self.usage = usage_of(data, self.usage)
                return not self._strip_usage
            return True
        if event.startswith((b"event: error", b"event: response.failed")):
            self.failed = True
        if b'"usage"' in data:
            self.usage = usage_of(data, self.usage)
        return True
