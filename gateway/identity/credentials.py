"""API keys: `clo_<env>_<id>_<secret><crc>`, base62 with a CRC-32 checksum; only a MAC of the secret is kept.

A mistyped key is recognised without a look-up; a leaked one is found by pattern and checksum.
"""

import hashlib
import hmac
import re
import secrets
import zlib
from dataclasses import dataclass
from pathlib import Path

from gateway.trust.files import create_once

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
ID_CHARS, SECRET_CHARS, CRC_CHARS = 10, 32, 6
PATTERN = re.compile(
    rf"clo_([a-z0-9]{{2,8}})_([0-9A-Za-z]{{{ID_CHARS}}})_([0-9A-Za-z]{{{SECRET_CHARS}}})([0-9A-Za-z]{{{CRC_CHARS}}})"
)
PEPPER_BYTES = 32


class CredentialError(Exception):
    """A credential is not acceptable; `reason` is one of a few fixed words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class KeyParts:
    """A well-formed key, taken apart."""

    id: str
    secret: str


def generate(environment: str) -> tuple[str, KeyParts]:
    """A fresh key and its parts."""
    parts = KeyParts(_random(ID_CHARS), _random(SECRET_CHARS))
    body = f"clo_{environment}_{parts.id}_{parts.secret}"
    return body + checksum(body), parts


def parse(text: str) -> KeyParts:
    """Take a key apart; raises CredentialError `malformed` or `bad_checksum`."""
    match = PATTERN.fullmatch(text)
    if match is None:
        raise CredentialError("malformed")
    if checksum(text[:-CRC_CHARS]) != match[4]:
        raise CredentialError("bad_checksum")
    return KeyParts(match[2], match[3])


def checksum(body: str) -> str:
    """CRC-32 of everything before it, as six base62 digits."""
    value, digits = zlib.crc32(body.encode("ascii")), ""
    for _ in range(CRC_CHARS):
        value, digit = divmod(value, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits


def mac(pepper: bytes, parts: KeyParts) -> bytes:
    """What is stored of a key: HMAC-SHA-256 under the pepper."""
    return hmac.digest(pepper, f"{parts.id}:{parts.secret}".encode(), hashlib.sha256)


def load_pepper(path: Path) -> bytes:
    """The site's pepper, made on first use, readable by the owner only."""
    return path.read_bytes() if path.exists() else create_once(path, secrets.token_bytes(PEPPER_BYTES))


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))
