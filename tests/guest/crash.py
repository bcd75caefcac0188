"""A whole crash: build the images, boot a kernel, arm it, crash it, take what its capture kernel saved.

The disks of the machine: vda holds the kernel and the capture image that ``vmcapture load`` reads, vdb
(LABEL=crash) is where the capture kernel saves.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from initramfs.devices import Needed
from initramfs.encryption import Encryption, encryption
from initramfs.image import ImageRequest, build_image
from initramfs.status import DOUBTFUL
from tests.guest import cache, disk, host
from tests.guest.cache import Kernel
from tests.guest.cases import Case
from tests.guest.host import HostError
from tests.guest.qemu import BOOT_TIMEOUT, Card, Disk, GuestError, Hardware, Machine

MODULES = ("virtio_pci", "virtio_blk", "ext4")  # a dump disk in QEMU; what is built in needs no module
WATCHDOG_MODULES = ("i6300esb",)  # where the kernel has it
HEALTHY_MODULES = ("virtio_balloon", *WATCHDOG_MODULES)  # more for the healthy system, where its kernel has them
WORKLOAD_PROGRAM = Path(__file__).with_name("workload.py")
TESTS = Path(__file__).parents[1]  # the fault laboratory runs in the capture kernel, too

TARGET_LABEL = "crash"
TARGET_FOLDER = "/var/crash"

BOOT_ATTEMPTS = 3

# From the panic to the power-off, on one CPU of a busy host.
SAVE_TIMEOUT = 300.0

# Memory of the kinds that a dump level can leave out: page cache of a file system and of a tmpfs (random bytes,
# which no compressor shrinks), anonymous memory of a process that stays.
WORKLOAD = (
    "mkdir -p /run/workload",
    "mount -t tmpfs workload /run/workload",
    "dd if=/dev/urandom of=/run/workload/random bs=1M count=16",
    "cat /run/healthy/vmlinuz /run/healthy/capture.img > /dev/null",
    "sh -c 'anonymous=$(dd if=/dev/urandom bs=1M count=8 | base64); while sleep 3600; do echo $anonymous; done' &",
)


HOST_WORKLOADS = ("tmpfs", "balloon", "offline")  # not made by the program
SWAP_BYTES, BALLOON_BYTES = 256 << 20, 64 << 20
PROOFS = {
    "plain": (r"AnonPages [1-9]\d{3}",),
    "thp": (r"AnonHugePages [1-9]\d{3}",),
    "hugetlb": (r"HugePages_Total 12", r"HugePages_Free 6"),
    "files": (r"SReclaimable \d{4}",),
    "processes": (r"KernelStack [2-9]\d{3}",),
    "swap": (r"SwapCached [1-9]\d{2}", r"swapped [1-9]\d{3}"),
    "poison": (r"HardwareCorrupted [1-9]",),
}
"""What a workload has to say: sizes in KiB, as /proc/meminfo has them."""
HOTPLUG_BYTES = 256 << 20  # two blocks of memory
# Both blocks are brought online, then one is taken offline again.
OFFLINE_A_BLOCK = (
    "for i in $(seq 60); do new=$(grep -l offline /sys/devices/system/memory/memory*/state);"
    " [ $(echo $new | wc -w) = 2 ] && break; sleep 1; done;"
    " for state in $new; do echo online_movable > $state || exit 1; done;"
    " last=${new##*memory}; last=/sys/devices/system/memory/memory${last%%/*}/state;"
    " for i in $(seq 10); do echo offline > $last && break; sleep 1; done; grep offline $last"
)
BALLOON_FILLED = (
    "for i in $(seq 60); do inflated=$(sed -n 's/^balloon_inflate //p' /proc/vmstat);"
    f" [ ${{inflated:-0}} -ge {BALLOON_BYTES // 4096 // 2} ] && break; sleep 1; done; [ $i != 60 ]"
)


@dataclass(frozen=True, slots=True)
class Images:
    """What the machines of one kernel boot from; built once, read by all of them."""

    capture: Path  # the initramfs that vmcapture load is given
    healthy: Path  # the initramfs with a shell and vmcapture load
    disk: Path  # the ext4 image that holds the kernel and the capture image


@dataclass(frozen=True, slots=True)
class Saver:
    """Who saves in the capture kernel: what its lines on the console begin with, and how the healthy system is armed.

    ``load`` is a command for its shell, of the case, what to do at the end, the target, and more words for the capture
    kernel.
    """

    name: str
    load: Callable[[Case, str, str, str], str]


@dataclass(slots=True)
class Steps:
    """How long each step took, told as it happens."""

    say: Callable[[str], object] = logging.getLogger(__name__).info
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        self.say(what)
        started = time.monotonic()
        yield
        self.seconds[what] = time.monotonic() - started


@dataclass(frozen=True, slots=True)
class Saved:
    """What a crash left behind."""

    case: Case
    kernel: Kernel
    saved: Path  # the folder that the capture kernel wrote, copied out of the target
    saved_in_target: str  # its path inside the target image, for disk.stat
    target: Path  # the image of the disk that it was saved to
    console: str  # everything that came over the serial console, of both kernels
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Crashed(Saved):
    """What a crash left behind, and what it is to be compared with."""

    elf: Path  # /proc/vmcore of the same capture boot, copied as it was
    verified: str  # what `vmcapture verify VMCORE --against /proc/vmcore` said in the capture kernel
    old_memory: tuple[tuple[int, str], ...]  # status and output of each of ``old_memory_commands``


@dataclass(frozen=True, slots=True)
class CrashOfKinds(Saved):
    """What a machine with pages of every class left behind, and what was known of them before it crashed."""

    elf: Path  # /proc/vmcore of the same capture boot
    said: dict[str, str]  # by workload; "kinds" is the summary of /proc/kpageflags
    meminfo: dict[str, int]  # /proc/meminfo right before the crash; KiB, or numbers of huge pages

    def kpageflags(self, name: str) -> int:
        """How many pages had a flag right before the crash."""
        found = re.search(rf"\b{name} (\d+)", self.said["kinds"])
        if found is None:
            raise GuestError(f"no {name} in {self.said['kinds']!r}")
        return int(found[1])

    @property
    def poisoned(self) -> list[int]:
        """PFNs that were marked poisoned."""
        found = re.search(r"poisoned \[(.*)\]", self.said["kinds"])
        return [int(pfn) for pfn in found[1].split(",") if pfn] if found else []


class ImageStore:
    """The images of each kernel, built when they are first asked for, by whichever process asks first."""

    def __init__(
        self,
        folder: Path,
        *,
        squashfs: bool | None = None,
        more: Callable[[Kernel, Path], object] | None = None,
        recipients: Path | None = None,
        needed: Needed = Needed(),  # noqa: B008  (frozen)
        healthy_needed: Needed = Needed(),  # noqa: B008
        hooks: tuple[tuple[Path, ...], tuple[Path, ...]] = ((), ()),
    ) -> None:
        self.folder = folder
        self.hooks = hooks  # programs of this machine that the capture kernel runs before and after a save
        self.recipients = recipients  # whom saves are encrypted to
        self.squashfs = squashfs  # None: as the builder decides
        self.needed, self.healthy_needed = needed, healthy_needed  # more for the capture image, and for the healthy one
        self.more = more  # puts more files into the folder that becomes the healthy machine's disk

    def images(self, kernel: Kernel, steps: Steps | None = None) -> Images:
        """The images of one kernel."""
        folder = self.folder / kernel.release
        images = Images(folder / "disk" / "capture.img", folder / "healthy.img", folder / "healthy-disk.ext4")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "built").open("ab") as built:
            fcntl.flock(built, fcntl.LOCK_EX)
            if not os.fstat(built.fileno()).st_size:
                with (steps or Steps()).step(f"building the capture image and the healthy system of {kernel.release}"):
                    self._build(kernel, images)
                built.write(b"whole\n")
        return images

    def _build(self, kernel: Kernel, images: Images) -> None:
        contents = images.capture.parent
        contents.mkdir(exist_ok=True)
        encrypted = Encryption() if self.recipients is None else encryption(self.recipients)  # not this machine's own
        capture = ImageRequest(
            output=images.capture,
            kernel_release=kernel.release,
            modules_dir=kernel.modules_dir,
            modules=(*MODULES, *self.needed.loaded),
            optional_modules=self.needed.built_in,
            welcome_modules=("softdog",),
            watchdog_modules=WATCHDOG_MODULES,
            squashfs=self.squashfs,
            binaries=(*encrypted.binaries, *self.needed.binaries),
            files=(*encrypted.files, *self.needed.files),
            before=self.hooks[0],
            after=self.hooks[1],
        )
        build_image(capture)
        build_image(
            replace(
                capture,
                output=images.healthy,
                squashfs=None,
                python_roots=("capture", "initramfs"),
                modules=(*MODULES, *self.healthy_needed.loaded),
                optional_modules=(*HEALTHY_MODULES, *self.healthy_needed.built_in),
                launcher_module="initramfs",
                binaries=(host.find("kexec"), host.find("blkid"), *self.healthy_needed.binaries),
                files=self.healthy_needed.files,
                before=(),
                after=(),
            )
        )
        shutil.copy(kernel.vmlinuz, contents / "vmlinuz")
        shutil.copy(WORKLOAD_PROGRAM, contents)
        for package in (TESTS, TESTS / "lab"):
            into = contents / package.relative_to(TESTS.parent)
            into.mkdir()
            for module in package.glob("*.py"):
                shutil.copy(module, into)
        if self.more is not None:
            self.more(kernel, contents)
        disk.make(images.disk, "256M", "healthy", content=contents)


@contextmanager
def healthy(
    case: Case,
    store: ImageStore,
    workdir: Path,
    *,
    target_attached: bool = True,
    target_kept: bool = False,
    more_disks: tuple[Disk, ...] = (),
    cards: tuple[Card, ...] = (),
    steps: Steps | None = None,
) -> Iterator[Machine]:
    """A machine that runs well: at a shell, with kernel and capture image below /run/healthy.

    Without ``target_attached`` the target disk is missing;
    ``machine.attach(Disk(target_image(workdir)))`` plugs it in. ``more_disks`` come after it. The target disk is a new
    one unless ``target_kept``.
    """
    steps = steps or Steps()
    kernel = cache.kernel(case.kernel)
    images = store.images(kernel, steps)
    workdir.mkdir(parents=True, exist_ok=True)
    if case.filesystem != "ext4":
        raise HostError(f"case {case.name}: no target with {case.filesystem} can be made yet")
    if not target_kept:
        disk.make(target_image(workdir), case.target_size, TARGET_LABEL)
    hardware = Hardware(
        kernel=kernel.vmlinuz,
        initrd=images.healthy,
        append=healthy_command_line(case),
        memory=case.memory + (",slots=1,maxmem=8G" if "offline" in case.workloads else ""),
        cpus=case.cpus,
        cpu_model=case.cpu_model,
        arguments=case.arguments,
        cards=cards,
        disks=(
            Disk(images.disk, read_only=True),
            *([Disk(target_image(workdir))] if target_attached else []),
            *more_disks,
        ),
    )
    with steps.step(f"booting {kernel.release}: CPUs {case.cpus} ({case.cpu_model}), memory {case.memory}"):
        machine = booted(hardware, workdir / "console.log")
    with machine:
        demand(machine, "mkdir -p /run/healthy && mount -t ext4 -o ro LABEL=healthy /run/healthy")
        yield machine


def booted(hardware: Hardware, log: Path, timeout: float = BOOT_TIMEOUT) -> Machine:
    """A healthy machine at its shell, after ``timeout`` seconds at most.

    QEMU without KVM now and then loses a CPU while a healthy kernel with several of them changes its own code
    (``Oops: int3`` or silence, where sched_clock becomes stable): such a boot says nothing of us, and is tried again.
    """
    for attempt in range(1, BOOT_ATTEMPTS + 1):
        machine = Machine(hardware, log)
        try:
            machine.shell(timeout)
        except BaseException as error:
            machine.kill()
            if attempt == BOOT_ATTEMPTS or not isinstance(error, GuestError):
                raise
            logging.getLogger(__name__).warning("the healthy kernel did not boot, trying again: %s", error)
        else:
            return machine
    raise AssertionError("unreachable")


@contextmanager
def panicked(
    case: Case,
    store: ImageStore,
    workdir: Path,
    *,
    final: str = "poweroff",
    target: str = f"LABEL={TARGET_LABEL}",
    target_attached: bool = True,
    target_kept: bool = False,
    more_disks: tuple[Disk, ...] = (),
    cards: tuple[Card, ...] = (),
    append: str = "",
    before: tuple[str, ...] = (),
    saver: Saver | None = None,
    steps: Steps | None = None,
) -> Iterator[Machine]:
    """A machine that has panicked, its capture kernel about to run our stage one; the disks are those of ``healthy``.

    ``before`` are commands for the healthy machine. ``saver`` is us where nobody else is named.
    """
    steps = steps or Steps()
    saver = saver or OURS
    for attempt in range(1, BOOT_ATTEMPTS + 1):
        with healthy(
            case,
            store,
            workdir,
            target_attached=target_attached,
            target_kept=target_kept,
            more_disks=more_disks,
            cards=cards,
            steps=steps,
        ) as machine:
            with steps.step("giving it something to remember"):
                if case.workloads:
                    make_workloads(machine, case)
                for command in (*(() if case.workloads else WORKLOAD), *before):
                    demand(machine, command)
            with steps.step(f"{saver.name} load"):
                demand(machine, saver.load(case, final, target, append), timeout=BOOT_TIMEOUT)
            with steps.step("echo c > /proc/sysrq-trigger"):
                machine.send("echo c > /proc/sysrq-trigger")
                machine.expect("Kernel panic - not syncing: sysrq triggered crash", BOOT_TIMEOUT)
            try:
                with steps.step("the capture kernel boots"):
                    machine.expect("Run /init as init process", BOOT_TIMEOUT)
            except GuestError as error:  # as in ``booted``: not one program of ours has run
                if attempt == BOOT_ATTEMPTS:
                    raise
                logging.getLogger(__name__).warning("the capture kernel did not boot, trying again: %s", error)
                continue
            yield machine
            return


def crash(
    case: Case,
    store: ImageStore,
    workdir: Path,
    *,
    append: str = "",
    before: tuple[str, ...] = (),
    saver: Saver | None = None,
    timeout: float = SAVE_TIMEOUT,
    steps: Steps | None = None,
) -> Saved:
    """Crash a machine, let the capture kernel save and power off, and bring what it saved to ``workdir``.

    ``before`` are commands for the healthy machine. ``saver`` is us where nobody else is named; it has ``timeout``
    seconds from its first line on the console.

    Raises:
        GuestError: a step did not end as it should.
        HostError: the host lacks something.
    """
    steps = steps or Steps()
    saver = saver or OURS
    with (
        panicked(case, store, workdir, append=append, before=before, saver=saver, steps=steps) as machine,
        steps.step("it saves and powers off"),
    ):
        machine.expect(rf"^{saver.name}: ", BOOT_TIMEOUT)
        machine.wait_exit(timeout)
    return _collect(case, workdir, machine, steps)


def crash_with_evidence(
    case: Case, store: ImageStore, workdir: Path, *, append: str = "", steps: Steps | None = None
) -> Crashed:
    """Crash a machine as ``crash`` does, but before it powers off compare the dump with /proc/vmcore and copy that too.

    Raises:
        GuestError: a step did not end as it should.
        HostError: the host lacks something.
    """
    steps = steps or Steps()
    workdir.mkdir(parents=True, exist_ok=True)
    elf = workdir / "vmcore.elf"
    with elf.open("wb") as disk_image:
        disk_image.truncate(memory_bytes(case.memory))  # the reservation is not in /proc/vmcore: there is room
    with panicked(case, store, workdir, final="shell", more_disks=(Disk(elf),), append=append, steps=steps) as machine:
        with steps.step("it saves"):
            machine.expect(r"^vmcapture: saved in ", BOOT_TIMEOUT + SAVE_TIMEOUT)
            machine.shell()
        with steps.step("copying /proc/vmcore"):
            demand(machine, "dd if=/proc/vmcore of=/dev/vdc bs=1M && sync", timeout=SAVE_TIMEOUT)
            size = int(demand(machine, "stat -c %s /proc/vmcore"))
        with steps.step("vmcapture verify"):
            demand(machine, f"mkdir -p /run/target && mount LABEL={TARGET_LABEL} /run/target")
            verify = f"vmcapture verify /run/target{TARGET_FOLDER}/*/vmcore --against /proc/vmcore"
            verified = demand(machine, verify, timeout=SAVE_TIMEOUT).strip()
        with steps.step("oldmem:"):
            old_memory = tuple(machine.run(command, SAVE_TIMEOUT) for command in old_memory_commands(case))
            demand(machine, "umount /run/target")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    os.truncate(elf, size)
    saved = _collect(case, workdir, machine, steps)
    values = {entry.name: getattr(saved, entry.name) for entry in fields(saved)}
    return Crashed(**values, elf=elf, verified=verified, old_memory=old_memory)


def crash_of_kinds(case: Case, store: ImageStore, workdir: Path, *, steps: Steps | None = None) -> CrashOfKinds:
    """Crash a machine that has the workloads of ``case``; copy its /proc/vmcore, besides what it saves.

    Raises:
        GuestError: a step did not end as it should, or a workload had no effect.
        HostError: the host lacks something.
    """
    steps = steps or Steps()
    workdir.mkdir(parents=True, exist_ok=True)
    elf, swap = workdir / "vmcore.elf", workdir / "swap.raw"
    for image, size in ((elf, memory_bytes(case.memory) + HOTPLUG_BYTES), (swap, SWAP_BYTES)):
        with image.open("wb") as disk_image:
            disk_image.truncate(size)
    more_disks = (Disk(elf), Disk(swap))
    with panicked(case, store, workdir, final="shell", more_disks=more_disks, steps=steps) as machine:
        with steps.step("it saves"):
            machine.expect(r"^vmcapture: saved in ", BOOT_TIMEOUT + SAVE_TIMEOUT)
            machine.shell()
        with steps.step("copying /proc/vmcore"):
            demand(machine, "dd if=/proc/vmcore of=/dev/vdc bs=1M && sync", timeout=2 * SAVE_TIMEOUT)
            size = int(demand(machine, "stat -c %s /proc/vmcore"))
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    os.truncate(elf, size)
    swap.unlink()
    saved = _collect(case, workdir, machine, steps)
    values = {entry.name: getattr(saved, entry.name) for entry in fields(saved)}
    meminfo = re.findall(r"^meminfo (\w+): +(\d+)", machine.console, re.MULTILINE)
    return CrashOfKinds(
        **values,
        elf=elf,
        said=workload_lines(machine.console),
        meminfo={name: int(value) for name, value in meminfo},
    )


def workload_lines(console: str) -> dict[str, str]:
    """What each workload said of itself: the last line that begins with ``workload NAME:``."""
    return dict(re.findall(r"^workload (\w+): (.*)$", console, re.MULTILINE))


def make_workloads(machine: Machine, case: Case) -> None:
    """Give a healthy machine pages of the kinds that ``case`` asks for, and hold each to its word.

    Raises:
        GuestError: one had no effect.
    """
    wanted = [name for name in case.workloads if name not in HOST_WORKLOADS]
    python = image_python(machine)
    if "offline" in case.workloads:
        demand(machine, "echo offline > /sys/devices/system/memory/auto_online_blocks")
        machine.qmp("object-add", **{"qom-type": "memory-backend-ram", "id": "added", "size": HOTPLUG_BYTES})
        machine.qmp("device_add", driver="pc-dimm", id="dimm", memdev="added")
        demand(machine, f"( {OFFLINE_A_BLOCK} )", timeout=BOOT_TIMEOUT)
    if "tmpfs" in case.workloads:
        for command in WORKLOAD:
            demand(machine, command)
    if "swap" in case.workloads:
        demand(machine, "mkswap /dev/vdd && swapon /dev/vdd")
    machine.send(f"{python} /run/healthy/workload.py {' '.join(wanted)} > /run/said 2>&1 &")
    demand(machine, "until grep -q '^workload held' /run/said || ! kill -0 $!; do sleep 1; done", timeout=BOOT_TIMEOUT)
    said = workload_lines(demand(machine, "cat /run/said"))
    for name, patterns in PROOFS.items():
        if name in wanted:
            for pattern in patterns:
                if not re.search(pattern, said.get(name, "")):
                    raise GuestError(
                        f"workload {name} of {case.name} had no effect: {said.get(name)!r}, no {pattern!r}"
                    )
    if "balloon" in case.workloads:
        machine.qmp("balloon", value=memory_bytes(case.memory) - BALLOON_BYTES)
        demand(machine, BALLOON_FILLED, timeout=BOOT_TIMEOUT)
    demand(machine, f"{python} /run/healthy/workload.py kinds", timeout=SAVE_TIMEOUT)
    demand(machine, "sed 's/^/meminfo /' /proc/meminfo")


def image_python(machine: Machine) -> str:
    """Have a command that is the image's own interpreter, with the tests' packages of the healthy machine's disk."""
    python = "/run/python"
    any_module, and_ours = 's/-m [a-z.]* "$@"/"$@"/', "s|^export PYTHONPATH='|&/run/healthy:|"
    demand(machine, f"sed -e '{any_module}' -e \"{and_ours}\" $(command -v vmcapture) > {python}; chmod 755 {python}")
    return python


