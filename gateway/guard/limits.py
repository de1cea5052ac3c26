"""Limits: tokens and slots are reserved at admission and settled at the end."""

from gateway.guard.exchange import Exchange


def reserve(exchange: Exchange) -> None:
    """No limit is enforced yet: every request is admitted."""


def settle(exchange: Exchange) -> None:
    """Nothing was reserved, nothing is to be settled."""
