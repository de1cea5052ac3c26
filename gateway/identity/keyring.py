"""The keys a gateway worker knows: looked up in memory, refreshed from the store, never stale for long.

A key unknown here is looked up in the store once per request, so a new key works on every worker the moment it is
made; a revocation is seen at the next refresh. A fault of the store is never a wrong credential.
"""

import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, select

from gateway.domain import Principal
from gateway.identity import credentials
from gateway.identity.credentials import CredentialError, KeyParts
from gateway.store.store import Store, StoreError
from gateway.store.tables import api_key

STALE_S = 30.0
LOOKUPS_PER_S = 200
CACHE_SIZE = 4096


class UnknownKey(Exception):
    """The key is well-formed and not in memory: fetch it, then ask again."""


class IdentityUnavailable(Exception):
    """Keys cannot be judged now, because the store cannot be read."""


@dataclass(slots=True)
class _Known:
    mac: bytes
    principal: Principal
    expires_s: int | None
    revoked: bool


class KeyRing:
    """All keys of the store that this worker has seen."""

    def __init__(
        self,
        store: Store,
        pepper: bytes,
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._pepper, self._now, self._monotonic = store, pepper, now, monotonic
        self._known: dict[str, _Known] = {}
        self._verified: dict[str, _Known] = {}
        self._revision = -1
        self._fresh_at = monotonic()
        self._complete = False  # whether all that was committed has been read
        self._window, self._lookups = 0, 0

    def authenticate(self, token: str) -> Principal:
        """The principal of a key; raises CredentialError, UnknownKey or IdentityUnavailable."""
        if self._monotonic() - self._fresh_at > STALE_S:
            raise IdentityUnavailable
        known = self._verified.get(token)
        if known is None:
            parts = credentials.parse(token)
            known = self._known.get(parts.id)
            if known is None:
                raise UnknownKey
            self._check_secret(known, parts)
            if len(self._verified) >= CACHE_SIZE:
                self._verified.clear()
            self._verified[token] = known
        if known.revoked:
            raise CredentialError("revoked")
        if known.expires_s is not None and self._now() >= known.expires_s:
            raise CredentialError("expired")
        return known.principal

    async def fetch(self, token: str) -> Principal:
        """Look an unknown key up in the store, then authenticate it; raises as `authenticate` does."""
        parts = credentials.parse(token)
        window = int(self._monotonic())
        if window != self._window:
            self._window, self._lookups = window, 0
        self._lookups += 1
        if self._lookups > LOOKUPS_PER_S:
            raise IdentityUnavailable
        try:
            async with self._store.transaction() as connection:
                row = (await connection.execute(select(api_key).where(api_key.c.id == parts.id))).first()
        except StoreError as error:
            raise IdentityUnavailable from error
        if row is None:
            raise CredentialError("unknown")
        self._learn(row)
        return self.authenticate(token)

    async def refresh(self) -> None:
        """Learn what has changed since the last refresh; a fault leaves the keys as they are, for STALE_S."""
        began = self._monotonic()
        if self._store.unchanged() and self._complete:
            self._fresh_at = began
            return
        self._complete = False
        try:
            async with self._store.transaction() as connection:
                rows = (await connection.execute(select(api_key).where(api_key.c.revision > self._revision))).all()
        except StoreError:
            return
        for row in rows:
            self._learn(row)
        if rows:
            self._revision = max(row.revision for row in rows)
        self._fresh_at = began
        self._complete = True

    def _learn(self, row: Row[Any]) -> None:
        principal = Principal(
            id=row.id,
            kind="api_key",
            tenant=row.tenant,
            name=row.name,
            models=None if row.models is None else frozenset(row.models),
            operations=None if row.operations is None else frozenset(row.operations),
            label=row.label,
            limits=dict(row.limits),
        )
        old = self._known.get(row.id)
        self._known[row.id] = _Known(bytes(row.mac), principal, row.expires_s, row.revoked_s is not None)
        if old is not None:
            self._verified = {token: known for token, known in self._verified.items() if known is not old}

    def _check_secret(self, known: _Known, parts: KeyParts) -> None:
        if not hmac.compare_digest(known.mac, credentials.mac(self._pepper, parts)):
            raise CredentialError("unknown")
