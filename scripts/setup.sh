#!/usr/bin/env bash
# setup.sh run|test: make .venv with the pinned engine for this host, and for `test` the tools too.
#
# Quick when nothing changed: a stamp names the engine and the digest of everything that decides what is in .venv.
# CLOISTER_ENGINE=cpu|cuda|none overrides the choice of engine, CLOISTER_PYTHON the interpreter.
# Exit code 3: this machine lacks something; the message says what to type.
set -euo pipefail
cd "$(dirname "$0")/.."
kind="${1:-run}"
stamp=.venv/.cloister-setup
say() { printf 'setup: %s\n' "$*" >&2; }

choose_engine() {
  case "${CLOISTER_ENGINE:-}" in
    cpu | cuda | none) echo "$CLOISTER_ENGINE" ;;
    "")
      if [ -e /dev/nvidia0 ] || nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then echo cuda; else echo cpu; fi
      ;;
    *)
      say "CLOISTER_ENGINE is cpu, cuda or none, not '$CLOISTER_ENGINE'"
      exit 2
      ;;
  esac
}

refuse_platforms_without_locks() {
  case "$engine $(uname -s) $(uname -m)" in
    "none "* | "cpu Linux x86_64" | "cpu Linux aarch64" | "cuda Linux x86_64") ;;
    *)
      say "there is no locked $engine engine for $(uname -s) on $(uname -m). The gateway alone: CLOISTER_ENGINE=none make setup"
      exit 3
      ;;
  esac
}

# Newer Debians have no Python 3.11: uv knows where to get one and checks what it got.
fetch_python() {
  say "no Python 3.11 here, and the engine is locked for it: fetching one into .python"
  {
    python3 -m venv .python/uv &&
      .python/uv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r requirements/resolver.lock &&
      .python/uv/bin/uv python install --no-bin --install-dir .python 3.11
  } >&2 || say "it could not be fetched"
}

digest() {
  local version
  version=$(.venv/bin/python -V 2>/dev/null) || version=none
  {
    cat "${locks[@]}" pyproject.toml scripts/setup.sh scripts/install-lock.sh
    printf '%s %s' "$version" "$PWD"
  } | sha256sum | cut -d' ' -f1
}

up_to_date() {
  local was_engine was_kind was_digest was_place
  [ -x .venv/bin/cloister ] || return 1
  { read -r was_engine was_kind was_digest && read -r was_place; } 2>/dev/null <"$stamp" || return 1
  [ "$was_engine" = "$engine" ] && [ "$was_place" = "$PWD" ] || return 1
  # what `make test` installs contains what `make run` needs
  if [ "$was_kind" = test ]; then locks=("${for_test[@]}"); else [ "$kind" = run ] || return 1; fi
  [ "$was_digest" = "$(digest)" ]
}

make_venv() {
  local python place=""
  if [ -f "$stamp" ]; then place=$(sed -n 2p "$stamp"); fi
  if [ -x .venv/bin/python ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
    # another engine's files, or another place's paths: nothing of that may stay
    case "$(cat "$stamp" 2>/dev/null)" in
      "$engine "* | "") if [ "${place:-$PWD}" = "$PWD" ]; then return; fi ;;
    esac
  fi
  scripts/find-python.sh "$engine" >/dev/null 2>&1 || fetch_python
  python=$(scripts/find-python.sh "$engine")
  say "making .venv with $("$python" -V), engine: $engine"
  if ! "$python" -m venv --clear .venv; then
    say "$python cannot make virtual environments. On Debian type: apt-get install python3.11-venv"
    exit 3
  fi
}

engine=$(choose_engine)
refuse_platforms_without_locks
case "$engine" in
  none) for_run=(requirements/bootstrap.lock requirements/runtime.lock) ;;
  *) for_run=(requirements/bootstrap.lock "requirements/runtime-$engine.lock") ;;
esac
for_test=("${for_run[@]}" requirements/dev.lock)
locks=("${for_run[@]}")
if [ "$kind" = test ]; then locks=("${for_test[@]}"); fi

scripts/system-packages.sh "$engine"
if up_to_date; then exit 0; fi
if [ "$kind" = test ]; then locks=("${for_test[@]}"); else locks=("${for_run[@]}"); fi

# one setup at a time in this tree
exec 9<pyproject.toml
flock 9
make_venv
rm -f "$stamp"
for lock in "${locks[@]}"; do scripts/install-lock.sh .venv/bin/python "$lock"; done
say "cloister itself"
if ! output=$(.venv/bin/python -m pip --disable-pip-version-check install --no-deps --no-build-isolation -e . 2>&1); then
  printf '%s\n' "$output" >&2
  exit 1
fi
printf '%s %s %s\n%s\n' "$engine" "$kind" "$(digest)" "$PWD" >"$stamp"
say "ready: .venv/bin/cloister"
