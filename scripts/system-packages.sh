#!/bin/sh
# Install the system packages that are missing: system-packages.sh run|test. Where it may not, it says what to type.
set -eu
wanted=""
need() { command -v "$1" >/dev/null 2>&1 || wanted="$wanted $2"; }
need bwrap bubblewrap
if [ "${1:-run}" = test ]; then need promtool prometheus; fi
[ -n "$wanted" ] || exit 0
command="apt-get install -y --no-install-recommends$wanted"
elevate=""
if [ "$(id -u)" != 0 ]; then
  if sudo -n true 2>/dev/null; then elevate="sudo -n"; else
    printf 'setup: system packages are missing. Type: sudo %s\n' "$command" >&2
    [ "${1:-run}" = test ] && exit 0
    exit 1
  fi
fi
if ! command -v apt-get >/dev/null 2>&1; then
  printf 'setup: install with your package manager:%s\n' "$wanted" >&2
  [ "${1:-run}" = test ] && exit 0
  exit 1
fi
printf 'setup: installing system packages:%s\n' "$wanted" >&2
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
if ! $elevate $command >/dev/null 2>&1; then
  $elevate apt-get update -q >/dev/null 2>&1 || true
  if ! $elevate $command >/dev/null; then
    printf 'setup: could not install:%s. Tests that need them are skipped; a sealed engine needs bubblewrap.\n' "$wanted" >&2
    [ "${1:-run}" = test ] || exit 1
  fi
fi
