"""Builds the capture image: an initramfs whose stage one mounts a squashfs with the interpreter, us and busybox."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from capture.boot.hooks import AFTER, BEFORE
from capture.dumpfile.output import not_replaced
from capture.errors import CaptureError
from initramfs import cpio, runtime, scripts, tools
from initramfs.errors import ImageError, ToolError
from initramfs.estimate import unpacked_size
from initramfs.modules import LoadPlan, ModuleTree, firmware, modinfo, module_name, read_module, read_tree, uses
from initramfs.tree import Device, Directory, File, Symlink, Tree, host_file, host_program

SCRIPTS = Path(__file__).parent
"""Where init and the other shell scripts of the image are."""
SQUASHFS_MODULES = ("loop", "squashfs")
BUSYBOX_PACKAGE = "busybox-static (Fedora calls it busybox)"
MODULES = "/modules"
LOAD_ORDER = f"{MODULES}/order"
ROOT_IMAGE = "/root.squashfs"
NEW_ROOT = "/newroot"
MOUNT_POINTS = ("/proc", "/sys", "/dev", "/run", "/tmp", "/mnt", "/root", "/var/crash")
ROOM, FULL = 128 << 20, 16 << 20
"""Bytes for temporary files: what is enough (all is there twice, once packed), and what is as good as nothing."""
SQUASHFS_LEVEL = 15  # 19 takes three times as long for 1 % of the size
GZIP_LEVEL = 9
FIRMWARE = Path("/lib/firmware")
# The endings that the kernel tries, if it was built so (drivers/base/firmware_loader/main.c).
FIRMWARE_SUFFIXES = ("", ".zst", ".xz")
# Documentation/admin-guide/devices.txt
CONSOLE = Device(5, 1)
NULL = Device(1, 3, mode=0o666)
OWN = "vmcapture"
"""The builder of images that is this one."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What to build."""

    output: Path
    kernel_release: str
    modules_dir: Path  # …/lib/modules/<release>
    modules: tuple[str, ...]  # wanted besides squashfs and loop
    optional_modules: tuple[str, ...] = ()  # taken where this kernel has them, reported where not
    welcome_modules: tuple[str, ...] = ()  # taken where this kernel has them, loaded last
    watchdog_modules: tuple[str, ...] = ()  # as optional ones, loaded first: a watchdog that runs has to be fed soon
    module_options: tuple[tuple[str, str], ...] = ()  # (module, "key=value …"), several for a module add up
    firmware_dir: Path = FIRMWARE  # where the host keeps what the modules ask for
    python_roots: tuple[str, ...] = ("capture",)
    launcher_module: str = "capture"  # what /usr/bin/vmcapture runs
    binaries: tuple[Path, ...] = ()  # extra executables, with their shared objects
    files: tuple[tuple[str, Path | bytes], ...] = ()  # (path in the image, host file or what is in it)
    before: tuple[Path, ...] = ()  # the administrator's programs, which the capture kernel runs before the save
    after: tuple[Path, ...] = ()  # and after it
    squashfs: bool | None = None  # None: where mksquashfs and the kernel's squashfs and loop exist
    builder: str = OWN  # who makes the image: one of initramfs.builders.BUILDERS


@dataclass(frozen=True, slots=True)
class ImageReport:
    """What was built."""

    path: Path
    size: int
    squashfs: bool
    kernel_release: str
    modules: tuple[str, ...]  # in load order
    missing_modules: tuple[str, ...]  # optional ones that this kernel does not have
    runtime_size: int  # bytes of the runtime tree, unpacked
    sources: tuple[Path, ...] = ()  # files of the host that it was made from: when one changes, it is out of date


