"""Disk images with an ext4 file system, made and read without root and without mounting them."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.guest import host
from tests.guest.host import HostError
from tests.guest.qemu import Disk

# debugfs greets with its version, and an ordinary user may not chown.
HARMLESS = re.compile(r"^debugfs [0-9.]+ |while changing ownership of|^$")


@dataclass(frozen=True, slots=True)
class Stat:
    """What debugfs says of one inode."""

    kind: str  # "regular", "directory", "symlink", …
    mode: int  # permission bits, 0o600
    size: int


def blank(path: Path, size: int = 1 << 30) -> Disk:
    """A new disk of so many bytes with nothing on it."""
    with path.open("wb") as image:
        image.truncate(size)
    return Disk(path)


def make(image: Path, size: str, label: str, uuid: str = "random", content: Path | None = None) -> Path:
    """Make a sparse image of ``size`` ("2G"), its file system called ``label``, with the files of ``content``."""
    fill: list[str | Path] = ["-d", content] if content else []
    image.unlink(missing_ok=True)
    # hash_seed and the creation time stay random: nothing here needs two images to be alike.
    host.run("mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-L", label, "-U", uuid, *fill, image, size)
    return image


def check(image: Path) -> None:
    """Run e2fsck over the image without changing it.

    Raises:
        HostError: the file system is damaged, or its journal was not written back.
    """
    host.run("e2fsck", "-fn", image)


def replay(image: Path) -> None:
    """Write the journal back and repair, as the next boot would, after a machine that was killed."""
    host.run("e2fsck", "-fy", image, good=(0, 1))


def names(image: Path, folder: str) -> list[str]:
    """The names in a folder of the image, sorted."""
    listed = _debugfs(image, f'ls -p "{folder}"')
    # /inode/mode/uid/gid/name/size/ — a deleted entry has inode 0
    rows = [line.split("/") for line in listed.splitlines() if line.startswith("/")]
    return sorted(row[5] for row in rows if row[1] != "0" and row[5] not in (".", ".."))


def stat(image: Path, path: str) -> Stat:
    """Kind, permission bits and size of one file in the image."""
    said = _debugfs(image, f'stat "{path}"')
    found = re.search(r"Type: (\w+) +Mode: +([0-7]+).*?Size: (\d+)", said, re.DOTALL)
    if found is None:
        raise HostError(f"debugfs does not say what {path} in {image} is: {said.strip()!r}")
    return Stat(found[1], int(found[2], 8), int(found[3]))


def room(image: Path) -> tuple[int, int]:
    """Bytes free, and bytes in all, of a file system that was left clean; both without what it needs for itself."""
    said = _debugfs(image, "stats")
    found = dict(re.findall(r"^(Block count|Free blocks|Block size|Overhead clusters): +(\d+)", said, re.MULTILINE))
    if len(found) < 4:
        raise HostError(f"debugfs does not say how much room there is in {image}: {said.strip()[:200]!r}")
    blocks, overhead, free, size = map(int, found.values())  # in the order in which debugfs prints them
    return free * size, (blocks - overhead) * size


def extract(image: Path, folder: str, into: Path) -> Path:
    """Copy a folder out of the image into ``into``, a new folder, and return the copy's path."""
    into.mkdir(parents=True)
    _debugfs(image, f'rdump "{folder}" "{into}"')
    copy = into / Path(folder).name
    if not copy.is_dir():
        raise HostError(f"{image} has no folder {folder}")
    return copy


def _debugfs(image: Path, request: str) -> str:
    """Run one request; its exit status is 0 whatever happens, so that what it complains of decides.

    Raises:
        HostError: it complains of more than having no right to give the files their owner.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".debugfs") as script:
        script.write(request + "\n")
        script.flush()
        said = host.run("debugfs", "-f", script.name, image)
    complaints = [line for line in said.complaints.splitlines() if not HARMLESS.search(line)]
    if complaints:
        raise HostError(f"debugfs {request!r} in {image}: {' | '.join(complaints)}")
    return "\n".join(line for line in said.output.splitlines() if not line.startswith("debugfs: "))
