"""Measures how much memory a capture kernel needs: crashes guests that run its kernel in QEMU, with its image.

The guest's healthy system is ``init-measure`` with busybox and kexec, no interpreter: it boots in seconds, and what it
arms the guest with is what ``vmcapture load`` would have given to kexec. Kernel and image lie on the disk that the
capture kernel then saves to; the manifest that it writes there says how much memory was left at the least.

What QEMU cannot show is what the drivers of this machine's own devices take: their modules are in memory, as they are
in the image, but they find nothing to drive. ``DRIVER`` is set aside for each of them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capture.boot import config
from capture.boot.config import BootConfig
from capture.dumpfile.output import MANIFEST
from capture.errors import CaptureError
from initramfs import cpio, kexec, modules, qemu, runtime, tools
from initramfs.errors import ImageError, MeasureError, NotSavedError
from initramfs.estimate import MIB, STEP
from initramfs.image import CONSOLE, LOAD_ORDER, MODULES, NULL, load_order, ordered_names, static_busybox
from initramfs.modules import KernelModule, ModuleTree
from initramfs.qemu import Deadline, Guest
from initramfs.tree import Directory, File, Symlink, Tree

GUEST_MODULES = ("virtio_pci", "virtio_blk", "ext4")
"""What drives the guest's disk and mounts it."""
CONTROLLERS = ("pci:", "virtio:", "vmbus:", "xen:", "acpi")
"""How the aliases of a module begin that drives a controller, and so has memory for the device to work in."""
DRIVER = 4 * MIB
"""For a driver that found no device: queues and buffers. nvme, virtio_scsi and vmw_pvscsi, given QEMU's devices, took
2.5 MiB together (6.1, one CPU); a RAID controller that nobody can emulate may take more than one of them."""
SPARE = 8 * MIB
"""What a measured capture kernel has to have left at the least: a larger machine takes up to 5 MiB more
(tests/bench/memory.py, 1 TiB), and no two runs take the same."""
STEPS_UP = 4
GUEST_MEMORY = 1 << 30
GUEST_WORDS = "console=ttyS0 no_timer_check"
"""Without KVM, on a busy host, QEMU's timer may be too slow for the kernel's test of it, which ends in a panic."""
TARGET_LABEL = "vmcapture"
TARGET_SIZE = "2G"  # a sparse file
DEADLINE = 1200
"""Seconds for all runs: one takes 16 s without KVM on two CPUs, and many times as long on a busy host."""
KVM_BOOT = 60.0
"""Seconds until a guest must be up with KVM."""
PATIENCE = 3
"""A run that takes so many times as long as one that succeeded hangs."""
SHORTEST = 5.0
"""Seconds: with KVM a run takes little more, and a moment in which the host is busy says nothing then."""

OTHER_BUILDER = (
    "guests are crashed with images of vmcapture's own builder alone, and this one is not (but of dracut or "
    "initramfs-tools?): crash this machine with it, vmcapture test --crash, or measure ours, vmcapture estimate "
    "--builder vmcapture"
)
UP = "vmcapture-measure: up"
FAILED = "vmcapture-measure: failed: "
CRASHED = "Kernel panic - not syncing: sysrq triggered crash"
SAYS = "vmcapture: "
SHELL = "vmcapture# "  # the rescue shell's prompt: somebody is waited for


@dataclass(frozen=True, slots=True)
class Run:
    """One complete save. Sizes in bytes; ``memory_total`` and the others are the manifest's."""

    reservation: int
    memory_total: int
    memory_available_least: int
    peak_rss: int


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured: the run at the reservation that is to be used. Sizes in bytes."""

    run: Run
    failed: tuple[tuple[int, str], ...]  # reservations that were too small, and what was seen
    spare: int  # what had to be left at the least
    drivers: tuple[str, ...]  # modules of the image that found no device
    release: str
    accelerator: str
    cpus: int
    image: int
    target: int
    guest_memory: int

    @property
    def parameter(self) -> str:
        """The word for the running kernel's command line."""
        return f"crashkernel={self.run.reservation >> 20}M"

    def lines(self) -> list[str]:
        """Return it as lines for a person."""
        run = self.run
        left = run.memory_available_least
        used = run.memory_total - left
        of_it = f"image {self.image / MIB:.1f}, job {run.peak_rss / MIB:.1f} (peak RSS), drivers"
        parts = (
            ("kernel", run.reservation - run.memory_total, "text, data, page structures"),
            ("used", used, f"at the most: {of_it}"),
            ("left", left, f"at the least; {self.spare / MIB:.0f} MiB are wanted"),
        )
        lines = [self.parameter, *(f"  {name:8}{size / MIB:6.1f} MiB  {why}" for name, size, why in parts)]
        lines.append(
            f"  measured in QEMU ({self.accelerator}), {self.release}, CPUs {self.cpus}, of a machine with "
            f"{self.guest_memory >> 20} MiB: complete save at {run.reservation >> 20}M, {left / MIB:.0f} MiB left "
            f"at the least, peak RSS {run.peak_rss / MIB:.0f} MiB"
        )
        lines += [f"  not at {reservation >> 20}M: {why}" for reservation, why in self.failed]
        if self.drivers:
            lines.append(
                f"  not measured: the devices of {', '.join(self.drivers)}, which QEMU does not have: "
                f"{DRIVER // MIB} MiB for each are in the spare that is wanted"
            )
        if self.target:
            lines.append(
                f"  not measured: a save to the target itself; the guest's goes to a disk: {self.target / MIB:.0f} MiB "
                "for it are in the spare that is wanted"
            )
        lines.append("  not measured: what drivers that are built into the kernel take for devices of this machine")
        return lines

    def values(self) -> dict[str, Any]:
        """Return it for JSON, in bytes."""
        return {
            **asdict(self.run),
            "spare_wanted": self.spare,
            "too_small": [{"reservation": reservation, "why": why} for reservation, why in self.failed],
            "drivers_without_device": list(self.drivers),
            "kernel_release": self.release,
            "accelerator": self.accelerator,
            "guest_memory": self.guest_memory,
        }


