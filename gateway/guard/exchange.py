"""One request on its way through the guard: what each stage has found out so far.

The stages fill it in order; nothing is read before the stage that sets it. It holds the prompt (`document`)
only until the engine has it.
"""

from typing import Any, Protocol

from gateway.domain import NO_USAGE, PERMITTED, Decision, JsonObject, Operation, Principal, Receipt, Usage
from gateway.engine.directory import Target


class Responder(Protocol):
    """How an answer is written, piece by piece, to whoever asked."""

    disconnected: bool
    owner: Any

    @property
    def started(self) -> bool:
        """Whether any byte of the response was written."""

    def begin(self, status: int, headers: bytes, *, chunked: bool, payload: bytes = b"") -> None:
        """Write the head and a first payload; `headers` are complete lines."""

    def write(self, payload: bytes) -> None:
        """Write one piece of the body."""

    def finish(self, payload: bytes = b"") -> None:
        """Write the last piece and end cleanly."""

    def end(self) -> None:
        """The response is complete as begun."""

    def abort(self, payload: bytes = b"") -> None:
        """Write a last piece and close without a clean end."""


class Exchange:
    """The state of one request, from its first byte to its last record."""

    __slots__ = (
        "body_bytes",
        "decision",
        "document",
        "method",
        "model",
        "operation",
        "outcome",
        "path",
        "payload",
        "principal",
        "receipt",
        "request_id",
        "responder",
        "scope",
        "source",
        "started_s",
        "status",
        "stream",
        "strip_usage",
        "target",
        "token",
        "usage",
    )

    def __init__(self, scope: dict[str, Any], responder: Responder, request_id: str, started_s: float) -> None:
        self.scope = scope
        self.responder = responder
        self.request_id = request_id
        self.started_s = started_s
        self.method: str = scope["method"]
        self.path: bytes = scope["raw_path"]
        client = scope["client"]
        self.source: str = client[0] if client else "unix"
        self.operation: Operation | None = None
        self.token: str | None = None
        self.principal: Principal | None = None
        self.document: JsonObject = {}
        self.payload = b""
        self.body_bytes = 0
        self.model = ""
        self.target: Target | None = None
        self.decision: Decision = PERMITTED
        self.stream = False
        self.strip_usage = False
        self.receipt: Receipt | None = None
        self.usage: Usage = NO_USAGE
        self.status = 0
        self.outcome = ""

    @property
    def dialect(self) -> str:
        """Whose error shape this request is answered in."""
        return self.operation.dialect if self.operation else "openai"
