"""The wire between a gateway process and the auditor: groups of records over a unix stream socket.

First the auditor says hello: 32 bytes, the log id padded with NUL. Then the client sends one group at a time,
`length u32 | payload`, payload = a JSON array of `[kind, fields]`; the auditor answers each group with
`count u32` and one `index u64` per record in its order, all ones for a record it refused. Little-endian.
"""

import struct

LENGTH = struct.Struct("<I")
HELLO_BYTES = 32
INDEX_BYTES = 8
REFUSED = (1 << 64) - 1
MAX_RECORD_PAYLOAD_BYTES = 64 << 10
MAX_GROUP_BYTES = 4 << 20


def pack_answer(indices: list[int]) -> bytes:
    """One answer to one group."""
    return struct.pack(f"<I{len(indices)}Q", len(indices), *indices)


def unpack_answer(data: bytes) -> tuple[int, ...] | None:
    """The indices of one whole answer; `None` while it is incomplete."""
    if len(data) < LENGTH.size:
        return None
    (count,) = LENGTH.unpack_from(data)
    if len(data) < LENGTH.size + INDEX_BYTES * count:
        return None
    return struct.unpack_from(f"<{count}Q", data, LENGTH.size)
