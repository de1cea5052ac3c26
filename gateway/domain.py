"""The nouns every room shares: frozen values without behaviour or I/O.

Rules: nothing here imports another room; nothing here holds a prompt, an answer or a secret.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Principal:
    """An authenticated caller and what its credential allows.

    Attributes:
        id: public identifier of the credential (the `<id>` part of an API key).
        kind: how it proved itself: `api_key`; later `jwt` and `mtls`.
        tenant: unit of isolation and quota.
        name: the name the operator gave it.
        models: engine names it may use; `None` means all.
        operations: operations it may ask for; `None` means all.
        label: its label, the lowest by default.
        limits: named ceilings, e.g. `{"rpm": 60}`; absent means unlimited.
    """

    id: str
    kind: str
    tenant: str
    name: str
    models: frozenset[str] | None = None
    operations: frozenset[str] | None = None
    label: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Operation:
    """What a request asks for, fixed by its route.

    Attributes:
        name: e.g. `chat.completions.create`.
        engine_path: path at the engine.
        dialect: whose error shape and stream grammar apply: `openai`, `responses` or `anthropic`.
        streams: whether `stream: true` means something here.
    """

    name: str
    engine_path: bytes
    dialect: str = "openai"
    streams: bool = False


class Usage(NamedTuple):
    """Tokens the engine says a request used; `None` where it did not say."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class Decision:
    """A policy decision: permitted or not, why, and the duties attached to a permit."""

    permitted: bool
    reasons: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()


PERMITTED = Decision(permitted=True)


class Receipt(NamedTuple):
    """Locator of a durable audit record: the log it is in and its leaf index."""

    log_id: str
    leaf: int

    def __str__(self) -> str:
        return f"{self.log_id}/{self.leaf}"
