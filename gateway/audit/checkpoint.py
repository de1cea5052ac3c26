"""Checkpoints: the signed size and root of the log. Source: c2sp.org/tlog-checkpoint."""

import base64
import binascii
import hashlib
from dataclasses import dataclass

from gateway.trust.notes import Signer, TrustError, Verifier

CHECKPOINT_FILE = "checkpoint"
KEY_FILE = "log.vkey"
PINNED_FILE = "audit-log.vkey"  # beside the private key, outside the log: what this host's log is checked against


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was signed: the log's origin, its size in records, its Merkle root and how durable it is."""

    origin: str
    size: int
    root: bytes
    durability: str

    def text(self) -> str:
        """The note's text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\ndurability {self.durability}\n"

    def sign(self, signer: Signer) -> bytes:
        """The signed note."""
        return signer.sign(self.text())


def parse(note: bytes, verifier: Verifier) -> Checkpoint:
    """Check the signature, then read strictly; raises TrustError."""
    text = verifier.open(note)
    lines = text.split("\n")
    if len(lines) != 5 or not lines[1].isascii() or not lines[1].isdigit() or len(lines[1]) > 18:
        raise TrustError("the checkpoint is malformed")
    try:
        root = base64.b64decode(lines[2], validate=True)
    except binascii.Error:
        raise TrustError("the checkpoint's root is not base64") from None
    checkpoint = Checkpoint(lines[0], int(lines[1]), root, lines[3].removeprefix("durability "))
    if checkpoint.text() != text or len(root) != hashlib.sha256().digest_size:
        raise TrustError("the checkpoint is malformed")
    if checkpoint.origin != verifier.name:
        raise TrustError("the checkpoint belongs to another log")
    return checkpoint


def log_id(public_key: bytes) -> str:
    """The log's origin and id, from its public key: `clo-<16 hex>`."""
    return "clo-" + hashlib.sha256(public_key).hexdigest()[:16]
