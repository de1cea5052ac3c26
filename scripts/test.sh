#!/bin/sh
# Every check, cheapest first. CLOISTER_TEST_FULL=1 runs the long campaigns at full count.
set -eu
cd "$(dirname "$0")/.."
bin=.venv/bin
$bin/ruff check .
$bin/ruff format --check .
$bin/mypy
exec $bin/python -m pytest "$@"