def old_memory_commands(case: Case) -> tuple[str, ...]:
    """What to do with old memory itself in the capture kernel."""
    dump = "/run/target/oldmem.kdump"
    match case.old_memory:
        case "same":
            return (
                f"vmcapture dump --no-progress oldmem: {dump}",
                f"vmcapture verify --no-progress {dump} --against /proc/vmcore",
            )
        case "refused":
            return ("vmcapture info oldmem:",)
        case _:
            return ()


def _collect(case: Case, workdir: Path, machine: Machine, steps: Steps) -> Saved:
    with steps.step("reading the target disk"):
        target = target_image(workdir)
        try:
            disk.check(target)
        except HostError as error:
            raise GuestError(f"{target} was not left clean (console: {machine.log}): {error}") from None
        crashes = disk.names(target, TARGET_FOLDER)
        if len(crashes) != 1:
            raise GuestError(f"not one saved crash but {crashes} in {target} (console: {machine.log})")
        in_target = f"{TARGET_FOLDER}/{crashes[0]}"
        saved = disk.extract(target, in_target, workdir / "saved")
    return Saved(case, cache.kernel(case.kernel), saved, in_target, target, machine.console, steps.seconds)


@contextmanager
def rescue_shell(
    case: Case,
    store: ImageStore,
    workdir: Path,
    *,
    target: str = f"LABEL={TARGET_LABEL}",
    target_attached: bool = True,
    append: str = "",
    before: tuple[str, ...] = (),
    saver: Saver | None = None,
) -> Iterator[Machine]:
    """A machine whose capture kernel has done its job, or could not, and waits at the rescue shell."""
    with panicked(
        case, store, workdir, final="shell", target=target, target_attached=target_attached, append=append,
        before=before, saver=saver,
    ) as machine:  # fmt: skip
        machine.expect(r"^vmcapture: (saved in|not saved).*\n", BOOT_TIMEOUT + SAVE_TIMEOUT)
        machine.shell()
        yield machine


