#!/bin/sh
# The long campaigns at full count; their dated summary goes to docs/evidence/ and is committed.
set -eu
cd "$(dirname "$0")/.."
mkdir -p docs/evidence
report="docs/evidence/test-full-$(date -u +%Y-%m-%d).txt"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
CLOISTER_TEST_FULL=1 sh scripts/test.sh --timeout 7200 --durations 25 >"$log" 2>&1 || status=$?
{
  printf 'make test-full, %s, commit %s\n' "$(date -u +%Y-%m-%dT%H:%MZ)" "$(git rev-parse --short HEAD)"
  printf '%s processors, Linux %s, %s\n\n' "$(nproc)" "$(uname -r)" "$(.venv/bin/python -V)"
  tail -n 45 "$log"
} >"$report"
tail -n 3 "$log"
exit $status
