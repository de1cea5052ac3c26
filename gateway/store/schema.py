"""Brings a database's schema up to date: `python -m gateway.store.schema`, its URL on standard input.

Two that migrate at once wait for each other. A schema made by a newer release is left as it is: it still
serves this one. Complaints hold no data and no URL.
"""

import asyncio
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

MIGRATIONS = Path(__file__).parent / "migrations"
SQLITE_FILE = "sqlite+aiosqlite:///"


def migrations() -> ScriptDirectory:
    """All migrations of this release."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return ScriptDirectory.from_config(config)


async def migrate(url: str) -> None:
    """Apply every migration that the database lacks, in one transaction."""
    engine = create_async_engine(url)
    try:
        with _one_at_a_time(url):
            async with engine.begin() as connection:
                await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


@contextmanager
def _one_at_a_time(url: str) -> Iterator[None]:
    """A lock file beside a SQLite database; PostgreSQL has its own lock in `_upgrade`."""
    if not url.startswith(SQLITE_FILE):
        yield
        return
    file = Path(url.removeprefix(SQLITE_FILE))
    descriptor = os.open(file.with_name(f".{file.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7252013)")
    current = MigrationContext.configure(connection).get_current_revision()
    known = migrations()
    if current == known.get_current_head():
        return
    if current is None or current in {script.revision for script in known.walk_revisions()}:
        command.upgrade(config, "head")


def main() -> int:
    """Exit codes: 0 up to date, 3 the database cannot be used."""
    try:
        asyncio.run(migrate(sys.stdin.read().strip()))
    except (SQLAlchemyError, OSError) as error:
        print(type(error).__name__, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
