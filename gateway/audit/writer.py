"""The writer: appends records in groups, durable before they are acknowledged, and signs checkpoints.

Recovery reads the whole log: a torn tail beyond the last signed size is cut and reported as a record,
damage below it is AuditDamaged and nothing is written. A begin without an end becomes `req.aborted`.
After an OSError the writer must be given up: only a new one, which reads from disk, may go on.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gateway.audit import segment
from gateway.audit.checkpoint import CHECKPOINT_FILE, KEY_FILE, Checkpoint, parse
from gateway.audit.errors import AuditDamaged, RecordInvalid
from gateway.audit.merkle import Frontier, leaf_hash
from gateway.audit.record import VERSION, encode
from gateway.trust.files import write_durably
from gateway.trust.notes import Signer, TrustError

GENESIS = hashlib.sha256(b"").hexdigest()
CHECKPOINT_RECORDS = 1000

Entry = tuple[str, dict[str, Any]]


class Writer:
    """The only one who appends to a log directory."""

    def __init__(
        self,
        directory: Path,
        signer: Signer,
        *,
        durability: str = "fsync",
        boot: str = "",
        now_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        mono_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        """Verify what is on disk and take over; raises AuditDamaged or OSError with nothing changed."""
        self.log_id = signer.verifier.name
        self._directory, self._signer, self._durability = directory, signer, durability
        self._boot, self._now_us, self._mono_us = boot, now_us, mono_us
        self._tree, self._prev, self._open = Frontier(), GENESIS, dict[str, None]()
        self.signed = self._signed_size()
        cut, last, end = self._recover()
        if not (directory / KEY_FILE).exists():
            write_durably(directory / KEY_FILE, f"{signer.verifier.vkey}\n".encode(), 0o644)
        first = last or directory / "records-000000000000.jsonl"
        self._segment = segment.Segment(first, end, durable=durability == "fsync")
        entries: list[Entry] = []
        if cut:
            entries.append(("log.tail_cut", {"bytes": cut}))
        entries += [("req.aborted", {"request": request}) for request in self._open]
        self._open.clear()
        entries.append(("log.start", {"durability": durability, "log": self.log_id}))
        for position in range(0, len(entries), CHECKPOINT_RECORDS):
            self.append(entries[position : position + CHECKPOINT_RECORDS])
        self.checkpoint()

    @property
    def size(self) -> int:
        """Records in the log."""
        return self._tree.size

    def append(self, entries: Sequence[Entry]) -> list[int | RecordInvalid]:
        """Write a group of records; returns each one's index once all are durable, or why it was refused."""
        results: list[int | RecordInvalid] = []
        out: list[bytes] = []
        now, mono, index, prev = self._now_us(), self._mono_us(), self._tree.size, self._prev
        leaves: list[bytes] = []
        for kind, fields in entries:
            fields.update(
                {
                    "boot": self._boot,
                    "kind": kind,
                    "mono_us": mono,
                    "prev": prev,
                    "seq": index,
                    "time_us": now,
                    "v": VERSION,
                }
            )
            try:
                data = encode(fields)
            except RecordInvalid as error:
                results.append(error)
                continue
            leaf = leaf_hash(data)
            leaves.append(leaf)
            prev = leaf.hex()
            out += (data, b"\n")
            results.append(index)
            index += 1
        if out:
            self._segment.append(b"".join(out))
            for leaf in leaves:
                self._tree.append(leaf)
            self._prev = prev
        if self._segment.end >= segment.SEGMENT_BYTES:
            self._rotate()
        return results

    def checkpoint(self) -> None:
        """Sign the log as it is now; the old checkpoint stays until the new one is durable."""
        self._segment.check()
        state = Checkpoint(self.log_id, self._tree.size, self._tree.root(), self._durability)
        write_durably(self._directory / CHECKPOINT_FILE, state.sign(self._signer), 0o644)
        self.signed = state.size

    def close(self) -> None:
        """Record the stop, cut the zeros and sign everything."""
        self.append([("log.stop", {"log": self.log_id})])
        self._segment.finish()
        self.checkpoint()

    def _rotate(self) -> None:
        self._segment.finish()
        path = self._directory / f"records-{self._tree.size:012d}.jsonl"
        self._segment = segment.Segment(path, 0, durable=self._durability == "fsync")
        self.append([("log.segment", {"log": self.log_id})])

    def _signed_size(self) -> int:
        file = self._directory / CHECKPOINT_FILE
        if not file.exists():
            if segment.paths(self._directory):
                raise AuditDamaged("there are records but no checkpoint: it was removed")
            return 0
        try:
            self._checkpoint = parse(file.read_bytes(), self._signer.verifier)
        except TrustError as error:
            raise AuditDamaged(f"checkpoint: {error}") from error
        return self._checkpoint.size

    def _recover(self) -> tuple[int, Path | None, int]:
        """Replay the log; returns the bytes cut, the segment to go on in and where its records end."""
        last: Path | None = None
        end = cut = 0
        for first, path in segment.paths(self._directory):
            if first != self._tree.size or cut:
                if self._tree.size >= self.signed:
                    cut += path.stat().st_size
                    path.unlink()
                    continue
                raise AuditDamaged(f"{path.name}: begins at record {first}, expected {self._tree.size}")
            last, end = path, 0
            for offset, line in segment.lines(path):
                if not self._replay(line):
                    if self._tree.size < self.signed:
                        raise AuditDamaged(f"{path.name}: record {self._tree.size} at byte {offset} is damaged")
                    cut = path.stat().st_size - offset
                    break
                end = offset + len(line)
                if self._tree.size == self.signed and self._tree.root() != self._checkpoint.root:
                    raise AuditDamaged(f"the first {self.signed} records are not those that were signed")
        if self._tree.size < self.signed:
            raise AuditDamaged(f"record {self._tree.size} and all after it are missing, {self.signed} were signed")
        return cut, last, end

    def _replay(self, line: bytes) -> bool:
        data = line[:-1]
        try:
            record = json.loads(data)
        except ValueError:
            return False
        if line[-1:] != b"\n" or not isinstance(record, dict):
            return False
        if record.get("seq") != self._tree.size or record.get("prev") != self._prev or encode(record) != data:
            return False
        leaf = leaf_hash(data)
        self._tree.append(leaf)
        self._prev = leaf.hex()
        kind, request = record.get("kind"), record.get("request")
        if kind == "req.begin" and isinstance(request, str):
            self._open[request] = None
        elif kind in {"req.end", "req.aborted"} and isinstance(request, str):
            self._open.pop(request, None)
        return True
