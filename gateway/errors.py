"""Every HTTP refusal: one class, one catalogue, and its renderings in each API's own form.

Rules: a message says what to do and never repeats a credential, a prompt or an internal path; `reason` is
a metric label, so it comes from this file and is bounded. Source: OpenAI and Anthropic API error formats.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

INVALID, AUTH, PERMISSION = "invalid_request_error", "authentication_error", "permission_error"
NOT_FOUND, RATE, QUOTA = "not_found_error", "rate_limit_error", "insufficient_quota"
SERVER, ENGINE, UNAVAILABLE = "server_error", "engine_error", "service_unavailable"

_ANTHROPIC_TYPES = {
    QUOTA: "rate_limit_error",
    SERVER: "api_error",
    ENGINE: "api_error",
    UNAVAILABLE: "overloaded_error",
}
_NO_RETRY = {"x-should-retry": "false"}


@dataclass(eq=False)
class Refusal(Exception):
    """A request is answered with this error instead of being served.

    Attributes:
        status: HTTP status.
        type: OpenAI error type.
        reason: bounded identifier: error `code`, metric label and audit reason.
        message: what happened and what the caller can do.
        param: the offending field, where there is one.
        headers: extra response headers (`Retry-After`, `allow`, …).
        close: whether the connection must be closed afterwards (the input can no longer be framed).
        detail: a bounded word for log and metrics that the caller is not told.
    """

    status: int
    type: str
    reason: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    close: bool = False
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status} {self.reason}: {self.message}"


def bad_request(reason: str, message: str, *, param: str | None = None, close: bool = False) -> Refusal:
    """400: the body, the headers or the request line cannot be accepted as they are."""
    return Refusal(400, INVALID, reason, message, param, close=close)


def too_slow() -> Refusal:
    """408: the request was not received within its deadline."""
    return Refusal(408, INVALID, "request_timeout", "The request was not received in time. Send it again.", close=True)


def too_large(limit_bytes: int) -> Refusal:
    """413: the body is larger than this gateway reads."""
    return Refusal(413, INVALID, "body_too_large", f"The body is larger than {limit_bytes} bytes.", close=True)


def headers_too_large(message: str = "The request line or headers are too large.") -> Refusal:
    """431: too many header fields or bytes."""
    return Refusal(431, INVALID, "headers_too_large", message, close=True)


def unauthenticated(reason: str = "invalid_api_key", message: str | None = None) -> Refusal:
    """401: there is no acceptable credential."""
    text = (
        message or "The API key is missing, malformed, unknown, expired or revoked. Ask your operator for a valid key."
    )
    return Refusal(401, AUTH, reason, text, headers={"www-authenticate": "Bearer"})


def forbidden(reason: str, message: str, *, param: str | None = None) -> Refusal:
    """403: the caller is known and may not do this."""
    return Refusal(403, PERMISSION, reason, message, param)


def unknown_route() -> Refusal:
    """404: this path is not served; everything not in the route table is refused."""
    return Refusal(
        404, NOT_FOUND, "unknown_route", "This path is not served. See the API reference for the paths that are."
    )


def unknown_model() -> Refusal:
    """404: the model does not exist, or this caller may not see it: the two answers are the same."""
    return Refusal(
        404, NOT_FOUND, "model_not_found", "The model does not exist. GET /v1/models lists those you may use.", "model"
    )


def wrong_method(allow: str) -> Refusal:
    """405: the path exists, the method does not."""
    return Refusal(405, NOT_FOUND, "method_not_allowed", f"Use {allow} on this path.", headers={"allow": allow})


def engine_failed(reason: str = "engine_failed", message: str = "The engine failed while answering.") -> Refusal:
    """502: the engine died, or what it answered cannot be passed on."""
    return Refusal(502, ENGINE, reason, message, headers=_NO_RETRY)


def engine_timed_out() -> Refusal:
    """504: the engine stayed silent for too long."""
    return Refusal(504, ENGINE, "engine_timeout", "The engine did not answer in time.", headers=_NO_RETRY)


def unavailable(reason: str, message: str, retry_after_s: int = 1) -> Refusal:
    """503: not now; the caller may retry after `retry_after_s` seconds."""
    return Refusal(503, UNAVAILABLE, reason, message, headers={"retry-after": str(retry_after_s)})


def audit_unavailable() -> Refusal:
    """503: no durable record, no service."""
    return unavailable(
        "audit_unavailable", "The audit log cannot be written, so nothing is served. Try again shortly.", 2
    )


def engine_loading() -> Refusal:
    """503: the engine is not ready yet."""
    return unavailable("engine_loading", "The engine for this model is starting. Try again shortly.", 5)


def draining() -> Refusal:
    """503: this gateway is going down and takes no new requests."""
    return unavailable("draining", "This gateway is shutting down. Try again shortly.", 2)


def our_bug() -> Refusal:
    """500: an error of ours; the request id leads to the log entry."""
    return Refusal(
        500, SERVER, "internal_error", "The gateway failed. Give your operator the request id.", headers=_NO_RETRY
    )


def body(refusal: Refusal, dialect: str, request_id: str) -> bytes:
    """The JSON body of a refusal in the error shape of `dialect`."""
    return json.dumps(_document(refusal, dialect, request_id)).encode()


def stream_event(refusal: Refusal, dialect: str, request_id: str, sequence: int = 0) -> bytes:
    """The one error event that ends a broken stream in the API's own form; no terminal event follows it."""
    document = _document(refusal, dialect, request_id)
    if dialect == "anthropic":
        return b"event: error\ndata: " + json.dumps(document).encode() + b"\n\n"
    if dialect == "responses":
        failed = {
            "type": "response.failed",
            "sequence_number": sequence,
            "response": {
                "id": request_id,
                "object": "response",
                "status": "failed",
                "error": {"code": "server_error", "message": refusal.message},
                "output": [],
            },
        }
        return b"event: response.failed\ndata: " + json.dumps(failed).encode() + b"\n\n"
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _document(refusal: Refusal, dialect: str, request_id: str) -> dict[str, object]:
    if dialect == "anthropic":
        kind = _ANTHROPIC_TYPES.get(refusal.type, refusal.type)
        if refusal.status == 413:
            kind = "request_too_large"
        return {"type": "error", "error": {"type": kind, "message": refusal.message}, "request_id": request_id}
    error = {"message": refusal.message, "type": refusal.type, "param": refusal.param, "code": refusal.reason}
    return {"error": error}
