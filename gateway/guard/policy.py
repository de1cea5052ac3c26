"""Policy: whether this principal may do this with this model."""

from gateway import errors
from gateway.guard.exchange import Exchange


def decide(exchange: Exchange) -> None:
    """Enforce the scopes of the credential; a model outside them does not exist for the caller."""
    principal, operation = exchange.principal, exchange.operation
    if principal is None or operation is None:
        raise errors.our_bug()
    if principal.operations is not None and operation.name not in principal.operations:
        raise errors.forbidden("policy_denied", f"This key may not use {operation.name}.")
    if principal.models is not None and exchange.model not in principal.models:
        raise errors.unknown_model()
