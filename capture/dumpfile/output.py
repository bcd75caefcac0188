"""A file being written: whole writes at offsets, syncs, and, where asked for, SHA-256 by blocks while the bytes go by.

The file is new (O_EXCL), mode 0600 from its first byte, and no symbolic link is followed. A block of 64 MiB is hashed
as its bytes are written when they come in order; one that was written out of order, or again, is read back once at the
end.

Two threads may write at once: data is appended while descriptors of earlier data follow their sync.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from capture import pulse
from capture.errors import TargetError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MANIFEST = "manifest.json"
"""The file in which the digests of the others stand."""
HASH_BLOCK = 64 << 20
FILE_MODE = 0o600
INCOMPLETE_SUFFIX = ".incomplete"
"""Behind the name of a file until everything is in it."""
_LOST = "; the connection is lost: see to the server and the network"
"""What sshfs answers when nobody is behind it any more: ENOTCONN, and ECONNABORTED while it ends."""
_IOV_MAX = 1024
_RESERVED_AT_ONCE = 16 << 20
"""Bytes: where a file system cannot reserve, libc writes to each block, and a server takes its time for that."""
_SSHFS = "fuse.sshfs"
_NO_ROOM = 1 << 20
"""Bytes: a server with less is full. What it refused was a request of up to 32 KiB, several at a time."""
_READ_BACK = 1 << 20
_TABLE_BLOCK = 1 << 12
"""Rows of a table that are written together where they do not follow each other."""

Pieces = Sequence[bytes | memoryview]
"""Bytes to be written one after another."""


class TargetFullError(TargetError):
    """No room is left (ENOSPC, EDQUOT): what was written so far stays."""


def target_error(path: Path | str, doing: str, error: OSError) -> TargetError:
    """Return the TargetError that says what could not be done at ``path``, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TargetFullError(f"{path}: no room left while {doing}; make room or choose another target")
    room = _room_on_server(Path(path)) if error.errno in (errno.EIO, errno.EPERM) else None
    if room is not None and room < _NO_ROOM:
        return TargetFullError(
            f"{path}: no room left on the server while {doing}; make room there or choose another target"
        )
    remedy = (
        "; SFTP does not say why: see the server's log (a quota, or its disk)"
        if room is not None
        else {
            errno.EROFS: "; mount it read-write",
            errno.EACCES: "; check its permissions",
            errno.ENOENT: "; create the directory first",
            errno.EEXIST: "; remove it, or use --force",
            errno.EFBIG: "; this file system takes no larger file (vfat: 4 GiB): choose another target",
            errno.ENOTCONN: _LOST,
            errno.ECONNABORTED: _LOST,
        }.get(error.errno or 0, "")
    )
    return TargetError(f"{path}: {doing} failed: {error.strerror}{remedy}")


def _room_on_server(path: Path) -> int | None:
    """Return the bytes that are left where sshfs has mounted a server, None elsewhere, or when it does not say.

    SFTP (version 3) has no word for a full disk, but "failure". sshfs makes EIO of that for what is written, and EPERM
    for all else; what a server has to say besides goes into its own log.
    """
    try:
        with pulse.at_target():
            place = next(there for there in (path, *path.parents) if there.exists())
            device = place.stat().st_dev
            if not _is_sshfs(device):
                return None
            volume = os.statvfs(place)
    except (OSError, StopIteration):
        return None
    no_inodes = volume.f_files and not volume.f_favail
    return 0 if no_inodes else volume.f_bavail * volume.f_frsize


def _is_sshfs(device: int) -> bool:
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == number:
            return source.split()[0] == _SSHFS
    return False


def not_replaced(path: Path) -> str | None:
    """Return why no file may get this name, whatever anybody asks for; None when one may.

    A file that is renamed to ``/dev/null`` takes the place of the device, for the whole machine.

    Raises:
        OSError: it cannot be looked at.
    """
    if not path.name or path.is_dir():
        return "is a directory"
    if path.exists() and not path.is_file():
        return "is a device, a pipe or a socket, which no file takes the place of"
    if path.parent.resolve() == Path("/dev"):  # a link there may lead to a file: /dev/stdout
        return "/dev is for devices"
    return None


