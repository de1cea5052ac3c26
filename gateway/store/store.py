"""The store: opens a database, brings its schema up to date, and hands out transactions.

Every infrastructure fault is a StoreError, so that nobody mistakes it for a missing row. SQLite runs in WAL
mode with full synchronisation; its file and folder are the owner's only.
"""

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

MIGRATIONS = Path(__file__).parent / "migrations"
SQLITE = "sqlite:///"


class StoreError(Exception):
    """The database cannot be used now; the message holds no data."""


class Store:
    """One database."""

    def __init__(self, engine: AsyncEngine, file: Path | None) -> None:
        self._engine, self.file = engine, file

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
            with _MigrationLock(file):
                async with engine.begin() as connection:
                    await connection.run_sync(_migrate)
        except (SQLAlchemyError, OSError) as error:
            await engine.dispose()
            raise StoreError(f"the database cannot be opened ({type(error).__name__})") from error
        return store

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
        await self._engine.dispose()


class _MigrationLock:
    """Two first openers must not migrate at once; PostgreSQL has its own lock in `_migrate`."""

    def __init__(self, file: Path | None) -> None:
        self._path = file.with_name(f".{file.name}.lock") if file else None
        self._descriptor = -1

    def __enter__(self) -> None:
        if self._path is not None:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def _set_pragmas(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _migrate(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7252013)")
    current = MigrationContext.configure(connection).get_current_revision()
    known = ScriptDirectory.from_config(config)
    head = known.get_current_head()
    if current == head or (current is not None and current not in {s.revision for s in known.walk_revisions()}):
        return  # up to date, or made by a newer release: its schema still serves this one
    command.upgrade(config, "head")
