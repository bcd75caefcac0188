#!/usr/bin/env bash
# Programs of the host, by what they are for: installs the Debian packages that bring missing ones when we are root, else
# says which to install. Prints nothing when all are there.
#
# usage: host-packages.sh [python] [guest] [readers] [storage] [bench] [deb] [debian]
set -euo pipefail

# program:package
guest=(
    qemu-system-x86_64:qemu-system-x86
    kexec:kexec-tools
    busybox:busybox-static
    mksquashfs:squashfs-tools
    mke2fs:e2fsprogs
    debugfs:e2fsprogs
    e2fsck:e2fsprogs
    depmod:kmod
    findfs:util-linux
    blkid:util-linux
    mount:mount
    tar:tar
    dpkg:dpkg
    apt-get:apt
    age:age
    age-keygen:age
    ip:iproute2
    ssh:openssh-client
    ssh-keygen:openssh-client
    sshfs:sshfs
)
readers=(
    age:age
    age-keygen:age
    makedumpfile:makedumpfile
    crash:crash
    gdb:gdb
    mkfs.xfs:xfsprogs
    mkfs.btrfs:btrfs-progs
    fish:fish
    systemd-analyze:systemd
    zsh:zsh
)
debian=(
    debootstrap:debootstrap
    chroot:coreutils
    cp:coreutils
    unshare:util-linux
)
deb=(
    dpkg-buildpackage:dpkg-dev
    dh:debhelper
    dh_python3:dh-python
    lintian:lintian
)
# module of Debian's own Python:package
deb_modules=(
    elftools:python3-pyelftools
    numpy:python3-numpy
    tqdm:python3-tqdm
    zstandard:python3-zstandard
)
storage=(
    lvm:lvm2
    dmsetup:dmsetup
    mdadm:mdadm
)
bench=(
    makedumpfile:makedumpfile
    zstd:zstd
    qemu-storage-daemon:qemu-system-common
    losetup:mount
    umount:mount
)

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
missing=()

look_for() {
    local need
    for need in "$@"; do
        command -v "${need%%:*}" > /dev/null || missing+=("${need##*:}")
    done
}

for purpose in "$@"; do
    case $purpose in
        python) "${PYTHON:-python3}" -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv) ;;
        guest)
            look_for "${guest[@]}"
            # A dynamically linked busybox cannot be stage one's shell.
            ! ldd "$(command -v busybox)" > /dev/null 2>&1 || missing+=(busybox-static)
            ;;
        readers) look_for "${readers[@]}" ;;
        deb)
            look_for "${deb[@]}"
            for need in "${deb_modules[@]}"; do
                /usr/bin/python3 -c "import ${need%%:*}" 2> /dev/null || missing+=("${need##*:}")
            done
            ;;
        debian) look_for "${debian[@]}" ;;
        storage) look_for "${storage[@]}" ;;
        bench) look_for "${bench[@]}" ;;
        *)
            echo "host-packages.sh: no such purpose: $purpose" >&2
            exit 2
            ;;
    esac
done

[ ${#missing[@]} -eq 0 ] && exit 0
mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)

if ! command -v apt-get > /dev/null; then
    echo "missing on this machine, and no apt-get to install it with; Debian calls it: ${missing[*]}" >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "missing on this machine; install as root: apt-get install --no-install-recommends ${missing[*]}" >&2
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