@dataclass(frozen=True, slots=True)
class Request:
    """What to measure: a kernel with its modules, and a capture image for it that takes ``image_memory`` bytes.

    ``target_memory`` bytes have to be left for the target: the guests save to a disk.
    """

    kernel: Path
    modules_dir: Path
    image: Path
    image_memory: int
    first: int  # the reservation to begin with, in bytes
    cpus: int = 1
    deadline: int = DEADLINE  # seconds
    append: str = ""  # more words for the capture kernel's command line
    target_memory: int = 0


def measure(request: Request, scratch: Path, say: Callable[[str], object]) -> Measurement:
    """Crash guests until the smallest reservation is known that leaves what has to be left.

    ``scratch`` is a directory to be made, for some 200 MB; ``say`` is told what goes on.

    Raises:
        MeasureError: it cannot be measured here.
        ToolError: a program is missing, or failed.
        ImageError: there is something wrong with the image or the modules.
    """
    lab = Laboratory(request, scratch, say)
    spare = SPARE + DRIVER * len(lab.drivers) + request.target_memory
    run, failed = search(request.first, spare, lab.crash)
    return Measurement(
        run=run,
        failed=failed,
        spare=spare,
        drivers=lab.drivers,
        release=request.modules_dir.absolute().name,
        accelerator=lab.accelerators[0],
        cpus=request.cpus,
        image=request.image_memory,
        target=request.target_memory,
        guest_memory=guest_memory(run.reservation),
    )


def search(first: int, spare: int, crash: Callable[[int], Run]) -> tuple[Run, tuple[tuple[int, str], ...]]:
    """Return the run with the smallest reservation that leaves ``spare`` bytes, and what was seen at smaller ones.

    From what the first run leaves follows which smaller reservation should do; it is tried, and the next larger one
    when it does not.

    Raises:
        MeasureError: not even STEPS_UP steps more than the first are enough, or ``crash`` raised it for another reason
            before there was a run to return.
    """
    failed: dict[int, str] = {}

    def enough(reservation: int) -> Run | None:
        try:
            run = crash(reservation)
        except NotSavedError as error:
            failed[reservation] = str(error)
            return None
        left = run.memory_available_least
        if left >= spare:
            return run
        failed[reservation] = f"{left / MIB:.0f} MiB were left at the least, {spare / MIB:.0f} are wanted"
        return None

    candidates = (first + steps * STEP for steps in range(STEPS_UP + 1))
    good = next((run for run in map(enough, candidates) if run is not None), None)
    if good is None:
        raise MeasureError(f"nothing up to {max(failed) >> 20}M was enough: {failed[max(failed)]}")
    surplus = (good.memory_available_least - spare) // STEP * STEP
    smallest = max([good.reservation - surplus, *(reservation + STEP for reservation in failed)])
    for reservation in range(smallest, good.reservation, STEP):
        try:
            run = enough(reservation)
        except CaptureError as error:  # no word on the reservation: what has been measured stays true
            failed[reservation] = f"not measured: {error}"
            break
        if run is not None:
            good = run
            break
    return good, tuple(sorted(failed.items()))


def guest_memory(reservation: int) -> int:
    """Return the bytes of memory of a guest that reserves so much: there is enough left for its healthy system."""
    return max(GUEST_MEMORY, 2 * reservation + (GUEST_MEMORY >> 1))


