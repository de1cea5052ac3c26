#!/bin/sh
# Make .venv with the pinned engine for this host: scripts/setup.sh [dev]. Does nothing, quickly, when nothing changed.
# CLOISTER_ENGINE=cpu|cuda|none overrides the choice, CLOISTER_PYTHON names the interpreter.
set -eu
cd "$(dirname "$0")/.."
kind="${1:-run}"
say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

engine="${CLOISTER_ENGINE:-}"
if [ -z "$engine" ]; then
  engine=cpu
  if ls /dev/nvidia[0-9]* >/dev/null 2>&1 || nvidia-smi -L >/dev/null 2>&1; then engine=cuda; fi
fi
case "$engine" in
  cpu) lock=requirements/runtime-cpu.lock ;;
  cuda) lock=requirements/runtime-cuda.lock ;;
  none) lock=requirements/runtime.lock ;;
  *) fail "CLOISTER_ENGINE is cpu, cuda or none, not '$engine'" ;;
esac
if [ "$kind" = dev ] && [ "$engine" != cuda ]; then lock=requirements/dev.lock; fi

python=""
for candidate in ${CLOISTER_PYTHON:-} python3.11 python3; do
  if command -v "$candidate" >/dev/null 2>&1 &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
[ -n "$python" ] || fail "Python 3.11 is needed (the engine is locked for it). Install it: apt-get install python3.11 python3.11-venv, or set CLOISTER_PYTHON."

stamp=$( (cat "$lock" pyproject.toml; echo "$engine $kind"; "$python" -V; pwd) | sha256sum | cut -d' ' -f1)
# what `make test` installs contains what `make run` needs
if [ -x .venv/bin/cloister ] && { [ "$(cat ".venv/.stamp-$kind" 2>/dev/null)" = "$stamp" ] ||
  { [ "$kind" = run ] && [ -f .venv/.stamp-dev ] && [ .venv/.stamp-dev -nt "$lock" ] && [ .venv/.stamp-dev -nt pyproject.toml ]; }; }; then
  exit 0
fi

say "engine: $engine, interpreter: $("$python" -V), lock: $lock"
if [ ! -x .venv/bin/python ]; then
  say "making .venv"
  "$python" -m venv .venv || fail "the venv module is missing. Install it: apt-get install python3.11-venv"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

# torch on its own: the CPU build is not on every index, and its CUDA namesake must not be fetched by mistake
awk -v rest="$work/rest.txt" -v torch="$work/torch.txt" '/^[a-zA-Z0-9]/ { out = ($0 ~ /^torch==/) ? torch : rest } { print > out }' "$lock"
if [ -f "$work/torch.txt" ] && [ "$engine" != cuda ]; then
  want=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$work/torch.txt")
  have=$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch").partition("+")[0])' 2>/dev/null || true)
  if [ "$have" != "$want" ]; then
    say "installing torch $want for the CPU (about 190 MB)"
    found=$(pip install --quiet --dry-run --no-deps --ignore-installed --report - "torch==$want" 2>/dev/null |
      .venv/bin/python -c 'import json,sys; print(json.load(sys.stdin)["install"][0]["download_info"]["archive_info"]["hashes"]["sha256"])' 2>/dev/null || true)
    if [ -n "$found" ] && grep -q "$found" "$work/torch.txt"; then
      pip install --quiet --no-deps --require-hashes -r "$work/torch.txt"
    else
      say "the configured index has no CPU build of torch: taking it from PyTorch's own"
      pip install --quiet --target "$work/uv" uv
      "$work/uv/bin/uv" pip install --quiet --python .venv/bin/python --no-deps --require-hashes --torch-backend cpu -r "$work/torch.txt"
    fi
  fi
elif [ -f "$work/torch.txt" ]; then
  cat "$work/torch.txt" >>"$work/rest.txt"
fi
say "installing $(grep -c '^[a-zA-Z0-9]' "$work/rest.txt") locked requirements"
pip install --quiet --no-deps --require-hashes --only-binary :all: --progress-bar off -r "$work/rest.txt"
say "installing cloister"
if [ "$engine" = none ]; then
  pip install --quiet --no-deps -e .
else
  pip install --quiet --no-deps --no-build-isolation -e .
fi
printf '%s\n' "$stamp" >".venv/.stamp-$kind"
say "done"
