"""The Merkle tree over records, RFC 6962 section 2.1: only its frontier is kept, so memory is flat."""

import hashlib
from collections.abc import Iterator

EMPTY = hashlib.sha256(b"").digest()


def leaf_hash(record: bytes) -> bytes:
    """SHA-256(0x00 || record)."""
    return hashlib.sha256(b"\x00" + record).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """An append-only tree: the roots of its full subtrees, largest first."""

    __slots__ = ("_nodes", "size")

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self.size = 0

    def append(self, leaf: bytes) -> None:
        """Add one leaf hash."""
        nodes, size = self._nodes, self.size
        while size & 1:
            leaf = node_hash(nodes.pop(), leaf)
            size >>= 1
        nodes.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """The root over all leaves so far."""
        nodes: Iterator[bytes] = reversed(self._nodes)
        root = next(nodes, EMPTY)
        for node in nodes:
            root = node_hash(node, root)
        return root