class Laboratory:
    """What the guests of one measurement share."""

    def __init__(self, request: Request, scratch: Path, say: Callable[[str], object]) -> None:
        _refuse_other_builders(request.image)  # no program that is missing would help
        self._qemu = qemu.find()
        self._mke2fs = tools.require("mke2fs", "e2fsprogs")
        self._debugfs = tools.require("debugfs", "e2fsprogs")
        kexec_program = tools.require("kexec", "kexec-tools")
        self._request = request
        self._scratch = scratch
        self._say = say
        self._deadline = Deadline(request.deadline)
        self._patience = float(request.deadline)  # seconds for a run
        self._taken = 0.0  # seconds that the last one took
        self.accelerators = qemu.accelerators()
        """The first of them is used, and given up when no guest comes up with it."""
        tree = modules.read_tree(request.modules_dir)
        disk_modules = tree.plan(GUEST_MODULES).modules
        self._contents = scratch / "disk"
        self._contents.mkdir(parents=True)
        self._kernel = self._contents / "vmlinuz"
        _copy(request.kernel, self._kernel)
        names = add_modules(request.image, self._contents / "capture.img", disk_modules)
        self.drivers = without_device(tree, names)
        self._initrd = scratch / "healthy.img"
        write_healthy(self._initrd, kexec_program, disk_modules, capture_line(request.cpus, request.append))

    def crash(self, reservation: int) -> Run:
        """Crash one guest that reserves so many bytes, and return what its capture kernel found.

        Raises:
            NotSavedError: the capture kernel did not save everything, or did not fit into the reservation.
            MeasureError: the guest did not come as far as to crash, or time is up.
            ToolError: QEMU or a program around it failed.
        """
        memory = guest_memory(reservation)
        qemu.check_memory(memory)
        disk = self._scratch / "target.ext4"
        disk.unlink(missing_ok=True)
        filled: list[str | Path] = ["-L", TARGET_LABEL, "-m", "0", "-d", self._contents, disk, TARGET_SIZE]
        tools.run([self._mke2fs, "-q", "-F", "-t", "ext4", *filled])
        guest = Guest(
            kernel=self._kernel,
            initrd=self._initrd,
            # A panic without a capture kernel ends the guest, too.
            command_line=f"{GUEST_WORDS} panic=-1 crashkernel={reservation >> 20}M",
            disk=disk,
            memory=memory,
            cpus=self._request.cpus + (self._request.cpus > 1),  # more than one: the firmware's CPU stays asleep
        )
        self._say(f"crashing a guest in QEMU ({self.accelerators[0]}) with crashkernel={reservation >> 20}M")
        console = self._run(guest)
        run = self._read(reservation, disk, console)
        self._patience = min(self._patience, PATIENCE * max(self._taken, SHORTEST))
        return run

    def _run(self, guest: Guest) -> str:
        """Run it to its end, and return the console; the guest has crashed.

        Raises:
            NotSavedError: nothing could be loaded into so little memory, or nothing was saved in time.
            MeasureError: it has not crashed for another reason; or time is up.
        """
        while True:
            accelerator, *slower = self.accelerators
            boot = Deadline(KVM_BOOT) if slower else None
            limit = Deadline(min(self._patience, self._deadline.left))
            words = qemu.command(self._qemu, guest, accelerator)
            log = self._scratch / "console.log"
            try:
                console = qemu.run(words, log, limit, hopeless=SHELL, up=(UP, boot) if boot else None)
            except CaptureError as error:
                if not slower:
                    raise
                why = str(error)
            else:
                if UP in console or not slower:
                    break
                why = last_words(console)
            self._say(f"no guest comes up with {accelerator} ({why}): trying {slower[0]}")
            self.accelerators = tuple(slower)
        self._taken = limit.seconds - limit.left
        if not self._deadline.left:
            raise MeasureError(f"not done within {self._deadline.seconds:.0f} s; last seen: {last_words(console)}")
        if CRASHED not in console:
            why = last_words(console)
            if kexec.finds_no_hole(why):
                raise NotSavedError(f"kernel and image do not fit into the reserved memory: {why}")
            raise MeasureError(f"the guest did not come to its crash: {why}")
        if not limit.left:
            raise NotSavedError(f"nothing saved within {limit.seconds:.0f} s; last seen: {last_words(console)}")
        return console

    def _read(self, reservation: int, disk: Path, console: str) -> Run:
        """Return what the manifest on the disk says.

        Raises:
            NotSavedError: there is none, or it says that not everything was saved.
            MeasureError: it says something else than was asked for.
        """
        try:
            manifest = json.loads(self._manifest(disk))
            complete, level = manifest["complete"], (manifest["dump"] or {}).get("level")
            machine = manifest["capture_machine"]
            sizes = [int(machine[key]) for key in ("memory_total", "memory_available_least", "peak_rss")]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise NotSavedError(f"no complete save: {last_words(console)}") from None
        if complete is not True:
            raise NotSavedError(f"no complete save: {'; '.join(map(str, manifest.get('failures') or ['?']))}")
        levels = config.parse(self._request.append).levels
        if level not in levels:
            raise MeasureError(f"a dump of level {level} was made, not {levels[0]}")
        return Run(reservation, *sizes)

    def _manifest(self, disk: Path) -> str:
        """Return the text of the one manifest on the disk, empty where there is none."""
        folder = BootConfig().path
        # /inode/mode/uid/gid/name/size/, the inode of a deleted entry is 0
        names = re.findall(r"^/[1-9]\d*/\d+/\d+/\d+/([^./][^/]*)/", self._ask(disk, f"ls -p {folder}"), re.MULTILINE)
        return self._ask(disk, f"cat {folder}/{names[0]}/{MANIFEST}") if len(names) == 1 else ""

    def _ask(self, disk: Path, request: str) -> str:
        return tools.run([self._debugfs, "-R", request, disk])


