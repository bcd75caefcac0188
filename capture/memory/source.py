"""Where the dead kernel's bytes come from: a file-like thing addressed by offset, mapped where it can be.

Three things are read this way: ``/proc/vmcore``, an ELF core file, and old memory itself through ``/dev/mem`` or
``/dev/oldmem`` (the raw hand-over, ``oldmem:``). A failed read is an ``OSError`` here; what it means for a page is
decided in ``capture.memory.image``.

Why a mapped page cannot kill the process. Touching a mapping may raise SIGBUS: past the end of a file that became
shorter, or when the disk below it fails. Each window is therefore faulted in by the kernel first
(``MADV_POPULATE_READ``, since 5.14), which answers EFAULT where the touch would have been a SIGBUS. Mappings of
``/proc/vmcore`` and ``/dev/mem`` have no faults to take: the kernel fills their page tables during ``mmap``
(``remap_pfn_range``) and refuses this advice with EINVAL. A kernel that does not know the advice gets ``pread``.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
from pathlib import Path
from types import TracebackType
from typing import Protocol

from capture import pulse
from capture.errors import SourceError

OLDMEM = "oldmem:"
PROC_VMCORE = "/proc/vmcore"
PROC_KCORE = "/proc/kcore"
"""The running kernel's own memory, as an ELF core."""
COMMAND_LINE = Path("/proc/cmdline")
DEVICE_TREE_HEADER = Path("/proc/device-tree/chosen/linux,elfcorehdr")
"""Where arm64's kexec hands the ELF core header over: address and size, big endian, 64 bits each
(Documentation/devicetree/bindings/chosen.txt)."""

MADV_POPULATE_READ = 22
"""include/uapi/asm-generic/mman-common.h, since 5.14."""

_MMAP_REFUSED = frozenset({errno.EINVAL, errno.ENODEV, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP})
_SIZE_SUFFIX = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


class ByteSource(Protocol):
    """What the dead kernel's bytes are read from, by offset. See Source, and capture.dumpfile.source."""

    name: str
    size: int | None
    header_offset: int
    remedy: str
    map_refused: str | None

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes, fewer only at the end of the source; raises OSError."""

    def map(self, offset: int, length: int) -> memoryview | None:
        """Return a read-only view, None where this source cannot be mapped; raises OSError."""


class Source:
    """Bytes by offset.

    ``size`` is the number of bytes, or None where there is no end to speak of (physical memory). ``header_offset``
    is where the ELF header lies; program headers count from it, segment data does not (physical addresses in a raw
    hand-over). ``remedy`` is what to tell a person when a read of the header is refused.
    """

    def __init__(
        self, path: str, *, size: int | None = None, header_offset: int = 0, can_map: bool = True, remedy: str = ""
    ) -> None:
        self.name = path
        self.header_offset = header_offset
        self.remedy = remedy
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a pipe would be waited for
        except FileNotFoundError:
            hint = "; this is not a crash boot" if path == PROC_VMCORE else "; check the path"
            raise SourceError(f"{path}: no such file{hint}") from None
        except OSError as error:
            remedy = "; check its permissions" if error.errno == errno.EACCES else ""
            raise SourceError(f"{path}: cannot be opened: {error.strerror}{remedy}") from None
        mode = os.fstat(self._fd)
        if stat.S_ISDIR(mode.st_mode):
            self.close()
            raise SourceError(f"{path}: is a directory; name the vmcore itself")
        if stat.S_ISFIFO(mode.st_mode) or stat.S_ISSOCK(mode.st_mode):
            self.close()
            raise SourceError(f"{path}: is a pipe; a vmcore is read at any offset: name a file")
        self.size = mode.st_size if size is None and stat.S_ISREG(mode.st_mode) else size
        self._prefilled = stat.S_ISCHR(mode.st_mode) or _on_procfs(path)
        self._can_map = can_map and (self._prefilled or _populate_works())
        self._can_read = not stat.S_ISCHR(mode.st_mode) or not can_map
        self.map_refused: str | None = None
        """Why this source is read rather than mapped, once that is known."""

    def read(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes at ``offset``, fewer only at the end of the source.

        Raises:
            OSError: the kernel did not give them (EIO, EFAULT, EPERM ...).
        """
        if not self._can_read:
            # read() of /dev/mem stops at the capture kernel's own high_memory; only mmap reaches old memory.
            return bytes(self.map(offset, length) or b"")
        pieces: list[bytes] = []
        while length > 0:
            piece = os.pread(self._fd, length, offset)
            pulse.beat()
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def map(self, offset: int, length: int) -> memoryview | None:
        """Return a read-only view of ``length`` bytes at ``offset``, or None where this source cannot be mapped.

        The view keeps its mapping alive; nothing is to be closed.

        Raises:
            OSError: this range cannot be mapped or would fault.
        """
        if not self._can_map:
            return None
        if self.size is not None and offset + length > self.size:
            raise OSError(errno.ENXIO, "beyond the end of the source")
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        span = offset - start + length
        try:
            window = mmap.mmap(self._fd, span, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=start)
        except ValueError as error:  # the file became shorter since it was opened
            raise OSError(errno.ENXIO, str(error)) from None
        except OverflowError as error:
            raise OSError(errno.EFBIG, str(error)) from None
        except OSError as error:
            if error.errno in _MMAP_REFUSED and self._can_read:
                self._can_map = False
                self.map_refused = f"mmap of {self.name} was refused ({error.strerror}): reading instead, slower"
                return None
            raise
        if not self._prefilled:
            window.madvise(MADV_POPULATE_READ)
        pulse.beat()
        return memoryview(window)[offset - start :]

    def close(self) -> None:
        """Close the file. Views already handed out stay valid."""
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def open_source(name: str, *, can_map: bool = True) -> Source:
    """Open SOURCE as the command line names it: a path, or ``oldmem:`` for the raw hand-over.

    Without ``can_map`` a path is read where it could be mapped.

    Raises:
        SourceError: it does not exist or cannot be opened.
    """
    return open_old_memory() if name == OLDMEM else Source(name, can_map=can_map)


