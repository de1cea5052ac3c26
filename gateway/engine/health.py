"""Health by progress: an engine that has work and makes none is hung, whatever /health says.

The decision is pure; reading the engine's answers is bounded. Source: vLLM's Prometheus metrics.
"""

import asyncio
import re
from dataclasses import dataclass

from gateway.engine.client import EngineAddress, EngineAnswerError, EnginePool, EngineUnreachable

MAX_ANSWER_BYTES = 4 << 20
PROBE_S = 5.0
_SAMPLE = re.compile(r"^(vllm:[a-z_]+)(?:\{.*\})? ([0-9.eE+-]+)$", re.MULTILINE)
_PROGRESS = ("vllm:iteration_tokens_total_sum", "vllm:prompt_tokens_total", "vllm:generation_tokens_total")


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at an engine: does it answer, how much runs, how far has it come (`None`: no such metrics)."""

    answers: bool
    running: float | None = None
    progress: float | None = None


class ProgressWatch:
    """Decides from observations whether an engine is `ready`, `unknown`, `hung` or `dead`."""

    def __init__(self, hang_timeout_s: float) -> None:
        self._timeout_s = hang_timeout_s
        self._progress: float | None = None
        self._moved_at: float | None = None
        self._answered_at: float | None = None

    def observe(self, seen: Observation, now: float) -> str:
        """Take one observation at monotonic time `now`."""
        if self._answered_at is None or seen.answers:
            self._answered_at = now
        if not seen.answers:
            return "hung" if now - self._answered_at >= self._timeout_s else "ready"
        if seen.progress is None or seen.running is None:
            self._moved_at = None
            return "unknown"
        if seen.progress != self._progress or not seen.running or self._moved_at is None:
            self._progress, self._moved_at = seen.progress, now
            return "ready"
        return "hung" if now - self._moved_at >= self._timeout_s else "ready"


class Backoff:
    """How long to wait before the next start: doubles from 1 s to 60 s, forgotten after a calm period."""

    def __init__(self, calm_s: float = 600.0) -> None:
        self._calm_s, self._delay_s, self._last = calm_s, 0.0, float("-inf")

    def next_delay_s(self, now: float) -> float:
        """The delay before a start that becomes necessary now."""
        self._delay_s = 1.0 if now - self._last > self._calm_s else min(60.0, self._delay_s * 2)
        self._last = now
        return self._delay_s


def read_metrics(text: str) -> Observation:
    """What an engine's metrics say about its work."""
    sums: dict[str, float] = {}
    for name, value in _SAMPLE.findall(text):
        sums[name] = sums.get(name, 0.0) + float(value)
    known = [sums[name] for name in _PROGRESS if name in sums]
    return Observation(True, sums.get("vllm:num_requests_running"), sum(known) if known else None)


class _Whole:
    """Collects one bounded answer."""

    def __init__(self) -> None:
        self.done: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._status, self._parts = 0, list[bytes]()

    def answer_started(self, status: int, headers: dict[bytes, bytes]) -> None:
        """See AnswerSink."""
        self._status = status

    def answer_data(self, pieces: list[bytes]) -> None:
        """See AnswerSink."""
        self._parts += pieces

    def answer_ended(self) -> None:
        """See AnswerSink."""
        if not self.done.done():
            self.done.set_result((self._status, b"".join(self._parts)))

    def answer_failed(self, error: EngineAnswerError) -> None:
        """See AnswerSink."""
        if not self.done.done():
            self.done.set_exception(ValueError(str(error)))


async def fetch(url: str, path: str, *, timeout_s: float = PROBE_S, authorization: str = "") -> tuple[int, bytes]:
    """GET from an engine (`unix:/path`, `http://host:port`), bounded in time and size; raises OSError, ValueError."""
    address = EngineAddress(url, authorization, max_answer_bytes=MAX_ANSWER_BYTES)
    pool = EnginePool(address, asyncio.get_running_loop())
    try:
        async with asyncio.timeout(timeout_s):
            connection, whole = await pool.acquire(), _Whole()
            connection.start(address.head(path.encode(), "health", 0, method=b"GET"), whole)
            return await whole.done
    except EngineUnreachable as error:
        raise ConnectionError(str(error)) from error
    finally:
        pool.close()


async def observe(url: str) -> Observation:
    """Look at one engine; never raises for what the engine does."""
    try:
        status, _ = await fetch(url, "/health")
        if status != 200:
            return Observation(False)
        status, body = await fetch(url, "/metrics")
        return read_metrics(body.decode(errors="replace")) if status == 200 else Observation(True)
    except (OSError, ValueError, TimeoutError):
        return Observation(False)
