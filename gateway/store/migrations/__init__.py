"""Alembic's migrations; the previous release must still run on the newest schema."""
