"""The model list: what this caller may use, and nothing about what it may not."""

import json

from gateway import errors
from gateway.domain import JsonObject
from gateway.engine.directory import EngineDirectory, Target
from gateway.guard.exchange import Exchange
from gateway.guard.routes import MODEL_PREFIX


def answer(exchange: Exchange, directory: EngineDirectory) -> bytes:
    """The body for `/v1/models` or `/v1/models/{id}`; raises the 404 Refusal for what the caller may not see."""
    principal = exchange.principal
    allowed = principal.models if principal else frozenset()
    visible = [name for name in directory.names() if allowed is None or name in allowed]
    if exchange.operation is not None and exchange.operation.name == "models.list":
        targets = [target for name in visible if (target := directory.get(name)) is not None]
        return json.dumps({"object": "list", "data": [_card(target) for target in targets]}).encode()
    exchange.model = exchange.path[len(MODEL_PREFIX) :].decode("latin-1")
    one = directory.get(exchange.model) if exchange.model in visible else None
    if one is None:
        raise errors.unknown_model()
    return json.dumps(_card(one)).encode()


def _card(target: Target) -> JsonObject:
    return {
        "id": target.name,
        "object": "model",
        "created": target.created,
        "owned_by": "cloister",
        "root": target.name,
    }
