"""Keys, the audit outbox and the revision counter."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the first tables."""
    op.create_table(
        "api_key",
        sa.Column("id", sa.String(16), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("mac", sa.LargeBinary(32), nullable=False),
        sa.Column("created_s", sa.BigInteger, nullable=False),
        sa.Column("expires_s", sa.BigInteger),
        sa.Column("revoked_s", sa.BigInteger),
        sa.Column("models", sa.JSON),
        sa.Column("operations", sa.JSON),
        sa.Column("label", sa.String(128), nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("revision", sa.BigInteger, nullable=False, index=True),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("fields", sa.JSON, nullable=False),
    )
    counter = op.create_table(
        "counter",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(counter, [{"name": "revision", "value": 0}])


def downgrade() -> None:
    """Remove them."""
    for name in ("counter", "outbox", "api_key"):
        op.drop_table(name)
