#!/usr/bin/env bash
# install-lock.sh PYTHON LOCK: install exactly what a lock says into PYTHON's environment, every file hash-checked.
#
# The configured pip is asked first for everything. PyTorch's CPU build is not on a general index, which has the CUDA
# build under the same version: then, and only then, it comes from PyTorch's own index, which uv knows by itself.
set -euo pipefail
python="$1"
lock="$2"
here="$(cd "$(dirname "$0")" && pwd)"
say() { printf 'setup: %s\n' "$*" >&2; }
# Local indexes that lack one requirement are no news; everything else that pip warns of is shown.
pip() { "$python" -m pip --disable-pip-version-check --no-input "$@" 2> >(grep -v 'is ignored: it is neither' >&2); }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# One line per requirement on a terminal, overwritten; every 25th in a log.
follow() {
  local total="$1" count=0 line
  while IFS= read -r line; do
    case "$line" in
      Collecting* | "Requirement already satisfied"*)
        count=$((count + 1))
        if [ -t 2 ]; then
          printf '\r\033[Ksetup: %d of %d' "$count" "$total" >&2
        elif [ $((count % 25)) -eq 0 ]; then say "$count of $total"; fi
        ;;
      Installing*)
        if [ -t 2 ]; then printf '\r\033[K' >&2; fi
        say "unpacking"
        ;;
    esac
  done
  if [ -t 2 ]; then printf '\r\033[K' >&2; fi
}

have_version() { "$python" -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null || true; }

offered_hash() {
  pip install --quiet --dry-run --no-deps --ignore-installed --only-binary :all: --report - "$1" 2>/dev/null |
    "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["download_info"]["archive_info"]["hashes"]["sha256"])' \
      2>/dev/null || true
}

torch_cpu() {
  local lock="$1" wanted offered
  wanted=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$lock")
  if [ "$(have_version torch)" = "$wanted+cpu" ]; then return; fi
  say "torch $wanted, the CPU build (about 190 MB)"
  offered=$(offered_hash "torch==$wanted")
  if [ -n "$offered" ] && grep -q "sha256:$offered" "$lock"; then
    pip install --quiet --no-deps --require-hashes --only-binary :all: -r "$lock"
    return
  fi
  say "the configured index has no CPU build of torch: taking it from PyTorch's own"
  "$python" -m venv "$work/uv"
  "$work/uv/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
    -r "$here/../requirements/resolver.lock"
  if ! "$work/uv/bin/uv" pip install --quiet --python "$python" --no-deps --require-hashes --torch-backend cpu -r "$lock"; then
    say "torch could not be had. Where PyTorch's index cannot be reached, put the file torch-$wanted+cpu-cp311-*.whl into a folder"
    say "and type: PIP_FIND_LINKS=/that/folder make setup; or, without an engine: CLOISTER_ENGINE=none make setup"
    exit 3
  fi
}

rest="$lock"
case "$lock" in
  *runtime-cpu.lock)
    rest="$work/rest.lock"
    awk -v rest="$rest" -v torch="$work/torch.lock" \
      '/^[a-zA-Z0-9]/ { out = ($1 ~ /^torch==/) ? torch : rest } { print > out }' "$lock"
    torch_cpu "$work/torch.lock"
    ;;
esac
total=$(grep -c '^[a-zA-Z0-9]' "$rest")
say "$(basename "$lock"): $total requirements"
pip install --no-deps --require-hashes --only-binary :all: --no-warn-script-location --progress-bar off -r "$rest" |
  follow "$total"
