"""The tables, as SQLAlchemy Core sees them; migrations make them."""

from sqlalchemy import JSON, BigInteger, Column, Integer, LargeBinary, MetaData, String, Table

metadata = MetaData()

api_key = Table(
    "api_key",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", String(128), nullable=False),
    Column("mac", LargeBinary(32), nullable=False),
    Column("created_s", BigInteger, nullable=False),
    Column("expires_s", BigInteger),
    Column("revoked_s", BigInteger),
    Column("models", JSON),
    Column("operations", JSON),
    Column("label", String(128), nullable=False),
    Column("limits", JSON, nullable=False),
    Column("revision", BigInteger, nullable=False, index=True),
)

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("kind", String(64), nullable=False),
    Column("fields", JSON, nullable=False),
)

counter = Table(
    "counter",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
