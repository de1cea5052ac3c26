"""What can go wrong with the audit log."""


class AuditUnavailable(Exception):
    """A record cannot become durable now; nothing may be served."""


class AuditDamaged(Exception):
    """The log on disk contradicts what was signed; the writer does not start. The message names the record."""


class RecordInvalid(Exception):
    """A record is not acceptable; the message says why."""