def unfinished_path(path: Path, *, replace: bool, resume: bool) -> Path:
    """Return the name that a dump at ``path`` has until it is finished; make way for it when ``replace``.

    With ``resume`` it may be there already.

    Raises:
        TargetError: ``path`` is there already, or cannot be a file.
    """
    try:
        refusal = not_replaced(path)
        if refusal is not None:
            raise TargetError(f"{path}: {refusal}; name the file to write")
        unfinished = path.with_name(path.name + INCOMPLETE_SUFFIX)
        if replace and not resume:
            unfinished.unlink(missing_ok=True)
        elif path.exists() or path.is_symlink():
            raise TargetError(f"{path}: exists already; remove it, or use --force")
    except OSError as error:
        raise target_error(path, "looking for it", error) from None
    return unfinished


def named(unfinished: Path, path: Path) -> TargetError | None:
    """Give what is finished its name; return why that cannot be, None when it is done."""
    try:
        with pulse.at_target():
            unfinished.rename(path)
    except OSError as error:
        return target_error(path, f"renaming {unfinished.name}", error)
    return None


class Written(Protocol):
    """What bytes are written to, whatever becomes of them; every method raises TargetError."""

    @property
    def name(self) -> str:
        """What to call it in a message."""

    @property
    def size(self) -> int:
        """Bytes so far, as they are stored."""

    @property
    def full(self) -> bool:
        """Whether there is room left only for what makes readable what is there: no page data, please."""

    def sync(self) -> None:
        """Bring everything written so far to the disk, as far as that can be done."""

    def end(self) -> None:
        """Tell readers that this is all; nothing is written after that."""

    def settle(self) -> None:
        """Wait until all that was written is there: ``size`` and ``digests`` do not change any more."""

    def digests(self) -> list[str]:
        """Return the SHA-256 of each block of 64 MiB as they are stored, hexadecimal; none where nobody asked for
        them."""

    def close(self) -> None:
        """Close it, whatever it lacks."""


class Output(Written, Protocol):
    """What a dump is written to: an OutputFile, or a stream that becomes one (capture.dumpfile.flattened)."""

    sequential: bool
    """Whether all that was written before is there when something written later is: writes are bytes in a row."""

    def write(self, pieces: Pieces, offset: int) -> int:
        """Write all ``pieces`` one after another at ``offset``; return how many bytes that were."""

    def write_bitmap(self, bits: bytes, offset: int) -> None:
        """Write bytes that will be read back."""

    def write_rows(self, numbers: NDArray[np.int64], rows: NDArray[np.void], at: int) -> Iterator[int]:
        """Write rows of the table that begins at ``at`` to their places, ``numbers`` ascending; yield how many are
        written, again and again, whatever happens."""

    def read_back(self, offset: int, length: int) -> bytes:
        """Return bytes written before; what was never written reads as zeros."""

    def reserve(self, offset: int, length: int) -> None:
        """Make sure that there are ``length`` bytes at ``offset``, which read as zeros until they are written."""

    def truncate(self, length: int) -> None:
        """Forget what lies behind ``length`` bytes of the dump, as far as that is possible."""

    def forget(self, offset: int, length: int) -> None:
        """Let the page cache drop bytes that are on the disk."""


def put_all(put: Callable[[Pieces], int], pieces: Pieces) -> None:
    """Give all ``pieces`` to ``put``, which writes as many bytes as it can and says how many.

    Raises:
        OSError: of ``put``.
    """
    queue = list(pieces)
    first = 0
    while first < len(queue):
        written = put(queue[first : first + _IOV_MAX])
        while first < len(queue) and written >= len(queue[first]):
            written -= len(queue[first])
            first += 1
        if written:
            queue[first] = memoryview(queue[first])[written:]


