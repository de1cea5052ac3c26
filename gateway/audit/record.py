"""Records: single-line ASCII JSON, keys sorted, no floats, less than 64 KiB, each naming the hash of the one before.

Client-supplied text cannot break the line or forge a field: every record is built from parsed fields and
serialised here. The leaf of a record is SHA-256(0x00 || its bytes without the newline).
"""

import json
from typing import Any, NoReturn

import msgspec

from gateway.audit.errors import RecordInvalid

VERSION = 1
MAX_RECORD_BYTES = (64 << 10) - 1
OWN_FIELDS = frozenset({"boot", "kind", "mono_us", "prev", "seq", "time_us", "v"})
_ENCODER = msgspec.json.Encoder(order="sorted")


def _no_float(text: str) -> NoReturn:
    raise RecordInvalid(f"a record holds no floats, {text[:20]} is one")


_DECODER = msgspec.json.Decoder(list[tuple[str, dict[str, Any]]], float_hook=_no_float)


def decode_group(payload: bytes | memoryview) -> list[tuple[str, dict[str, Any]]]:
    """The (kind, fields) that a client asks to record; raises RecordInvalid."""
    try:
        group = _DECODER.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise RecordInvalid(f"not a group of records: {type(error).__name__}") from None
    for kind, fields in group:
        if not kind or len(kind) > 64 or not kind.isascii():
            raise RecordInvalid("the kind of a record is short ASCII text")
        if not OWN_FIELDS.isdisjoint(fields):
            raise RecordInvalid("a record's own fields are set by the auditor")
    return group


def encode(record: dict[str, Any]) -> bytes:
    """The bytes of a record without its newline; raises RecordInvalid when it is too large."""
    data = _ENCODER.encode(record)
    if not data.isascii() or b"\x7f" in data:
        data = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    if len(data) > MAX_RECORD_BYTES:
        raise RecordInvalid(f"a record is at most {MAX_RECORD_BYTES} bytes")
    return data
