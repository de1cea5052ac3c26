"""Segments: files of records, preallocated with zeros so that a durable write changes no metadata.

A segment is named by the index of its first record. Its lines end in a newline; after them come only
zeros, which the verifier checks. A finished segment has no zeros.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from gateway.trust.files import sync_directory

PATTERN = re.compile(r"records-(\d{12})\.jsonl")
GROW_BYTES = 4 << 20
SEGMENT_BYTES = 64 << 20
_READ_BYTES = 1 << 20


class SegmentGone(OSError):
    """The file being written was unlinked or replaced."""


def paths(directory: Path) -> list[tuple[int, Path]]:
    """All segments as (first index, path), in order."""
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := PATTERN.fullmatch(path.name))]
    return sorted(found)


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line as (offset, bytes with newline); what follows the last newline comes last, if not all zeros."""
    offset, rest = 0, b""
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                yield offset, line + b"\n"
                offset += len(line) + 1
            if len(rest) > _READ_BYTES and rest.count(0) == len(rest):
                offset += len(rest) - 1
                rest = rest[:1]
    if rest.strip(b"\x00"):
        yield offset, rest


class Segment:
    """The segment being written."""

    def __init__(self, path: Path, end: int, *, durable: bool) -> None:
        """Open or create; everything from `end` on is cut. The new name is durable on return."""
        self.path, self.end, self._durable = path, end, durable
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._descriptor, end)
        self._allocated = end
        self._grow(1)
        status = os.fstat(self._descriptor)
        self._identity = (status.st_dev, status.st_ino)
        sync_directory(path.parent)

    def append(self, data: bytes) -> None:
        """Write and make durable; any OSError means that nothing of it may be acknowledged."""
        if self.end + len(data) > self._allocated:
            self._grow(len(data))
        view, position = memoryview(data), self.end
        while view:
            written = os.pwrite(self._descriptor, view, position)
            view, position = view[written:], position + written
        if self._durable:
            os.fdatasync(self._descriptor)
        self.end = position

    def check(self) -> None:
        """Raise SegmentGone unless the name still leads to the file being written."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise SegmentGone(f"{self.path.name} was removed") from None
        if (status.st_dev, status.st_ino) != self._identity or status.st_size < self.end:
            raise SegmentGone(f"{self.path.name} was replaced")

    def finish(self) -> None:
        """Cut the zeros, make it durable and close."""
        os.ftruncate(self._descriptor, self.end)
        os.fsync(self._descriptor)
        os.close(self._descriptor)

    def _grow(self, needed: int) -> None:
        size = max(GROW_BYTES, needed)
        zeros = bytes(1 << 16)
        position = self._allocated
        while position < self.end + size:
            position += os.pwrite(self._descriptor, zeros, position)
        os.fsync(self._descriptor)
        self._allocated = position