class _Place:
    """Where the next bytes go in a file that is written at offsets."""

    def __init__(self, fd: int, offset: int) -> None:
        self._fd = fd
        self.offset = offset

    def put(self, pieces: Pieces) -> int:
        """Write as many bytes as can be written; return how many that were."""
        with pulse.at_target():
            written = os.pwritev(self._fd, pieces, self.offset)
        self.offset += written
        return written


class OutputFile:
    """A file that is written at offsets: a new one, or with ``existing`` one that is there and goes on being written.

    Without ``hashed`` it has no ``digests``, and no time is spent on them.

    Raises:
        TargetError: from every method, with the path and the reason; TargetFullError when there is no room.
    """

    def __init__(self, path: Path, *, hashed: bool = True, existing: bool = False) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if existing else os.O_CREAT | os.O_EXCL)
        try:
            with pulse.at_target():
                self._fd = os.open(path, flags, FILE_MODE)
        except OSError as error:
            raise target_error(path, "opening" if existing else "creating", error) from None
        with contextlib.suppress(OSError):  # some file systems have modes of their own
            os.fchmod(self._fd, FILE_MODE)  # an umask can only take away, even what root needs
        try:
            self.size = os.fstat(self._fd).st_size
        except OSError as error:
            self.close()
            raise target_error(path, "looking at it", error) from None
        self._hashes = _BlockHashes(self.size) if hashed else None
        self._lock = threading.Lock()
        """Around ``size`` and the hashes."""

    sequential = False
    full = False

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self.path)

    def write(self, pieces: Pieces, offset: int) -> int:
        """Write all ``pieces`` one after another at ``offset``; return how many bytes that were."""
        place = _Place(self._fd, offset)
        if self._hashes is not None:
            with self._lock:
                self._hashes.feed(pieces, offset)
        try:
            put_all(place.put, pieces)
        except OSError as error:
            with self._lock:
                self._forget_hashes(place.offset)
                with contextlib.suppress(OSError):  # the server is gone, or the disk
                    self.size = os.fstat(self._fd).st_size
            raise target_error(self.path, f"writing at {place.offset}", error) from None
        with self._lock:
            self.size = max(self.size, place.offset)
        return place.offset - offset

    def append(self, pieces: Pieces) -> int:
        """Write all ``pieces`` behind what is there; return how many bytes that were."""
        return self.write(pieces, self.size)

    def write_bitmap(self, bits: bytes, offset: int) -> None:
        """Write bytes that will be read back: all of a file can be."""
        self.write([bits], offset)

    def write_rows(self, numbers: NDArray[np.int64], rows: NDArray[np.void], at: int) -> Iterator[int]:
        """Write rows of a table to their places, block by block: one that has gaps is read back first."""
        import numpy as np  # the set-up side asks this module for names only

        bounds = np.flatnonzero(np.diff(numbers // _TABLE_BLOCK)) + 1
        for start, end in pairwise([0, *bounds.tolist(), len(numbers)]):
            first, last = int(numbers[start]), int(numbers[end - 1])
            place = at + first * rows.itemsize
            part = rows[start:end]
            if last - first + 1 > end - start:
                block = np.frombuffer(self.read_back(place, (last - first + 1) * rows.itemsize), rows.dtype)
                part = block.copy()
                part[numbers[start:end] - first] = rows[start:end]
            try:
                self.write([part.tobytes()], place)
            except TargetError:
                there = np.frombuffer(self.read_back(place, part.nbytes), rows.dtype)
                yield int(np.count_nonzero((there == part)[numbers[start:end] - first]))
                raise
            yield end - start

    def _forget_hashes(self, offset: int) -> None:
        if self._hashes is not None:
            self._hashes.forget(offset)

    def read_back(self, offset: int, length: int) -> bytes:
        """Return bytes written before; what was never written reads as zeros."""
        try:
            with pulse.at_target():
                return os.pread(self._fd, length, offset).ljust(length, b"\0")
        except OSError as error:
            raise target_error(self.path, f"reading back at {offset}", error) from None

    def reserve(self, offset: int, length: int) -> None:
        """Take room on the disk for ``length`` bytes at ``offset``, which read as zeros until they are written."""
        if not length:
            return
        try:
            for start in range(offset, offset + length, _RESERVED_AT_ONCE):
                with pulse.at_target():
                    os.posix_fallocate(self._fd, start, min(_RESERVED_AT_ONCE, offset + length - start))
        except OSError as error:
            raise target_error(self.path, f"reserving {length} bytes", error) from None
        self.size = max(self.size, offset + length)

    def truncate(self, length: int) -> None:
        """Cut the file off at ``length`` bytes."""
        with self._lock:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, length)
                self.size = min(self.size, length)
            self._forget_hashes(length)

    def discard_if_empty(self) -> None:
        """Remove the file when not one byte of it could be written."""
        with contextlib.suppress(OSError):
            if not os.fstat(self._fd).st_size:
                self.path.unlink()

    def sync(self) -> None:
        """Bring everything written so far to the disk (fdatasync)."""
        try:
            with pulse.at_target():
                os.fdatasync(self._fd)
        except OSError as error:
            raise target_error(self.path, "syncing", error) from None

    def end(self) -> None:
        """Do nothing: a file ends where it ends."""

    def sync_file_system(self) -> None:
        """Bring everything of its file system to the disk: then room is given back."""
        sync_file_system(self._fd)

    def settle(self) -> None:
        """Nothing is under way behind our back."""

    def forget(self, offset: int, length: int) -> None:
        """Let the page cache drop bytes that are on the disk: what it would drop instead is needed."""
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def digests(self) -> list[str]:
        """Return the SHA-256 of each 64 MiB block, hexadecimal; reads back what was not written in order.

        None at all when the file is not ``hashed``.
        """
        if self._hashes is None:
            return []
        try:
            return self._hashes.finish(self._fd, self.size)
        except OSError as error:
            raise target_error(self.path, "reading back for SHA-256", error) from None

    def close(self) -> None:
        """Close the file; call ``sync`` first where that matters."""
        with contextlib.suppress(OSError):
            os.close(self._fd)


def digests_of(path: Path) -> list[str]:
    """Return the SHA-256 of each block of 64 MiB of a file, hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        return _BlockHashes(size).finish(fd, size)
    finally:
        os.close(fd)


class _BlockHashes:
    """SHA-256 of each block of a file that is written at offsets; ``size`` bytes of it are there already."""

    def __init__(self, size: int) -> None:
        self._open: dict[int, tuple[Any, int]] = {}  # block → (hash so far, bytes fed)
        self._done: dict[int, str] = {}
        self._dirty = set(range(-(-size // HASH_BLOCK)))
        self._hole: str | None = None

    def feed(self, pieces: Pieces, offset: int) -> None:
        for piece in pieces:
            view = memoryview(piece)
            while len(view):
                block, within = divmod(offset, HASH_BLOCK)
                part = view[: HASH_BLOCK - within]
                self._feed_block(block, within, part)
                view = view[len(part) :]
                offset += len(part)

    def forget(self, offset: int) -> None:
        """Take back what was fed from ``offset`` on: it did not get there, or was cut off."""
        first = offset // HASH_BLOCK
        for block in {block for block in (*self._open, *self._done) if block >= first}:
            self._open.pop(block, None)
            self._done.pop(block, None)
            self._dirty.add(block)

    def _feed_block(self, block: int, within: int, part: memoryview) -> None:
        if block in self._dirty:
            return
        state, fed = self._open.get(block, (None, 0))
        if fed != within or block in self._done:
            self._open.pop(block, None)
            self._done.pop(block, None)
            self._dirty.add(block)
            return
        state = state or hashlib.sha256()
        state.update(part)
        fed += len(part)
        if fed == HASH_BLOCK:
            self._done[block] = state.hexdigest()
            self._open.pop(block, None)
        else:
            self._open[block] = (state, fed)

    def finish(self, fd: int, size: int) -> list[str]:
        digests = []
        for block in range(-(-size // HASH_BLOCK)):
            expected = min(HASH_BLOCK, size - block * HASH_BLOCK)
            state, fed = self._open.get(block, (None, 0))
            if block in self._done:
                digests.append(self._done[block])
            elif state is not None and fed == expected:
                digests.append(state.hexdigest())
            elif state is None and block not in self._dirty and expected == HASH_BLOCK:  # a hole: zeros
                self._hole = self._hole or _hash_block(fd, block * HASH_BLOCK, expected)
                digests.append(self._hole)
            else:
                digests.append(_hash_block(fd, block * HASH_BLOCK, expected))
        return digests


def _hash_block(fd: int, offset: int, length: int) -> str:
    state = hashlib.sha256()
    while length > 0:
        with pulse.at_target():
            data = os.pread(fd, min(_READ_BACK, length), offset)
        if not data:
            break
        state.update(data)
        offset += len(data)
        length -= len(data)
    return state.hexdigest()


def unnamed_file(directory: Path) -> int:
    """Return a descriptor of a new file that has no name in ``directory``, and is gone with the process.

    Raises:
        OSError: there can be none.
    """
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, FILE_MODE)
    except OSError:  # not every file system knows that
        import tempfile  # with all that stands behind it

        fd, name = tempfile.mkstemp(prefix=".order-", dir=directory)
        Path(name).unlink()
        return fd


class ScratchFile:
    """What is read back of a dump that goes into a stream, or has no place for it: in a file without a name.

    Raises:
        TargetError: from every method.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            self._fd = unnamed_file(directory)
        except OSError as error:
            raise target_error(directory, "making a file for the bitmaps of a dump", error) from None

    def write_bitmap(self, bits: bytes, offset: int) -> None:
        """Write bytes that will be read back."""
        try:
            put_all(_Place(self._fd, offset).put, [bits])
        except OSError as error:
            raise target_error(self._directory, "keeping the bitmaps of the dump", error) from None

    def read_back(self, offset: int, length: int) -> bytes:
        """Return bytes written before; what was never written reads as zeros."""
        try:
            return os.pread(self._fd, length, offset).ljust(length, b"\0")
        except OSError as error:
            raise target_error(self._directory, "reading the bitmaps of the dump back", error) from None

    def close(self) -> None:
        """Let the file go."""
        os.close(self._fd)


def cut_pieces(pieces: Pieces, lengths: Iterable[int]) -> Iterator[list[bytes | memoryview]]:
    """Yield lists of pieces, or of parts of them, of ``lengths`` bytes together; the last one has what is left."""
    limits = iter(lengths)
    part: list[bytes | memoryview] = []
    room = next(limits, 0)
    for piece in pieces:
        rest = memoryview(piece)
        while len(rest) >= room > 0:
            yield [*part, rest[:room]]
            part, rest, room = [], rest[room:], next(limits, 0)
        if len(rest):
            part.append(rest)
            room -= len(rest)
    if part:
        yield part


def sync_file_system(fd: int) -> None:
    """Bring everything of the file system of an open file to its disk (syncfs(2)); another disk may hang."""
    import ctypes  # for those whose disk is full

    with pulse.at_target():
        ctypes.CDLL(None).syncfs(ctypes.c_int(fd))


def sync_directory(path: Path) -> None:
    """Bring renames and new names in a directory to the disk."""
    try:
        fsync_directory(path)
    except OSError as error:
        raise target_error(path, "syncing the directory", error) from None


def fsync_directory(path: Path) -> None:
    """Do as ``sync_directory`` does.

    Raises:
        OSError: it cannot be done.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with pulse.at_target():
            os.fsync(fd)
    finally:
        os.close(fd)
