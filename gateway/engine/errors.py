"""What can go wrong with an engine on our side of it."""


class EngineError(Exception):
    """An engine cannot be started or sealed; the message says why and what repairs it."""
