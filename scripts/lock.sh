#!/usr/bin/env bash
# Resolve requirements/*.lock anew: scripts/lock.sh [--upgrade]. Fetches metadata only, in a throwaway environment.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(scripts/find-python.sh)
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
  -r requirements/resolver.lock 2> >(grep -v 'is ignored: it is neither' >&2)
mkdir "$work/scratch"
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" scripts/lock.py --work "$work/scratch" "$@"
