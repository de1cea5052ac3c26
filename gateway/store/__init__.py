"""Durable state in SQLite or PostgreSQL, one code path."""
