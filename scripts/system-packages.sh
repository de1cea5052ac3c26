#!/usr/bin/env bash
# Install the system packages that are missing, or say the one command to type.
# system-packages.sh cpu|cuda|none: what the engine needs: bubblewrap seals it, libnuma is linked by its CPU build.
set -euo pipefail
engine="${1:?cpu, cuda or none}"
say() { printf 'setup: %s\n' "$*" >&2; }

has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
offers_python_311() {
  case "$(. /etc/os-release 2>/dev/null && echo "${ID:-}:${VERSION_ID:-}")" in debian:12 | ubuntu:22.04) true ;; *) false ;; esac
}

wanted=()
if python=$("$(dirname "$0")/find-python.sh" "$engine" 2>/dev/null); then
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  has_venv "$python" || wanted+=("python$version-venv")
elif offers_python_311; then
  wanted+=(python3.11 python3.11-venv)
elif ! has_venv python3; then
  wanted+=(python3 python3-venv) # setup.sh fetches a Python 3.11 with it
fi
if [ "$engine" != none ]; then command -v bwrap >/dev/null || wanted+=(bubblewrap); fi
if [ "$engine" = cpu ]; then
  compgen -G '/usr/lib*/libnuma.so.1' >/dev/null || compgen -G '/usr/lib/*/libnuma.so.1' >/dev/null || wanted+=(libnuma1)
fi
[ ${#wanted[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null; then
  say "system packages are missing, and there is no apt-get here. Install with your package manager: ${wanted[*]}"
  exit 3
fi
install=(apt-get -o DPkg::Lock::Timeout=60 install -y --no-install-recommends "${wanted[@]}")
elevate=()
if [ "$(id -u)" != 0 ]; then
  if ! sudo -n true 2>/dev/null; then
    say "system packages are missing. Type: sudo apt-get install --no-install-recommends ${wanted[*]}"
    exit 3
  fi
  elevate=(sudo -n)
fi
say "installing system packages: ${wanted[*]}"
export DEBIAN_FRONTEND=noninteractive
if ! "${elevate[@]}" "${install[@]}" </dev/null >/dev/null 2>&1; then
  say "reading the package lists first"
  "${elevate[@]}" apt-get update -q </dev/null >/dev/null || true
  if ! "${elevate[@]}" "${install[@]}" </dev/null >/dev/null; then
    say "could not install: ${wanted[*]}. Repair the package sources, then type: apt-get install --no-install-recommends ${wanted[*]}"
    exit 3
  fi
fi