@dataclass(frozen=True, slots=True)
class Parts:
    """What every image of ours is made of, whoever packs it. It is gone with its scratch directory."""

    request: ImageRequest
    plan: LoadPlan
    squashfs: bool
    busybox: Path
    root: Tree  # the system that the job runs in
    scratch: Path
    _modules: tuple[Path, ...]  # of Python

    def packed_root(self) -> Path:
        """Return that system as a squashfs."""
        return _make_squashfs(self.root, self.scratch)

    def module_lines(self, suffix: str = "") -> bytes:
        """Return the list of what to load, first to last: a line each, its name and its options."""
        return _text(
            [" ".join((f"{module.name}{suffix}", *self._options_of(module.name))) for module in self.plan.modules]
        )

    def _options_of(self, module: str) -> Iterator[str]:
        return (options for of, options in self.request.module_options if of == module)

    def report(self, image: Tree, path: Path, size: int) -> ImageReport:
        """Return what was built, and out of what: ``image`` is the tree that was written."""
        used = {*self.root.host_files(), *image.host_files(), *self._modules, *_module_files(self.plan, self.request)}
        return ImageReport(
            path=path,
            size=size,
            squashfs=self.squashfs,
            kernel_release=self.request.kernel_release,
            modules=tuple(module.name for module in self.plan.modules),
            missing_modules=self.plan.missing,
            runtime_size=self.root.size(),
            sources=tuple(sorted(source for source in used if not source.is_relative_to(self.scratch))),
        )


@contextmanager
def prepared(request: ImageRequest) -> Iterator[Parts]:
    """Yield what an image is made of; an OSError while it is packed becomes a line as well.

    Raises:
        CaptureError: something is missing.
    """
    kernel = read_tree(request.modules_dir)
    squashfs = _wants_squashfs(request.squashfs, kernel)
    wanted = (*(SQUASHFS_MODULES if squashfs else ()), *request.modules)
    plan = kernel.plan(wanted, request.optional_modules, request.welcome_modules, first=request.watchdog_modules)
    busybox = static_busybox()
    try:
        with tempfile.TemporaryDirectory(prefix="vmcapture-") as name, _room_to_work(Path(name)):
            scratch = Path(name)
            traced = runtime.trace(request.python_roots)
            # What runs before the job has a busybox of its own, and lends it to the squashfs (a bind mount).
            program = File(b"", 0o755) if squashfs else host_program(busybox)
            root = _runtime_tree(request, traced, busybox, program, scratch)
            yield Parts(request, plan, squashfs, busybox, root, scratch, traced.modules)
    except OSError as error:
        raise ImageError(f"{error.filename or request.output}: {error.strerror}") from error


@contextmanager
def _room_to_work(scratch: Path) -> Iterator[None]:
    """Say of what fails inside that there is no room for temporary files, where that is so: little else says it.

    Raises:
        ImageError: instead of any error, when there is no room.
    """
    try:
        yield
    except (CaptureError, OSError) as error:
        free = shutil.disk_usage(scratch).free
        if free >= FULL:
            raise
        said = error.strerror if isinstance(error, OSError) else error
        raise ImageError(
            f"{scratch.parent} is full ({free >> 20} MiB are free), where an image is put together: make room, "
            f"{ROOM >> 20} MiB, or name another directory: TMPDIR=/var/tmp ({said})"
        ) from error


def build_image(request: ImageRequest) -> ImageReport:
    """Build the image; the output appears whole or not at all."""
    with prepared(request) as parts:
        if parts.squashfs:
            stage_one = Tree()
            stage_one.add(ROOT_IMAGE, File(parts.packed_root()))
        else:
            stage_one = parts.root
        _add_stage_one(stage_one, parts.busybox)
        _add_modules(stage_one, parts)
        size = _write(stage_one, request.output, compress=not parts.squashfs)
        return parts.report(stage_one, request.output, size)


