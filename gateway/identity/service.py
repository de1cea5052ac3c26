"""Managing keys: every change and its audit record are committed together.

The record waits in the outbox until the auditor has it; it is delivered at least once, its `outbox` number
tells a repetition. No secret is stored or recorded.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.domain import JsonObject
from gateway.identity import credentials
from gateway.store.store import Store
from gateway.store.tables import api_key, counter, outbox

OUTBOX_BATCH = 100


class NoSuchKey(Exception):
    """There is no key with this id."""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """What a new key may do."""

    tenant: str
    name: str
    models: Sequence[str] | None = None
    operations: Sequence[str] | None = None
    expires_s: int | None = None
    label: str = ""
    limits: JsonObject = field(default_factory=dict)


class KeyService:
    """Creates, shows and ends keys."""

    def __init__(self, store: Store, pepper: bytes, environment: str, now: Callable[[], float] = time.time) -> None:
        self._store, self._pepper, self._environment, self._now = store, pepper, environment, now

    async def create(self, spec: KeySpec) -> tuple[str, str]:
        """Make a key; returns its id and the key itself, which is shown only now."""
        text, parts = credentials.generate(self._environment)
        async with self._store.transaction() as connection:
            await self._insert(connection, parts, spec)
            await _record(connection, "key.create", _public(parts.id, spec))
        return parts.id, text

    async def list(self) -> list[JsonObject]:
        """All keys, oldest first, without secrets."""
        async with self._store.transaction() as connection:
            rows = (await connection.execute(select(api_key).order_by(api_key.c.created_s, api_key.c.id))).all()
        return [self._view(row) for row in rows]

    async def show(self, key_id: str) -> JsonObject:
        """One key; raises NoSuchKey."""
        async with self._store.transaction() as connection:
            return self._view(await _row(connection, key_id))

    async def revoke(self, key_id: str) -> None:
        """End a key for good; raises NoSuchKey. Revoking twice changes nothing."""
        async with self._store.transaction() as connection:
            row = await _row(connection, key_id)
            if row.revoked_s is None:
                await self._end(connection, key_id)
                await _record(connection, "key.revoke", {"key": key_id, "tenant": row.tenant})

    async def rotate(self, key_id: str) -> tuple[str, str]:
        """Replace a key by a new one with the same scopes; the old one ends at once. Raises NoSuchKey."""
        text, parts = credentials.generate(self._environment)
        async with self._store.transaction() as connection:
            row = await _row(connection, key_id)
            spec = KeySpec(row.tenant, row.name, row.models, row.operations, row.expires_s, row.label, row.limits)
            await self._insert(connection, parts, spec)
            await self._end(connection, key_id)
            await _record(connection, "key.rotate", {**_public(parts.id, spec), "replaces": key_id})
        return parts.id, text

    async def _insert(self, connection: AsyncConnection, parts: credentials.KeyParts, spec: KeySpec) -> None:
        await connection.execute(
            insert(api_key).values(
                id=parts.id,
                tenant=spec.tenant,
                name=spec.name,
                mac=credentials.mac(self._pepper, parts),
                created_s=int(self._now()),
                expires_s=spec.expires_s,
                models=None if spec.models is None else list(spec.models),
                operations=None if spec.operations is None else list(spec.operations),
                label=spec.label,
                limits=dict(spec.limits),
                revision=await _next_revision(connection),
            )
        )

    async def _end(self, connection: AsyncConnection, key_id: str) -> None:
        revision = await _next_revision(connection)
        change = update(api_key).where(api_key.c.id == key_id)
        await connection.execute(change.values(revoked_s=int(self._now()), revision=revision))

    def _view(self, row: Row[Any]) -> JsonObject:
        expired = row.expires_s is not None and self._now() >= row.expires_s
        return {
            "id": row.id,
            "name": row.name,
            "tenant": row.tenant,
            "state": "revoked" if row.revoked_s is not None else "expired" if expired else "active",
            "created": row.created_s,
            "expires": row.expires_s,
            "models": row.models,
            "operations": row.operations,
            "label": row.label,
            "limits": row.limits,
        }


async def pump_outbox(store: Store, append: Callable[[str, JsonObject], "asyncio.Future[tuple[str, int]]"]) -> int:
    """Hand waiting records to the auditor in order; returns how many became durable. Raises what `append` does."""
    async with store.transaction() as connection:
        rows = (await connection.execute(select(outbox).order_by(outbox.c.id).limit(OUTBOX_BATCH))).all()
    for row in rows:
        await append(row.kind, {**row.fields, "outbox": row.id})
    if rows:
        async with store.transaction() as connection:
            await connection.execute(delete(outbox).where(outbox.c.id.in_([row.id for row in rows])))
    return len(rows)


async def _next_revision(connection: AsyncConnection) -> int:
    change = update(counter).where(counter.c.name == "revision").values(value=counter.c.value + 1)
    return int((await connection.execute(change.returning(counter.c.value))).scalar_one())


async def _record(connection: AsyncConnection, kind: str, fields: JsonObject) -> None:
    await connection.execute(insert(outbox).values(kind=kind, fields=fields))


async def _row(connection: AsyncConnection, key_id: str) -> Row[Any]:
    row = (await connection.execute(select(api_key).where(api_key.c.id == key_id))).first()
    if row is None:
        raise NoSuchKey(key_id)
    return row


def _public(key_id: str, spec: KeySpec) -> JsonObject:
    return {
        "expires": spec.expires_s,
        "key": key_id,
        "label": spec.label,
        "limits": dict(spec.limits),
        "models": None if spec.models is None else list(spec.models),
        "name": spec.name,
        "operations": None if spec.operations is None else list(spec.operations),
        "tenant": spec.tenant,
    }
