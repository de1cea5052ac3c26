"""Structured logs: one JSON object per line on standard error, free of prompts and credentials by construction.

Only the fields named at the call are written, each bounded; a flood is cut to LINES_PER_S and counted.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import TextIO

LINES_PER_S = 50
MAX_VALUE_CHARS = 200


class Log:
    """Writes log lines, at most LINES_PER_S of them a second."""

    def __init__(self, component: str, stream: TextIO = sys.stderr, now: Callable[[], float] = time.time) -> None:
        self._component, self._stream, self._now = component, stream, now
        self._second, self._written, self._dropped = 0, 0, 0

    def line(self, level: str, event: str, **fields: str | int) -> None:
        """Write one event with its fields."""
        now = self._now()
        if int(now) != self._second:
            dropped, self._dropped = self._dropped, 0
            self._second, self._written = int(now), 0
            if dropped:
                self._write(now, "warning", "lines_dropped", {"count": dropped})
        self._written += 1
        if self._written > LINES_PER_S:
            self._dropped += 1
            return
        self._write(now, level, event, fields)

    def _write(self, now: float, level: str, event: str, fields: dict[str, str | int]) -> None:
        values = {name: value[:MAX_VALUE_CHARS] if isinstance(value, str) else value for name, value in fields.items()}
        text = {"ts": round(now, 3), "level": level, "component": self._component, "event": event, **values}
        self._stream.write(json.dumps(text) + "\n")
        self._stream.flush()
