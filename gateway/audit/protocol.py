"""The wire between a gateway process and the auditor: small frames over a unix stream socket.

Client to auditor: `length u32 | id u32 | payload`, payload = JSON `[kind, fields]`. Auditor to client: first
`hello` (32 bytes, the log id padded with NUL), then 16 bytes per record: `id u32 | status u32 | index u64`.
All integers are little-endian.
"""

import struct

REQUEST = struct.Struct("<II")
ANSWER = struct.Struct("<IIQ")
HELLO_BYTES = 32
OK, REFUSED = 0, 1
MAX_PAYLOAD_BYTES = 64 << 10
