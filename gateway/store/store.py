"""The store: opens a database, brings its schema up to date, and hands out transactions.

Every infrastructure fault is a StoreError, so that nobody mistakes it for a missing row. SQLite runs in WAL
mode with full synchronisation; its file and folder are the owner's only. Migrations run in a process of
their own, so that no process that serves carries the migration tool in memory.
"""

import asyncio
import os
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event, inspect, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

SCHEMA = "0001"  # the newest migration; their names sort in the order in which they are applied
SQLITE = "sqlite:///"


class StoreError(Exception):
    """The database cannot be used now; the message holds no data."""


class Store:
    """One database."""

    def __init__(self, engine: AsyncEngine, file: Path | None) -> None:
        self._engine, self.file = engine, file
        self._watch: sqlite3.Connection | None = None
        self._watched: tuple[int, ...] = ()

    @classmethod
    async def open(cls, url: str, home: Path) -> "Store":
        """Connect and migrate; raises StoreError."""
        file: Path | None = None
        if url.startswith(SQLITE):
            file = home / url.removeprefix(SQLITE)
            try:
                file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
            except OSError as error:
                raise StoreError(f"the database file cannot be opened: {error.strerror}") from error
            url = f"sqlite+aiosqlite:///{file}"
        engine = create_async_engine(url, pool_pre_ping=file is None)
        if file is not None:
            event.listen(engine.sync_engine, "connect", _set_pragmas)
        store = cls(engine, file)
        try:
            if await store._schema() < SCHEMA:
                await _migrate(url)
        except StoreError:
            await engine.dispose()
            raise
        return store

    def unchanged(self) -> bool:
        """Whether nothing was committed since the last call; a cheap exact answer for SQLite, else always False.

        Source: SQLite's documentation of `PRAGMA data_version`.
        """
        if self.file is None:
            return False
        try:
            status = self.file.stat()
            identity = (status.st_dev, status.st_ino)
            if self._watch is None or identity != self._watched[:2]:
                self._forget_watch()
                self._watch = sqlite3.connect(f"file:{self.file}?mode=ro", uri=True, timeout=0, isolation_level=None)
            version = int(self._watch.execute("PRAGMA data_version").fetchone()[0])
        except (OSError, sqlite3.Error):
            self._forget_watch()
            return False
        before, self._watched = self._watched, (*identity, version)
        return before == self._watched

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """One transaction, committed at the end of the block, rolled back on any error."""
        try:
            async with self._engine.begin() as connection:
                yield connection
        except (SQLAlchemyError, OSError) as error:
            raise StoreError(f"the database failed ({type(error).__name__})") from error

    async def close(self) -> None:
        """Close all connections."""
        self._forget_watch()
        await self._engine.dispose()

    def _forget_watch(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._watch, self._watched = None, ()

    async def _schema(self) -> str:
        """The migration the database is at; empty for a new one."""
        async with self.transaction() as connection:
            if not await connection.run_sync(lambda sync: inspect(sync).has_table("alembic_version")):
                return ""
            return str((await connection.execute(text("SELECT version_num FROM alembic_version"))).scalar() or "")


def _set_pragmas(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


async def _migrate(url: str) -> None:
    """Run `gateway.store.schema`; the URL may hold a password, so it goes through standard input."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.store.schema",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, complaint = await process.communicate(url.encode())
    if process.returncode:
        raise StoreError(f"the database cannot be migrated ({complaint.decode(errors='replace').strip()[-200:]})")