def load_order(image: Path) -> str:
    """Return what an image says of its modules: a line each, first to last, its file and its options.

    Raises:
        ImageError: it is none of ours.
    """
    try:
        with image.open("rb") if unpacked_size(image) is None else gzip.open(image, "rb") as archive:
            order = cpio.content(cast("BinaryIO", archive), LOAD_ORDER)
    except (ImageError, OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{image}: not an image of vmcapture initramfs: {error}") from error
    if order is None:
        raise ImageError(f"{image}: not an image of vmcapture initramfs: no {LOAD_ORDER} in it")
    return order.decode(errors="replace")


def ordered_names(order: str) -> list[str]:
    """Return the names of the modules in a load order."""
    return [module_name(line.split()[0]) for line in order.splitlines() if line.split()]


def _wants_squashfs(choice: bool | None, kernel: ModuleTree) -> bool:
    lacking = [name for name in SQUASHFS_MODULES if not kernel.has(name)]
    if not lacking and not reads_zstd(kernel):
        lacking = ["zstd in its squashfs"]
    if choice is None:
        return not lacking and tools.find("mksquashfs") is not None
    if choice and lacking:
        raise ImageError(f"{kernel.directory}: this kernel has no {' and no '.join(lacking)}; use --no-squashfs")
    return choice


def reads_zstd(kernel: ModuleTree) -> bool:
    """Tell whether the kernel's squashfs can be packed as ours is (CONFIG_SQUASHFS_ZSTD); where nobody knows, it can.

    A module has then symbols of the decompressor, ``zstd_…`` or (before 5.16) ``ZSTD_…``, which it takes from others.
    """
    module = kernel.files.get("squashfs")
    if module is not None:
        taken = uses(module)
        return not taken or any(name.lower().startswith("zstd_") for name in taken)
    configuration = _kernel_configuration(kernel.directory)
    return configuration is None or "CONFIG_SQUASHFS_ZSTD=y" in configuration.splitlines()


def _kernel_configuration(modules_dir: Path, root: Path = Path("/")) -> str | None:
    """Return how a kernel was configured, where that is kept: with its modules, in /boot, in the kernel that runs."""
    release = modules_dir.name
    for place in (modules_dir / "config", root / "boot" / f"config-{release}"):
        with contextlib.suppress(OSError):
            return place.read_text(encoding="utf-8", errors="replace")
    if release == os.uname().release:
        with contextlib.suppress(OSError, EOFError, zlib.error):
            return gzip.decompress((root / "proc/config.gz").read_bytes()).decode(errors="replace")
    return None


def static_busybox() -> Path:
    """Return the host's busybox, which needs no shared objects."""
    found = tools.find("busybox")
    if found is None:
        raise ToolError(f"busybox was not found: install {BUSYBOX_PACKAGE}")
    if runtime.program_loader(found) is not None:
        raise ToolError(f"{found} is linked to shared objects, stage one needs a static one: install {BUSYBOX_PACKAGE}")
    return found.resolve()


def _module_files(plan: LoadPlan, request: ImageRequest) -> Iterator[Path]:
    """Yield what the kernel's modules came from; depmod writes the list anew whenever one comes, goes or changes."""
    yield request.modules_dir / "modules.dep"
    for module in plan.modules:
        yield module.path


def _runtime_tree(request: ImageRequest, traced: runtime.Runtime, busybox: Path, program: File, scratch: Path) -> Tree:
    """Lay out the system that the job runs in; the extra files win over ours, real programs over busybox's.

    ``program`` is what stands for ``busybox`` in it.
    """
    tree = Tree()
    for name in ("bin", "sbin", "lib", "lib64"):
        tree.add(f"/usr/{name}", Directory())
        tree.add(f"/{name}", Symlink(f"usr/{name}"))
    for point in MOUNT_POINTS:
        tree.add(point, Directory())
    for place, content in request.files:
        tree.add(place, host_file(content) if isinstance(content, Path) else File(content))
    runtime.lay_out(traced, tree, request.launcher_module, scratch)
    for binary in (*request.binaries, *request.before, *request.after):
        for program_file in (binary, *scripts.interpreters(binary)):
            runtime.add_executable(tree, program_file)
    for place, hooks in ((BEFORE, request.before), (AFTER, request.after)):
        for number, hook in enumerate(hooks):
            tree.add(f"{place}/{number:03}", Symlink(str(hook)))
    tree.add("/bin/busybox", program)
    for applet in set(tools.run([busybox, "--list-full"]).split()) - {"linuxrc"}:
        tree.add(f"/{applet}", Symlink("/bin/busybox"))
    return tree


def _make_squashfs(tree: Tree, scratch: Path) -> Path:
    mksquashfs = tools.require("mksquashfs", "squashfs-tools")
    directory, image = scratch / "root", scratch / "root.squashfs"
    directory.mkdir()
    tree.write(directory)
    # Its own wish for a time stamp clashes with the options that set one.
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    tools.run(
        [
            mksquashfs,
            directory,
            image,
            "-comp",
            "zstd",
            "-Xcompression-level",
            str(SQUASHFS_LEVEL),
            "-all-root",
            "-root-mode",
            "755",
            "-mkfs-time",
            "0",
            "-all-time",
            "0",
            "-no-xattrs",
            "-no-progress",
            "-quiet",
        ],
        environment=environment,
    )
    return image


def _add_stage_one(tree: Tree, busybox: Path) -> None:
    tree.add("/init", File(SCRIPTS / "init", 0o755))
    tree.add("/functions", File(SCRIPTS / "functions"))
    tree.add("/bin/busybox", host_program(busybox))
    for directory in ("/proc", "/sys", "/dev", NEW_ROOT):
        tree.add(directory, Directory())
    tree.add("/dev/console", CONSOLE)
    tree.add("/dev/null", NULL)


def _add_modules(tree: Tree, parts: Parts) -> None:
    """Add the modules, the order to load them in with their options, and the firmware that they may ask for then."""
    for module in parts.plan.modules:
        tree.add(f"{MODULES}/{module.name}.ko", File(read_module(module.path)))
        for path in _firmware_files(module.path, parts.request):
            tree.add(str(FIRMWARE / path.relative_to(parts.request.firmware_dir)), host_file(path))
    tree.add(LOAD_ORDER, File(parts.module_lines(".ko")))


def _firmware_files(module: Path, request: ImageRequest) -> Iterator[Path]:
    """Yield what the host has of a module's firmware, in each place where the kernel looks for it."""
    release = request.kernel_release
    for name in firmware(modinfo(module)):
        for place in (f"updates/{release}", "updates", release, "."):
            for suffix in FIRMWARE_SUFFIXES:
                path = request.firmware_dir / place / f"{name}{suffix}"
                if path.is_file():
                    yield path


def _text(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _write(tree: Tree, output: Path, *, compress: bool) -> int:
    with written_whole(output) as draft, draft.open("wb") as file:
        if compress:
            with gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=file, mtime=0) as packed:
                cpio.write(tree, packed)
        else:
            cpio.write(tree, file)
        return file.tell()


@contextmanager
def written_whole(output: Path) -> Iterator[Path]:
    """Yield a new file beside ``output``, readable by its owner alone, which takes its place once it is on the disk.

    Nothing is left of it where it is not finished.

    Raises:
        ImageError: it cannot be made, brought to the disk or put into its place.
    """
    draft = _draft_beside(output)
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(output)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        # An error without a name is one of writing; a file of the system that cannot be read has its own.
        if isinstance(error, OSError) and error.filename in (None, str(draft)):
            raise _not_written(output, error) from None
        raise


def _draft_beside(output: Path) -> Path:
    try:
        refusal = not_replaced(output)
        if refusal is None:
            output.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
            os.close(handle)
            return Path(name)
    except OSError as error:
        raise _not_written(output, error) from None
    raise ImageError(f"{output}: {refusal}; name the file to write")


def _not_written(output: Path, error: OSError) -> ImageError:
    return ImageError(f"{output}: cannot be written: {error.strerror or error}; name another place")