def capture_line(cpus: int, append: str = "") -> str:
    """Return the guest's capture kernel's command line: as ``vmcapture load`` makes it, and with no one to be asked."""
    path = BootConfig().path
    targets = (f"LABEL={TARGET_LABEL}",)
    return kexec.capture_command_line(
        GUEST_WORDS, targets, path, "poweroff", "poweroff", f"panic=-1 {append}", cpus=cpus, boot_cpu=0
    )


def write_healthy(output: Path, kexec_program: Path, disk_modules: Sequence[KernelModule], line: str) -> None:
    """Write the initramfs of the guest's healthy system."""
    tree = Tree()
    tree.add("/init", File(Path(__file__).with_name("init-measure"), 0o755))
    tree.add("/bin/busybox", File(static_busybox(), 0o755))
    tree.add("/kexec", Symlink(str(kexec_program)))
    runtime.add_executable(tree, kexec_program)
    for directory in ("/proc", "/sys", "/dev", "/run", "/mnt", "/tmp"):
        tree.add(directory, Directory())
    tree.add("/dev/console", CONSOLE)
    tree.add("/dev/null", NULL)
    tree.add("/command-line", File(line.encode()))
    _add_modules(tree, disk_modules, "")
    with output.open("wb") as file:
        cpio.write(tree, file)


def add_modules(image: Path, output: Path, wanted: Sequence[KernelModule]) -> tuple[str, ...]:
    """Copy a capture image and append what it lacks of the modules; return all that it loads then, first to last.

    A second archive behind the first is unpacked over it (Documentation/driver-api/early-userspace/buffer-format.rst).

    Raises:
        ImageError: it is none of ours.
    """
    text = load_order(image)
    names = ordered_names(text)
    lacking = [module for module in wanted if module.name not in names]
    _copy(image, output)
    if lacking:
        tree = Tree()
        _add_modules(tree, lacking, text)
        with output.open("ab") as file:
            file.write(bytes(-file.tell() % cpio.BLOCK))
            cpio.write(tree, file)
    return (*names, *(module.name for module in lacking))


def without_device(tree: ModuleTree, names: Sequence[str]) -> tuple[str, ...]:
    """Return which of the modules drive controllers of a kind that the guests do not have."""
    there = [name for name in names if name in tree.files and name not in GUEST_MODULES]
    return tuple(
        name
        for name in there
        if "watchdog" not in tree.files[name].relative_to(tree.directory).parts  # a timer in a few registers
        and any(key == "alias" and value.startswith(CONTROLLERS) for key, value in modules.modinfo(tree.files[name]))
    )


def last_words(console: str) -> str:
    """Return the line of a console that says most of how it ended: ours, if there is one after the crash."""
    lines = [line.strip() for line in console.rpartition(CRASHED)[2].splitlines() if line.strip()]
    for sign in (FAILED, SAYS):
        for line in reversed(lines):
            if line.startswith(sign):
                return line.removeprefix(sign)
    return tools.last_line(console)


def _refuse_other_builders(image: Path) -> None:
    """Refuse an image that has its drivers elsewhere: it would not find the guest's disk.

    Raises:
        MeasureError: it is such an image.
    """
    if not image.is_file():
        return
    try:
        load_order(image)
    except ImageError:
        raise MeasureError(OTHER_BUILDER) from None


def _add_modules(tree: Tree, added: Sequence[KernelModule], order: str) -> None:
    """Add modules, and the order with them at its end."""
    for module in added:
        tree.add(f"{MODULES}/{module.name}.ko", File(modules.read_module(module.path)))
        order += f"{module.name}.ko\n"
    tree.add(LOAD_ORDER, File(order.encode()))


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise MeasureError(f"{error.filename}: {error.strerror}") from error
