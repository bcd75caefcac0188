"""The peer's capture image: busybox, makedumpfile with its shared objects, the disk's modules, one script.

It does what Debian's kdump-tools and Fedora's kdump do after a crash: the log, then a dump of level 31, then power off.
It is the best case of theirs: their images are the distribution's own initramfs with udev, systemd and the modules of
everything that the machine has, many times as large and slower to start. Here all that differs from our own capture
boot is the user space: kernel, modules, and the words of the kernel's command line are the same.
"""

from __future__ import annotations

import gzip
import io
import shlex
from dataclasses import dataclass
from pathlib import Path

import zstandard

from capture.dumpfile.reader import KdumpFile
from capture.errors import SourceError
from initramfs import cpio
from initramfs.errors import ImageError, ToolError
from initramfs.image import CONSOLE, NULL
from initramfs.kexec import capture_command_line
from initramfs.modules import read_module, read_tree
from initramfs.runtime import add_executable
from initramfs.tree import Directory, File, Symlink, Tree, host_program
from tests.bench.rung import Figures
from tests.guest import host
from tests.guest.cache import Kernel
from tests.guest.cases import Case
from tests.guest.crash import MODULES, TARGET_FOLDER, TARGET_LABEL, Saver, capture_words, healthy_command_line
from tests.guest.host import HostError
from tests.guest.qemu import GuestError

INIT = Path(__file__).with_name("peer-init")
IMAGE = "peer.img"
NAME = "peer"
"""What its lines on the console begin with."""
NOTES, DUMP = "peer.txt", "vmcore"
ZSTD_LEVEL = 9
KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Notes:
    """What the image noted of itself: seconds since boot, bytes, exit statuses."""

    init: float
    mounted: float
    log_status: int
    log_saved: float
    dump_status: int
    dump_saved: float
    memory_total: int
    memory_available_least: int
    peak_rss: int


def build(kernel: Kernel, folder: Path) -> None:
    """Write the image of a kernel into ``folder``, packed as that kernel can unpack it.

    Raises:
        HostError: a program or a module is missing.
    """
    archive = io.BytesIO()
    try:
        cpio.write(_tree(kernel), archive)
    except (ImageError, ToolError) as error:
        raise HostError(f"the peer's image cannot be built: {error}") from None
    (folder / IMAGE).write_bytes(packed(archive.getvalue(), zstd=takes_zstd(kernel)))


def _tree(kernel: Kernel) -> Tree:
    tree = Tree()
    for name in ("bin", "sbin", "lib", "lib64"):
        tree.add(f"/usr/{name}", Directory())
        tree.add(f"/{name}", Symlink(f"usr/{name}"))
    for point in ("/proc", "/sys", "/dev", "/tmp", "/mnt"):
        tree.add(point, Directory())
    tree.add("/dev/console", CONSOLE)
    tree.add("/dev/null", NULL)
    tree.add("/init", File(INIT, 0o755))
    tree.add("/target", File(f"LABEL={TARGET_LABEL} {TARGET_FOLDER}\n".encode()))
    tree.add("/bin/busybox", host_program(host.find("busybox").resolve()))
    add_executable(tree, host.find("makedumpfile"))
    plan = read_tree(kernel.modules_dir).plan(MODULES)
    for module in plan.modules:
        tree.add(f"/modules/{module.name}.ko", File(read_module(module.path)))
    tree.add("/modules/order", File("".join(f"{module.name}.ko\n" for module in plan.modules).encode()))
    return tree


def takes_zstd(kernel: Kernel) -> bool:
    """Whether a kernel was built to unpack zstd; Debian's initramfs-tools prefers it to gzip."""
    config = kernel.vmlinuz.with_name(f"config-{kernel.release}")
    return config.is_file() and "CONFIG_RD_ZSTD=y" in config.read_text().splitlines()


def packed(archive: bytes, *, zstd: bool) -> bytes:
    """Return an archive as an initramfs."""
    if zstd:
        return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=False).compress(archive)
    return gzip.compress(archive, mtime=0)


def saver(option: str) -> Saver:
    """Return the peer with makedumpfile's ``option`` for a codec: ``-c`` (zlib), ``-l`` (LZO)."""

    def load(case: Case, final: str, target: str, append: str) -> str:
        # The last word is makedumpfile's option; the kernel hands what it does not know itself to /init.
        words = f"{capture_words(case, append)} peer_option={option}"
        line = capture_command_line(
            healthy_command_line(case),
            (target,),
            TARGET_FOLDER,
            final,
            "shell",
            words,
            cpus=case.capture_cpus,
            boot_cpu=0,
        )
        return (
            f"kexec -p {case.kexec_option} /run/healthy/vmlinuz --initrd=/run/healthy/{IMAGE}"
            f" --command-line={shlex.quote(line)}"
        )

    return Saver(NAME, load)


def parse_notes(text: str) -> Notes:
    """Parse what the image noted.

    Raises:
        GuestError: something is missing, or is no number.
    """
    values = dict(line.split(maxsplit=1) for line in text.splitlines() if " " in line)
    try:
        return Notes(
            init=float(values["init"]),
            mounted=float(values["mounted"]),
            log_status=int(values["log_status"]),
            log_saved=float(values["log_saved"]),
            dump_status=int(values["dump_status"]),
            dump_saved=float(values["dump_saved"]),
            memory_total=int(values["memory_total"]) * KIB,
            memory_available_least=int(values["memory_available_least"]) * KIB,
            peak_rss=int(values["peak_rss"]) * KIB,
        )
    except KeyError as error:
        raise GuestError(f"{NOTES} says nothing of {error.args[0]}: the image did not come to its end") from None
    except ValueError as error:
        raise GuestError(f"{NOTES}: {error}") from None


def figures(folder: Path) -> Figures:
    """Return what a save of the peer took. It is complete when makedumpfile said so, and can open its own dump.

    Raises:
        GuestError: it noted nothing, or not all of it.
    """
    dump = folder / DUMP
    try:
        notes = parse_notes((folder / NOTES).read_text(errors="replace"))
    except FileNotFoundError:
        raise GuestError(f"{folder.name} has no {NOTES}: the image did not come to its end") from None
    failures = [
        f"{what} ended with status {status}"
        for what, status in (("the log", notes.log_status), ("makedumpfile", notes.dump_status))
        if status
    ]
    pages = 0
    if not failures:
        try:
            host.run("makedumpfile", "--dump-dmesg", dump, folder / "log-of-the-dump.txt")
            with KdumpFile(dump) as opened:
                pages = opened.page_count()
        except (HostError, SourceError) as error:
            failures.append(f"the dump does not open: {error}")
    return Figures(
        complete=not failures,
        memory_total=notes.memory_total,
        memory_least=notes.memory_available_least,
        peak_rss=notes.peak_rss,
        start=notes.mounted,
        first_byte=notes.log_saved,
        end=notes.dump_saved,
        dump_seconds=notes.dump_saved - notes.log_saved,
        dump_pages=pages,
        dump_size=dump.stat().st_size if dump.exists() else 0,
        reason="; ".join(failures),
    )
