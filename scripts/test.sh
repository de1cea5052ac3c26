#!/usr/bin/env bash
# Every check, cheapest first; arguments go to pytest. CLOISTER_TEST_FULL=1 runs the long campaigns at full count.
# Seeds are fixed; CLOISTER_TEST_SEED=N tries others. Exit code: the first check's that failed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" CLOISTER_TEST_SEED="${CLOISTER_TEST_SEED:-0}" PYTHONHASHSEED=0
scripts/lint.sh
echo "== pytest"
exec .venv/bin/python -m pytest --hypothesis-seed="$CLOISTER_TEST_SEED" --durations=10 "$@"
