#!/usr/bin/env bash
# Programs of the host that the demo and the tests need: installs the Debian packages that bring missing ones when we
# are root, else says which to install. Prints nothing when all are there.
set -euo pipefail

# program or file : package
needs=(
    qemu-system-x86_64:qemu-system-x86
    kexec:kexec-tools
    busybox:busybox-static
    mksquashfs:squashfs-tools
    mke2fs:e2fsprogs
    debugfs:e2fsprogs
    depmod:kmod
    cpio:cpio
    mount:mount
    findfs:util-linux
    makedumpfile:makedumpfile
    crash:crash
    xz:xz-utils
)

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing=()
for need in "${needs[@]}"; do
    command -v "${need%%:*}" > /dev/null || missing+=("${need##*:}")
done
# A dynamically linked busybox cannot be stage one's shell.
if command -v busybox > /dev/null && ldd "$(command -v busybox)" > /dev/null 2>&1; then missing+=(busybox-static); fi
"${PYTHON:-python3}" -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)

[ ${#missing[@]} -eq 0 ] && exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

if [ "$(id -u)" -ne 0 ]; then
    echo "missing on this machine; install as root: apt-get install --no-install-recommends ${missing[*]}" >&2
    exit 1
fi
if ! command -v apt-get > /dev/null; then
    echo "missing on this machine, and no apt-get to install it with; Debian calls it: ${missing[*]}" >&2
    exit 1
fi
echo "installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } < /dev/null > "$log" 2>&1; then
    tail -n 15 "$log" >&2
    echo "apt-get could not install: ${missing[*]}" >&2
    exit 1
fi
