"""Which block device carries a file system, as its superblock says: each disk asked by itself.

``findfs`` reads one disk after another, so that the first one that hangs hides all the others; and it may be the disk
that brought the machine down. Here every disk is read by a process of its own: what does not answer is left behind.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple, cast

from capture import pulse

TAGS = ("UUID", "LABEL")
BLOCK = Path("/sys/class/block")
PATIENCE = 15.0
"""Seconds that all disks together have to answer; one that has to spin up first takes about ten."""
_DEATH = 0.5
"""Seconds that those have who are killed, all together."""
_AT_ONCE = 16
_BLOCK, _BLOCKS = 4096, 17  # btrfs has its superblock at 64 KiB, the others have theirs before
HEAD = _BLOCK * _BLOCKS
"""How many bytes at a device's beginning have all of them."""


class Layout(NamedTuple):
    """Where in bytes from a device's beginning a superblock has what tells it apart, its UUID and its label."""

    magic: bytes
    magic_at: int
    uuid_at: int
    label_at: int
    label_size: int


EXT, XFS, BTRFS = "ext", "xfs", "btrfs"
LAYOUTS = {
    EXT: Layout(b"\x53\xef", 1024 + 0x38, 1024 + 0x68, 1024 + 0x78, 16),
    XFS: Layout(b"XFSB", 0, 32, 108, 12),
    BTRFS: Layout(b"_BHRfS_M", 65536 + 0x40, 65536 + 0x20, 65536 + 0x12B, 256),
}
"""struct ext4_super_block (fs/ext4/ext4.h), struct xfs_dsb (fs/xfs/libxfs/xfs_format.h), struct btrfs_super_block
(include/uapi/linux/btrfs_tree.h)."""

_asked: dict[str, subprocess.Popen[bytes]] = {}
"""Who asks a disk that has not answered yet: there is no need for a second one."""


Tag = tuple[str, str]
"""UUID or LABEL, and its value."""


def devices_with(wanted: Iterable[Tag], among: Iterable[str] | None = None) -> dict[Tag, str]:
    """Return which devices have a file system (ext2 to ext4, xfs, btrfs) with one of these tags, the first to answer.

    ``among`` are the devices to ask; all where it is None. One may be part of something that carries the file system in
    its stead, as a disk of a mirror is. Nothing is found where there is no ``dd`` to read with.
    """
    missing = {(tag, value.lower() if tag == "UUID" else value): (tag, value) for tag, value in wanted if tag in TAGS}
    found: dict[Tag, str] = {}
    if not missing:
        return found
    names = _disks() if among is None else (Path(device).name for device in among)
    with contextlib.suppress(OSError), contextlib.closing(_heads(list(names))) as answers:
        for name, head in answers:
            for is_it in tags(head).items() & missing.keys():
                found[missing.pop(is_it)] = f"/dev/{name}"
            if not missing:
                break
    return found


def some_hang() -> bool:
    """Return whether a disk has not answered when it was last asked."""
    return any(process.poll() is None for process in _asked.values())


def tags(head: bytes) -> dict[str, str]:
    """Return UUID and LABEL of the file system that begins with ``head``; nothing where it is none that we know."""
    kind = kind_of(head)
    if kind is None:
        return {}
    at = LAYOUTS[kind]
    label = head[at.label_at : at.label_at + at.label_size].partition(b"\0")[0]
    found = {"UUID": str(uuid.UUID(bytes=head[at.uuid_at : at.uuid_at + 16]))}
    return found | ({"LABEL": label.decode("utf-8", "replace")} if label else {})


def kind_of(head: bytes) -> str | None:
    """Return of what kind the file system is that begins with ``head``, a key of LAYOUTS; None where it is of none."""
    for kind, at in LAYOUTS.items():
        if head.startswith(at.magic, at.magic_at) and len(head) >= at.label_at + at.label_size:
            return kind
    return None


def options_for_all_of(device: str, options: str) -> str:
    """Return mount options, ``options`` among them, that show all of a file system: paths are counted from its root.

    Of a btrfs, another subvolume may be mounted where nobody names one (btrfs-subvolume(8): set-default); 5 is the id
    of the one that holds all others (BTRFS_FS_TREE_OBJECTID).
    """
    try:
        with pulse.at_target(), Path(device).open("rb", buffering=0) as disk:
            btrfs = kind_of(os.pread(disk.fileno(), HEAD, 0)) == BTRFS
    except OSError:  # mount will say why
        return options
    return f"{options},subvolid=5" if btrfs else options


def _disks() -> Iterator[str]:
    """Yield the names of all disks, partitions and volumes."""
    for place in sorted(BLOCK.iterdir()):
        try:
            size = int((place / "size").read_text())
        except (OSError, ValueError):  # it went while we looked
            continue
        if size and not place.name.startswith(("ram", "zram", "loop")):
            yield place.name


def _heads(waiting: list[str]) -> Generator[tuple[str, bytes], None, None]:
    """Yield what each device begins with, in the order in which they answer; less, where it cannot be read."""
    waiting = [name for name in waiting if name not in _asked or _asked[name].poll() is not None]
    heads: dict[str, bytes] = {}
    deadline = time.monotonic() + PATIENCE
    with selectors.DefaultSelector() as answers:
        try:
            while (waiting or answers.get_map()) and (left := deadline - time.monotonic()) > 0:
                while waiting and len(answers.get_map()) < _AT_ONCE:
                    name = waiting.pop(0)
                    answers.register(_ask(name), selectors.EVENT_READ, name)
                    heads[name] = b""
                for key, _ in answers.select(left):
                    piece = os.read(key.fd, 1 << 16)
                    heads[key.data] += piece
                    if not piece:
                        answers.unregister(key.fileobj)
                        _asked.pop(key.data).wait()
                        yield key.data, heads.pop(key.data)
        finally:
            _leave(list(heads))


def _leave(names: Sequence[str]) -> None:
    """End those who still ask: whoever does not come to an end has a disk that hangs, and stays until that answers."""
    for name in names:
        _asked[name].kill()
    deadline = time.monotonic() + _DEATH
    for name in names:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _asked[name].wait(max(0.0, deadline - time.monotonic()))


def _ask(name: str) -> IO[bytes]:
    process = subprocess.Popen(
        ["dd", f"if=/dev/{name}", f"bs={_BLOCK}", f"count={_BLOCKS}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _asked[name] = process
    return cast("IO[bytes]", process.stdout)