def is_crash_boot() -> bool:
    """Whether this kernel was booted by a crash, and has a dead one to save."""
    return Path(PROC_VMCORE).exists() or core_header_address() is not None


def core_header_address() -> int | None:
    """Return the physical address of the ELF core header that this kernel was handed, None outside of a crash boot."""
    found = elfcorehdr(COMMAND_LINE.read_text(errors="replace"))
    if found is None:
        with contextlib.suppress(OSError):
            found = int.from_bytes(DEVICE_TREE_HEADER.read_bytes()[:8], "big") or None
    return found


def open_old_memory() -> Source:
    """Open old memory through ``/dev/oldmem`` (up to 5.17) or ``/dev/mem``, headers where they were handed over.

    Raises:
        SourceError: this is not a crash boot, or neither device is there.
    """
    header = core_header_address()
    if header is None:
        raise SourceError(
            "oldmem: no elfcorehdr= on this kernel's command line: only a kernel that was booted by a crash has old "
            "memory; name a vmcore file instead"
        )
    if Path("/dev/oldmem").exists():
        return Source("/dev/oldmem", header_offset=header, can_map=False)
    return Source(
        "/dev/mem",
        header_offset=header,
        remedy="the kernel lets old memory be read only with iomem=relaxed on its command line, where vmcapture load "
        "puts it; use /proc/vmcore",
    )


def elfcorehdr(command_line: str) -> int | None:
    """Return the physical address of the ELF core header from ``elfcorehdr=[size[KMG]@]offset[KMG]``.

    The last one on the line counts, as in the kernel (``setup_elfcorehdr``, kernel/crash_dump.c). None when there
    is none, or none that can be read.
    """
    found = None
    for word in command_line.split():
        key, _, value = word.partition("=")
        if key == "elfcorehdr":
            found = value
    if found is None:
        return None
    return memparse(found.rpartition("@")[2])


def memparse(text: str) -> int | None:
    """Parse a number as the kernel's ``memparse`` does: decimal, 0x or leading-0 octal, then K, M, G or T."""
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGTkmgt]?)", text)
    if match is None:
        return None
    digits = match[1]
    base = 16 if digits[:2].lower() == "0x" else 8 if digits.startswith("0") else 10
    try:
        return int(digits, base) << _SIZE_SUFFIX[match[2].upper()]
    except ValueError:
        return None


def _on_procfs(path: str) -> bool:
    with contextlib.suppress(OSError):
        return os.stat(path).st_dev == os.stat("/proc/self").st_dev  # noqa: PTH116
    return False


def _populate_works() -> bool:
    """Whether this kernel knows MADV_POPULATE_READ."""
    with contextlib.suppress(OSError), mmap.mmap(-1, mmap.PAGESIZE) as probe:
        probe.madvise(MADV_POPULATE_READ)
        return True
    return False
