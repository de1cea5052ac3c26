"""Metrics of a gateway worker: cheap to record, flushed to prometheus-client once a second.

Recording touches plain Python numbers only; what was recorded becomes visible within FLUSH_S. Labels are of
bounded cardinality: tenants and models come from the operator, operations, outcomes, stages and reasons
from the code.
"""

import asyncio
from bisect import bisect_left
from collections.abc import Sequence
from typing import cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

FLUSH_S = 1.0
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
CHUNK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
AUDIT_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Tally:
    """Counts of one histogram child, kept in memory until they are flushed."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def merge(self, other: "Tally") -> None:
        """Add all of another tally with the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def flush(self, child: Histogram) -> None:
        """Move the counts into a prometheus-client child, many observations at once."""
        if not any(self.counts):
            return
        for bucket, count in zip(child._buckets, self.counts, strict=True):  # the public API takes one at a time
            if count:
                bucket.inc(count)
        child._sum.inc(self.total)
        self.counts = [0] * len(self.counts)
        self.total = 0.0


class Instruments:
    """The metrics themselves, on an injected registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("operation", "model", "tenant", "outcome")
        shared = ("operation", "model", "tenant")
        self.requests = Counter(
            "cloister_requests", "Requests that passed identity, by outcome.", labels, registry=registry
        )
        self.refusals = Counter(
            "cloister_refusals", "Requests refused, by guard stage and reason.", ("stage", "reason"), registry=registry
        )
        self.first_byte = Histogram(
            "cloister_time_to_first_token_seconds",
            "From the request to the first byte of the engine's answer.",
            shared,
            buckets=SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "cloister_request_duration_seconds",
            "From the request to the end of its answer.",
            shared,
            buckets=SECONDS,
            registry=registry,
        )
        self.chunk_gap = Histogram(
            "cloister_time_between_chunks_seconds",
            "Between two chunks of a streamed answer.",
            ("model",),
            buckets=CHUNK_SECONDS,
            registry=registry,
        )
        self.tokens_in = Counter(
            "cloister_input_tokens", "Prompt tokens the engines reported.", ("model", "tenant"), registry=registry
        )
        self.tokens_out = Counter(
            "cloister_output_tokens",
            "Tokens generated, as the engines reported.",
            ("model", "tenant"),
            registry=registry,
        )
        self.audit = Histogram(
            "cloister_audit_write_seconds", "Until a record was durable.", buckets=AUDIT_SECONDS, registry=registry
        )
        self.streams = Gauge(
            "cloister_streams_in_flight", "Streamed answers running.", registry=registry, multiprocess_mode="livesum"
        )
        self.in_flight = Gauge(
            "cloister_requests_in_flight", "Requests running.", registry=registry, multiprocess_mode="livesum"
        )


class Served:
    """What was recorded about the requests of one operation, model and tenant since the last flush."""

    __slots__ = ("duration", "first_byte", "outcomes", "tokens_in", "tokens_out")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.first_byte, self.duration = Tally(SECONDS), Tally(SECONDS)
        self.tokens_in = self.tokens_out = 0


class Telemetry:
    """Records what happens in one worker; flushes by itself while there is something to flush."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._instruments = Instruments(registry)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._counts: dict[tuple[str, ...], float] = {}
        self._served: dict[tuple[str, str, str], Served] = {}
        self._gaps: dict[str, Tally] = {}
        self._audit = Tally(AUDIT_SECONDS)
        self._streams = self._in_flight = 0
        self._children: dict[tuple[str, tuple[str, ...]], Counter | Histogram] = {}

    def request_started(self, *, stream: bool) -> None:
        """A request goes to an engine."""
        self._in_flight += 1
        self._streams += stream

    def request_ended(
        self,
        key: tuple[str, str, str],
        outcome: str,
        *,
        stream: bool,
        first_byte_s: float | None,
        total_s: float,
        tokens: tuple[int, int],
        gaps: Tally | None,
    ) -> None:
        """A request that went to an engine is over; `key` is (operation, model, tenant)."""
        self._in_flight -= 1
        self._streams -= stream
        served = self._served.get(key)
        if served is None:
            served = self._served[key] = Served()
        served.outcomes[outcome] = served.outcomes.get(outcome, 0) + 1
        if first_byte_s is not None:
            served.first_byte.add(first_byte_s)
        served.duration.add(total_s)
        served.tokens_in += tokens[0]
        served.tokens_out += tokens[1]
        if gaps is not None:
            self._gaps.setdefault(key[1], Tally(CHUNK_SECONDS)).merge(gaps)
        if self._timer is None:
            self._arm()

    def request_answered(self, key: tuple[str, str, str], outcome: str) -> None:
        """A request was answered without an engine."""
        self._count(("requests", *key, outcome), 1)
        self._arm()

    def refused(self, stage: str, reason: str) -> None:
        """A stage refused a request."""
        self._count(("refusals", stage, reason), 1)
        self._arm()

    def audit_write(self, seconds: float) -> None:
        """A record became durable."""
        self._audit.add(seconds)

    def flush(self) -> None:
        """Make everything recorded so far visible to a scrape."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        counts, self._counts = self._counts, {}
        for key, amount in counts.items():
            self._counter(*key).inc(amount)
        for shared, served in self._served.items():
            self._flush_served(shared, served)
        for model, gaps in self._gaps.items():
            gaps.flush(self._histogram("chunk_gap", model))
        self._audit.flush(self._instruments.audit)
        self._instruments.streams.set(self._streams)
        self._instruments.in_flight.set(self._in_flight)
        if self._in_flight:
            self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(FLUSH_S, self.flush)

    def _count(self, key: tuple[str, ...], amount: float) -> None:
        self._counts[key] = self._counts.get(key, 0) + amount

    def _flush_served(self, key: tuple[str, str, str], served: Served) -> None:
        for outcome, count in served.outcomes.items():
            self._counter("requests", *key, outcome).inc(count)
        served.outcomes.clear()
        served.first_byte.flush(self._histogram("first_byte", *key))
        served.duration.flush(self._histogram("duration", *key))
        if served.tokens_in or served.tokens_out:
            self._counter("tokens_in", *key[1:]).inc(served.tokens_in)
            self._counter("tokens_out", *key[1:]).inc(served.tokens_out)
            served.tokens_in = served.tokens_out = 0

    def _counter(self, name: str, *labels: str) -> Counter:
        return cast("Counter", self._child(name, labels))

    def _histogram(self, name: str, *labels: str) -> Histogram:
        return cast("Histogram", self._child(name, labels))

    def _child(self, name: str, labels: tuple[str, ...]) -> Counter | Histogram:
        child = self._children.get((name, labels))
        if child is None:
            parent: Counter | Histogram = getattr(self._instruments, name)
            child = self._children[name, labels] = parent.labels(*labels)
        return child
