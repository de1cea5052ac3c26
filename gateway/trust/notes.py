"""C2SP signed notes with Ed25519: parsed strictly, re-encoded and compared.

Sources: c2sp.org/signed-note (format, key ids, verifier keys), c2sp.org/tlog-checkpoint (the text).
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from gateway.trust.files import create_once

_ED25519 = b"\x01"
_DASH = "\u2014 "
MAX_NOTE_BYTES = 1 << 16


class TrustError(Exception):
    """A key, a note or a signature is not acceptable; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """A named public key that checks notes."""

    name: str
    public: bytes

    @property
    def key_id(self) -> bytes:
        """The four bytes that mark its signatures."""
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:4]

    @property
    def vkey(self) -> str:
        """The verifier key as text: `name+hash+key`."""
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(_ED25519 + self.public).decode()}"

    @classmethod
    def parse(cls, text: str) -> "Verifier":
        """Read a verifier key; raises TrustError."""
        name, _, rest = text.strip().partition("+")
        try:
            raw = base64.b64decode(rest.partition("+")[2], validate=True)
        except binascii.Error:
            raise TrustError("the verifier key is not base64") from None
        verifier = cls(name, raw[1:])
        if len(raw) != 33 or raw[:1] != _ED25519 or not name or verifier.vkey != text.strip():
            raise TrustError("the verifier key is malformed")
        return verifier

    def open(self, note: bytes) -> str:
        """The text of a note that this key signed; raises TrustError."""
        if len(note) > MAX_NOTE_BYTES:
            raise TrustError("the note is too large")
        try:
            text, separator, signatures = note.decode().rpartition("\n\n")
        except UnicodeDecodeError:
            raise TrustError("the note is not UTF-8") from None
        if not separator or not signatures.endswith("\n"):
            raise TrustError("the note is malformed")
        text += "\n"
        for line in signatures.removesuffix("\n").split("\n"):
            if line == self._line(line) and self._valid(line, text):
                return text
            if line.startswith(f"{_DASH}{self.name} "):
                raise TrustError(f"the signature of {self.name} is not valid")
        raise TrustError(f"the note is not signed by {self.name}")

    def _line(self, line: str) -> str | None:
        try:
            raw = base64.b64decode(line.rpartition(" ")[2], validate=True)
        except (binascii.Error, ValueError):
            return None
        return f"{_DASH}{self.name} {base64.b64encode(raw).decode()}" if raw[:4] == self.key_id else None

    def _valid(self, line: str, text: str) -> bool:
        signature = base64.b64decode(line.rpartition(" ")[2])[4:]
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text.encode())
        except InvalidSignature:
            return False
        return True


class Signer:
    """A named private key that signs notes."""

    def __init__(self, name: str, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.verifier = Verifier(name, key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def sign(self, text: str) -> bytes:
        """The signed note of a text that ends in a newline and holds no empty line."""
        if not text.endswith("\n") or "\n\n" in text:
            raise ValueError("a note's text ends in one newline and holds no empty line")
        raw = self.verifier.key_id + self._key.sign(text.encode())
        return f"{text}\n{_DASH}{self.verifier.name} {base64.b64encode(raw).decode()}\n".encode()


def load_or_create_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file of mode 0600, made if absent; raises TrustError on anything else."""
    fresh = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    pem = path.read_bytes() if path.exists() else create_once(path, fresh)
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise TrustError(f"{path.name} is not a private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise TrustError(f"{path.name} is not an Ed25519 key")
    if path.stat().st_mode & 0o077:
        raise TrustError(f"{path.name} may be read by others: chmod 600 it")
    return key
