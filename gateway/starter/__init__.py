"""The starter model: what `make run` serves before an operator brings a model of their own.

Rules: importing this module needs no torch; the digest ships with the code, so that a changed file is seen.
"""

import hashlib
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
_DOMAIN = b"cloister-model-v1\n"
_READ_BYTES = 1 << 20


def model_digest(path: Path) -> str:
    """Digest of every file of a model directory, with flat memory: `sha256:<hex>`.

    SHA-256 over a domain line and, for each file sorted by its POSIX name relative to `path`, the line
    `<sha256 of the file>  <name>`. Raises OSError when a file cannot be read.
    """
    total = hashlib.sha256(_DOMAIN)
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file()):
        inner = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                inner.update(block)
        total.update(f"{inner.hexdigest()}  {name}\n".encode())
    return f"sha256:{total.hexdigest()}"
