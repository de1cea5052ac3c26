#!/usr/bin/env bash
# The long campaigns at full count; their dated summary goes to docs/evidence/, to be committed.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p docs/evidence
report="docs/evidence/test-full-$(date -u +%Y-%m-%d).txt"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
began=$(date +%s)
status=0
CLOISTER_TEST_FULL=1 scripts/test.sh --timeout=7200 --durations=25 "$@" 2>&1 | tee "$log" || status=$?
changed=""
if [ -n "$(git status --porcelain --untracked-files=no 2>/dev/null)" ]; then changed=" with uncommitted changes"; fi
{
  printf 'make test-full, %s, commit %s%s\n' "$(date -u +%Y-%m-%dT%H:%MZ)" "$(git rev-parse --short HEAD)" "$changed"
  printf '%s processors, %s GiB, Linux %s, %s, engine %s\n' "$(nproc)" "$(awk '/^MemTotal/ { print int($2 / 1048576 + 0.5) }' /proc/meminfo)" \
    "$(uname -r)" "$(.venv/bin/python -V)" "$(cut -d' ' -f1 .venv/.cloister-setup)"
  printf 'exit code %s after %s s\n\n' "$status" "$(($(date +%s) - began))"
  tail -n 45 "$log"
} >"$report"
echo "summary: $report"
exit "$status"
