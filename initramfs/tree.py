"""A file tree on paper: which path holds what, before anything is written as a directory, a squashfs or a cpio."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from initramfs.errors import ImageError
from initramfs.strip import strip

MAX_LINKS = 40  # the kernel's own limit for one path walk (MAXSYMLINKS, include/linux/namei.h)


@dataclass(frozen=True, slots=True)
class File:
    """A regular file: its bytes, or the host file that has them; with ``stripped``, only what running it needs."""

    content: bytes | Path
    mode: int = 0o644
    stripped: bool = False

    def read(self) -> bytes:
        """Return the bytes."""
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return strip(content) if self.stripped else content

    def size(self) -> int:
        """Return the number of bytes."""
        if isinstance(self.content, bytes) or self.stripped:
            return len(self.read())
        return self.content.stat().st_size


@dataclass(frozen=True, slots=True)
class Symlink:
    """A symbolic link."""

    target: str


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory; what is in it stands in the tree under its own path."""

    mode: int = 0o755


@dataclass(frozen=True, slots=True)
class Device:
    """A character device."""

    major: int
    minor: int
    mode: int = 0o600


Entry = File | Symlink | Directory | Device


class Tree:
    """Absolute path → entry. Parents appear by themselves; symbolic links among them are followed."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __contains__(self, path: str) -> bool:
        return self.resolve(path) in self._entries

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        """Yield (path, entry) in the order of the paths: a directory comes before what is in it."""
        return iter(sorted(self._entries.items(), key=lambda item: PurePosixPath(item[0]).parts))

    def size(self) -> int:
        """Return the bytes of all regular files."""
        return sum(entry.size() for entry in self._entries.values() if isinstance(entry, File))

    def host_files(self) -> Iterator[Path]:
        """Yield the host's files whose bytes are in the tree."""
        for entry in self._entries.values():
            if isinstance(entry, File) and isinstance(entry.content, Path):
                yield entry.content

    def resolve(self, path: str) -> str:
        """Return where the path leads when the links among its parents are followed (its last part is not)."""
        here = PurePosixPath("/")
        pending = list(PurePosixPath(path).parts[1:])
        links = 0
        while pending:
            name = pending.pop(0)
            if name == "..":
                here = here.parent
                continue
            entry = self._entries.get(str(here / name)) if pending else None
            if isinstance(entry, Symlink):
                links += 1
                if links > MAX_LINKS:
                    raise ImageError(f"{path}: too many symbolic links in the image")
                target = PurePosixPath(entry.target)
                if target.is_absolute():
                    here = PurePosixPath("/")
                    pending = [*target.parts[1:], *pending]
                else:
                    pending = [*target.parts, *pending]
            else:
                here /= name
        return str(here)

    def add(self, path: str, entry: Entry) -> None:
        """Put an entry at the path; the first one stays when the path is taken."""
        if not path.startswith("/"):
            raise ImageError(f"{path}: a path in the image starts with /")
        place = PurePosixPath(self.resolve(path))
        for parent in reversed(place.parents[:-1]):
            above = self._entries.setdefault(str(parent), Directory())
            if not isinstance(above, Directory):
                raise ImageError(f"{path}: {parent} is no directory in the image")
        self._entries.setdefault(str(place), entry)

    def add_host(self, path: Path) -> None:
        """Take a program or shared object to the same path, with each symbolic link that leads to it."""
        here = Path("/")
        pending = list(Path(os.path.normpath(path.absolute())).parts[1:])
        links = 0
        while pending:
            host = here / pending.pop(0)
            if not host.is_symlink():
                here = host
                continue
            links += 1
            if links > MAX_LINKS:
                raise ImageError(f"{path}: too many symbolic links")
            target = str(host.readlink())
            # Our /lib is always usr/lib: a relative link that leaves its directory may start from elsewhere here.
            self.add(str(host), Symlink(os.path.normpath(here / target) if "/" in target else target))
            pending = [*Path(os.path.normpath(here / target)).parts[1:], *pending]
            here = Path("/")
        self.add(str(here), host_program(here))

    def write(self, directory: Path) -> None:
        """Write the tree below an empty directory (devices are left out: only root may make them)."""
        for path, entry in self:
            place = directory / path[1:]
            match entry:
                case Directory():
                    place.mkdir()
                    place.chmod(entry.mode)
                case Symlink():
                    place.symlink_to(entry.target)
                case File():
                    place.write_bytes(entry.read())
                    place.chmod(entry.mode)
                case Device():
                    pass


def host_file(path: Path, *, stripped: bool = False) -> File:
    """Return an entry for a file of the host; only whether it may be executed is kept of its mode."""
    if not path.is_file():
        raise ImageError(f"{path}: no such file")
    return File(path, 0o755 if path.stat().st_mode & 0o111 else 0o644, stripped)


def host_program(path: Path) -> File:
    """Return an entry for a program or a shared object of the host, without its symbols and debug data."""
    return host_file(path, stripped=True)
