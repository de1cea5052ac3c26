"""The verifier: reads a log directory, trusts nothing in it, says what is wrong and where. Flat memory.

Checked: every file is known and not empty; the checkpoint's signature; each record's framing, canonical
form, sequence and hash link; the Merkle root at the signed size; zeros after the last record; ends that
have a begin. What stays with the caller: to bring the log's key from outside, and to compare checkpoints
that were witnessed earlier. Source: RFC 6962 section 2.1; c2sp.org/tlog-checkpoint.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from gateway.audit import segment
from gateway.audit.checkpoint import CHECKPOINT_FILE, KEY_FILE, Checkpoint, parse
from gateway.audit.errors import RecordInvalid
from gateway.audit.merkle import Frontier, leaf_hash
from gateway.audit.record import MAX_RECORD_BYTES, VERSION, encode
from gateway.audit.writer import GENESIS
from gateway.trust.notes import MAX_NOTE_BYTES, TrustError, Verifier

MAX_PROBLEMS = 100


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is wrong, and where."""

    where: str
    what: str


@dataclass(slots=True)
class Report:
    """The result of a verification."""

    trust: str
    records: int = 0
    signed: int = 0
    root: str = ""
    witnessed: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, where: str, what: str) -> None:
        """Note a problem, at most MAX_PROBLEMS of them."""
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(where, what))


class _Pass:
    def __init__(self, report: Report, checkpoint: Checkpoint | None) -> None:
        self.report, self.checkpoint = report, checkpoint
        self.tree, self.prev = Frontier(), GENESIS
        self.open: set[str] = set()
        self.aligned = True

    def line(self, where: str, line: bytes) -> None:
        record = self._parse(where, line)
        index = self.tree.size
        if record is not None and self.aligned and (record.get("seq") != index or record.get("prev") != self.prev):
            self.report.add(where, f"does not follow record {index - 1}: removed, reordered or changed records")
            self.aligned = False
        leaf = leaf_hash(line.removesuffix(b"\n"))
        self.tree.append(leaf)
        self.prev = leaf.hex()
        if (
            self.checkpoint is not None
            and self.tree.size == self.checkpoint.size
            and self.tree.root() != self.checkpoint.root
        ):
            self.report.add(where, f"the first {self.tree.size} records are not those that the checkpoint signs")

    def _parse(self, where: str, line: bytes) -> dict[str, object] | None:
        if not line.endswith(b"\n") or len(line) > MAX_RECORD_BYTES + 1:
            self.report.add(where, "is not a whole record")
            return None
        try:
            record: dict[str, object] = json.loads(line)
            canonical = isinstance(record, dict) and encode(record) + b"\n" == line
        except (ValueError, RecordInvalid):
            canonical, record = False, {}
        if not canonical or record.get("v") != VERSION:
            self.report.add(where, "is not a record in canonical form")
            return None
        request = str(record.get("request"))
        if record.get("kind") == "req.begin":
            self.open.add(request)
        elif record.get("kind") in {"req.end", "req.aborted"} and request not in self.open:
            self.report.add(where, "ends a request that never began")
        else:
            self.open.discard(request)
        return record


def verify(directory: Path, anchor: Verifier | None, trust: str) -> Report:
    """Check a whole log directory, live or copied; `anchor` is the log's key from outside, else its own is taken."""
    report = Report(trust)
    checkpoint = _checkpoint(directory, anchor, report)
    segments = segment.paths(directory)
    _unknown_files(directory, report)
    state = _Pass(report, checkpoint)
    for number, (first, path) in enumerate(segments):
        if first != state.tree.size:
            report.add(
                path.name, f"begins at record {first}, expected {state.tree.size}: a segment is missing or renamed"
            )
        if path.stat().st_size == 0:
            report.add(path.name, "is empty")
        last = number == len(segments) - 1
        for offset, line in segment.lines(path):
            where = f"{path.name} record {state.tree.size} at byte {offset}"
            if (
                last
                and not line.endswith(b"\n")
                and checkpoint is not None
                and state.tree.size >= checkpoint.size
                and _growing(path)
            ):
                break
            state.line(where, line)
        if not last and path.read_bytes()[-1:] == b"\x00":
            report.add(path.name, "ends in padding although it is finished")
    report.records = state.tree.size
    if checkpoint is not None:
        report.signed, report.root = checkpoint.size, checkpoint.root.hex()
        if state.tree.size < checkpoint.size:
            report.add("log", f"{checkpoint.size - state.tree.size} signed records are missing at the end")
    return report


def _growing(path: Path) -> bool:
    """Whether an unfinished last line is a live writer's: whole when read again."""
    *_, (_, again) = segment.lines(path)
    return again.endswith(b"\n")


def _checkpoint(directory: Path, anchor: Verifier | None, report: Report) -> Checkpoint | None:
    key_file = directory / KEY_FILE
    try:
        own = Verifier.parse(key_file.read_text()) if key_file.stat().st_size <= MAX_NOTE_BYTES else None
        if own is None or f"{own.vkey}\n" != key_file.read_text():
            raise TrustError("is malformed")
    except (OSError, TrustError, UnicodeDecodeError) as error:
        report.add(KEY_FILE, f"cannot be used: {error}")
        own = None
    if anchor is not None and own is not None and anchor != own:
        report.add(KEY_FILE, "is not the key that is trusted for this log")
    verifier = anchor or own
    if verifier is None:
        return None
    try:
        note = (directory / CHECKPOINT_FILE).read_bytes()
        return parse(note, verifier)
    except (OSError, TrustError) as error:
        report.add(CHECKPOINT_FILE, f"cannot be trusted: {error}")
        return None


def _unknown_files(directory: Path, report: Report) -> None:
    for path in sorted(directory.rglob("*")):
        known = path.parent == directory and (
            path.name in {CHECKPOINT_FILE, KEY_FILE} or segment.PATTERN.fullmatch(path.name)
        )
        if not known and not (path.name.startswith(f".{CHECKPOINT_FILE}.") and path.parent == directory):
            report.add(str(path.relative_to(directory)), "does not belong to the log")
