#!/usr/bin/env bash
# Builds the Debian package in a copy of the sources below DIR, and leaves it in DIR. Prints its path last.
#
# usage: packaging/deb.sh DIR
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?usage: deb.sh DIR}"
build=$(realpath "$1")

copy=$build/deb/vmcapture
rm -rf "$build/deb"
mkdir -p "$copy"
tar -c --exclude=__pycache__ --exclude='.[a-z]*' \
    CHANGELOG.md LICENSE Makefile README.md capture debian docs initramfs packaging pyproject.toml | tar -x -C "$copy"

if ! (cd "$copy" && dpkg-buildpackage -us -uc -b) > "$build/deb/log" 2>&1; then
    tail -n 20 "$build/deb/log" >&2
    echo "deb.sh: dpkg-buildpackage failed; all of its output: $build/deb/log" >&2
    exit 1
fi
(cd "$build/deb" && lintian --fail-on error,warning --pedantic --display-info vmcapture_*.changes)
mv "$build"/deb/vmcapture_*.deb "$build"
ls "$build"/vmcapture_*.deb
