#!/usr/bin/env bash
# Have `promtool` for the tests, from Debian's prometheus package but without installing its service, which
# would take a port. Where it cannot be had, say so: the tests that need it are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
if command -v promtool >/dev/null || [ -x .venv/bin/promtool ]; then exit 0; fi
say() { printf 'setup: %s\n' "$*" >&2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fetch() { (cd "$work" && apt-get download -q prometheus >/dev/null 2>&1); }
say "fetching promtool"
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
  say "NO promtool: no Debian packages here. Tests that need it are skipped."
  exit 0
fi
if ! fetch; then
  if [ "$(id -u)" = 0 ]; then apt-get update -q >/dev/null 2>&1 || true; fi
  if ! fetch; then
    say "NO promtool: Debian's prometheus package cannot be had. Tests that need it are skipped."
    exit 0
  fi
fi
dpkg-deb --fsys-tarfile "$work"/prometheus_*.deb | tar -x -C "$work" ./usr/bin/promtool
install -m 0755 "$work/usr/bin/promtool" .venv/bin/promtool