def target_image(workdir: Path) -> Path:
    """The image of the disk that the crash is saved to."""
    return workdir / "target.ext4"


def only_crash(image: Path, into: Path) -> Path:
    """The folder of the one crash on a target, copied to ``into``."""
    (name,) = disk.names(image, TARGET_FOLDER)
    return disk.extract(image, f"{TARGET_FOLDER}/{name}", into)


def memory_bytes(size: str) -> int:
    """QEMU's size in bytes: ``1G``, ``512M``."""
    return int(size[:-1]) << {"M": 20, "G": 30}[size[-1]]


def healthy_command_line(case: Case) -> str:
    """What the healthy kernel is told."""
    # Without KVM, on a busy host, QEMU's timer may be too slow for the kernel's test of it, which ends in a panic; the
    # capture kernel takes this word over.
    return f"console=ttyS0 no_timer_check crashkernel={case.crashkernel} {case.healthy_append}"


def capture_words(case: Case, append: str) -> str:
    """What the capture kernel is told besides what ``vmcapture load`` puts there."""
    level = f"vmcapture.level={case.level}" if case.level else ""
    return " ".join(filter(None, ("console=ttyS0", level, case.append, append)))


def load_command(case: Case, final: str, target: str, append: str) -> str:
    """How the healthy system arms itself."""
    return (
        f"vmcapture load {case.kexec_option} --cpus {case.capture_cpus}"
        " --kernel-image /run/healthy/vmlinuz --image /run/healthy/capture.img"
        f" --target {target} --path {TARGET_FOLDER} --final {final} --append '{capture_words(case, append)}'"
    )


OURS = Saver("vmcapture", load_command)


def demand(machine: Machine, command: str, timeout: float = 60.0) -> str:
    """Run a command that has to succeed; what it printed.

    Raises:
        GuestError: it ended with another status than 0.
    """
    status, output = machine.run(command, timeout)
    if status != 0:
        raise GuestError(f"{command!r} ended with status {status} (console: {machine.log}): {output.strip()}")
    return output


def status_of(machine: Machine) -> Any:
    """What ``vmcapture status`` says of an armed machine; it may have its doubts.

    Raises:
        GuestError: the machine is not armed.
    """
    status, said = machine.run("vmcapture status --json")
    if status not in (0, DOUBTFUL):
        raise GuestError(f"vmcapture status ended with {status} (console: {machine.log}): {said}")
    return json.loads(said)
