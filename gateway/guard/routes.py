"""The route table: everything that is served, by exact raw path; all else is refused.

A path is matched as the bytes that came in: escapes, doubled slashes and dot segments match nothing.
"""

from dataclasses import dataclass

from gateway.domain import Operation

MODELS = b"/v1/models"
MODEL_PREFIX = b"/v1/models/"


@dataclass(frozen=True, slots=True)
class Route:
    """What a path serves: one operation by one method."""

    method: str
    operation: Operation


def _post(name: str, path: bytes, dialect: str = "openai", *, streams: bool = False) -> Route:
    return Route("POST", Operation(name, path, dialect, streams))


LIST_MODELS = Route("GET", Operation("models.list", MODELS))
GET_MODEL = Route("GET", Operation("models.retrieve", MODELS))

_RERANK = _post("rerank.create", b"/v1/rerank")
_SCORE = _post("score.create", b"/v1/score")
_TOKENIZE = _post("tokenize.create", b"/tokenize")
_DETOKENIZE = _post("detokenize.create", b"/detokenize")

ROUTES: dict[bytes, Route] = {
    MODELS: LIST_MODELS,
    b"/v1/chat/completions": _post("chat.completions.create", b"/v1/chat/completions", streams=True),
    b"/v1/completions": _post("completions.create", b"/v1/completions", streams=True),
    b"/v1/embeddings": _post("embeddings.create", b"/v1/embeddings"),
    b"/v1/responses": _post("responses.create", b"/v1/responses", "responses", streams=True),
    b"/v1/messages": _post("messages.create", b"/v1/messages", "anthropic", streams=True),
    b"/v1/messages/count_tokens": _post("messages.count_tokens", b"/v1/messages/count_tokens", "anthropic"),
    b"/v1/rerank": _RERANK,
    b"/rerank": _RERANK,
    b"/v1/score": _SCORE,
    b"/score": _SCORE,
    b"/v1/tokenize": _TOKENIZE,
    b"/tokenize": _TOKENIZE,
    b"/v1/detokenize": _DETOKENIZE,
    b"/detokenize": _DETOKENIZE,
}

OPERATIONS = frozenset(route.operation.name for route in (*ROUTES.values(), GET_MODEL))


def find(raw_path: bytes) -> Route | None:
    """The route of a raw path, or `None`: deny by default."""
    route = ROUTES.get(raw_path)
    if route is None and raw_path.startswith(MODEL_PREFIX) and len(raw_path) > len(MODEL_PREFIX):
        return GET_MODEL
    return route


def dialect_of(raw_path: bytes) -> str:
    """Whose error shape a path speaks, also where it is not served."""
    return "anthropic" if raw_path == b"/v1/messages" or raw_path.startswith(b"/v1/messages/") else "openai"
