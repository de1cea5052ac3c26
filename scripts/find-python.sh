#!/bin/sh
# find-python.sh [cpu|cuda|none]: print the interpreter for .venv. The engines are locked for CPython 3.11 and no other;
# without an engine any from 3.11 on will do. CLOISTER_PYTHON names one that is not on the path.
set -eu
here=$(cd "${0%/*}/.." && pwd)
case "${1:-cpu}" in
  none) fits='sys.version_info >= (3, 11)' ;;
  *) fits='sys.version_info[:2] == (3, 11)' ;;
esac
for candidate in ${CLOISTER_PYTHON:-} python3.11 python3 python "$here"/.python/cpython-3.11*/bin/python3.11; do
  path=$(command -v "$candidate" 2>/dev/null) || continue
  if "$path" -c "import sys; sys.exit(sys.implementation.name != 'cpython' or not $fits)" 2>/dev/null; then
    printf '%s\n' "$path"
    exit 0
  fi
done
{
  echo "setup: no Python 3.11 found; the engine is locked for exactly that version."
  echo "setup: on Debian 12 type: apt-get install python3.11 python3.11-venv"
  echo "setup: or, with one elsewhere: make setup CLOISTER_PYTHON=/path/to/python3.11"
} >&2
exit 3
