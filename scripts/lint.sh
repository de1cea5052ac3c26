#!/usr/bin/env bash
# Style and types.
set -euo pipefail
cd "$(dirname "$0")/.."
say() { printf '== %s\n' "$*"; }
say "ruff check" && .venv/bin/ruff check .
say "ruff format --check" && .venv/bin/ruff format --check .
say "mypy" && .venv/bin/mypy
