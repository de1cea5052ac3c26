"""Detect: inbound text passes the detectors."""

from gateway.guard.exchange import Exchange


def inspect(exchange: Exchange) -> None:
    """No detector is configured yet: every text passes."""
