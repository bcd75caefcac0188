"""Arms the machine: ``kexec -p`` with the right kernel, image and command line; and tells whether it is armed.

What the capture kernel must and must not inherit from the running kernel's command line is the table below; sources:
Documentation/admin-guide/kdump/kdump.rst and Documentation/admin-guide/kernel-parameters.txt (Linux 6.12). Names are
spelt with underscores: to the kernel a dash in a parameter's name is the same (parameq() in kernel/params.c).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from capture.errors import UsageError
from initramfs import predict, state, tools
from initramfs.errors import KexecError, ToolError
from initramfs.estimate import estimate, is_image, memory_of, unpacked_size

CRASH_SIZE = Path("/sys/kernel/kexec_crash_size")
CRASH_LOADED = Path("/sys/kernel/kexec_crash_loaded")
RUNNING_COMMAND_LINE = Path("/proc/cmdline")
CPUINFO = Path("/proc/cpuinfo")
RECORD = Path("/run/vmcapture/loaded.json")
MEMORY_HOTPLUG = Path("/sys/devices/system/memory/crash_hotplug")
CPU_HOTPLUG = Path("/sys/devices/system/cpu/crash_hotplug")
"""1 where the kernel itself tells the loaded capture kernel of memory and CPUs that come and go (since Linux 6.6)."""
CPUS = Path("/sys/devices/system/cpu/present")

KERNEL_MEMORY = 48 << 20  # what a kernel has taken when it unpacks the image; measured with Debian's 6.1 in 256M
MAX_COMMAND_LINE = 2047  # COMMAND_LINE_SIZE of x86 without its final NUL (arch/x86/include/asm/setup.h)
KEXEC_ADDS = 96  # " elfcorehdr=0x…" and, on EFI without runtime services, " acpi_rsdp=0x…"
PANIC_SECONDS = 10

NO_RESERVATION = (
    "no memory is reserved for a capture kernel",
    (
        "add crashkernel=256M to the kernel command line "
        "(GRUB_CMDLINE_LINUX in /etc/default/grub, then update-grub) and reboot"
    ),
)
"""What is wrong, and what to do."""

SYSCALLS = ("file", "load", "auto")
NO_HOLE = ("Cannot assign requested address", "locate_hole failed")
"""How kexec says that kernel and image find no place in the reserved memory: EADDRNOTAVAIL of kexec_file_load
(kexec_locate_mem_hole() in kernel/kexec_file.c), and its own words before kexec_load."""

DROPPED = frozenset(
    {
        # The boot loader's notes to itself, and the way into the running system's root.
        "BOOT_IMAGE",
        "initrd",
        "root",
        "rootfstype",
        "rootflags",
        "rootdelay",
        "rootwait",
        "ro",
        "rw",
        "init",
        "rdinit",
        "resume",
        "resume_offset",
        "noresume",
        "hibernate",
        "luks",
        "cryptdevice",
        "splash",
        "ip",
        # This crash's reservation and the capture kernel's own parameters, which we set anew.
        "crashkernel",
        "elfcorehdr",
        "memmap",
        "panic",
        "panic_on_oops",
        "panic_on_taint",
        "panic_on_warn",
        "panic_print",
        "oops",
        "hung_task_panic",
        # The lockup detectors: a second panic would end the save, backtraces of all CPUs hide our lines.
        "hardlockup_all_cpu_backtrace",
        "hardlockup_panic",
        "nmi_watchdog",
        "softlockup_all_cpu_backtrace",
        "softlockup_panic",
        "unknown_nmi_panic",
        "watchdog_thresh",
        "nr_cpus",
        "maxcpus",
        "possible_cpus",
        "disable_cpu_apicid",
        "irqpoll",
        "reset_devices",
        "novmcoredd",
        "iomem",
        "numa",
        "mce",
        "cgroup_disable",
        # Memory that is set aside or limited: there is little enough.
        "transparent_hugepage",
        "mem",
        "hugepages",
        "hugepagesz",
        "default_hugepagesz",
        "hugetlb_cma",
        "cma",
        "movablecore",
        "kernelcore",
        "swiotlb",
        "log_buf_len",
        "trace_buf_size",
        "ftrace_dump_on_oops",
        # What looks for faults in memory: it takes more of it, or all the time.
        "page_owner",
        "slab_debug",
        "slub_debug",
        "kfence.sample_interval",
        "kmemleak",
        "memtest",
        # A debugger that nobody is connected to, and volumes that nobody needs.
        "kgdboc",
        "kgdbwait",
        "dm_mod.create",
        # Measuring or refusing files by a policy that is not in the image (Documentation/ABI/testing/ima_policy).
        "ima_policy",
        "ima_appraise",
        # CPUs that will not be there.
        "isolcpus",
        "nohz_full",
        "nohz",
        "rcu_nocbs",
        "irqaffinity",
        "kthread_cpus",
        # Messages must be seen.
        "quiet",
        "loglevel",
        "vt.handoff",
    }
)
DROPPED_PREFIXES = ("vmcapture.", "systemd.", "rd.", "bootconfig", "cloud_init", "memory_hotplug.")
# apparmor=, selinux=, security= and lsm= stay, as kdump-tools and kdump-utils leave them: without a policy, and the
# image has none, the kernel's security modules forbid nothing.

ADDED = (
    "irqpoll",
    "reset_devices",
    "cgroup_disable=memory",
    "mce=off",
    "numa=off",
    "novmcoredd",
    # Memory that was plugged in is dead memory to be saved; a capture kernel that finds it anew would use it.
    "acpi_no_memhotplug",
    # Huge pages make a small process a large one, and have the kernel hold more memory back (khugepaged.c,
    # set_recommended_min_free_kbytes).
    "transparent_hugepage=never",
    # 9 MB of directory entries for trace events that nobody will look at (6.1; kernel/trace/trace.c).
    "initcall_blacklist=tracer_init_tracefs",
    "iomem=relaxed",
    f"panic={PANIC_SECONDS}",
)


@dataclass(frozen=True, slots=True)
class CrashKernel:
    """What to load."""

    kernel: Path
    image: Path
    command_line: str
    syscall: str = "auto"  # kexec_file_load, kexec_load, or the first of them that works


@dataclass(frozen=True, slots=True)
class Loaded:
    """What our last ``load`` put in place."""

    kernel: str
    image: str
    command_line: str
    syscall: str
    files: str = ""  # what kernel and image were then
    machine: str = ""  # what memory and CPUs were then


def capture_command_line(
    base: str,
    targets: Sequence[str],
    path: str,
    final: str,
    failure: str,
    extra: str = "",
    *,
    cpus: int = 1,
    boot_cpu: int | None = None,
    keep: int | None = None,
    free: str | None = None,
    watchdog: int = 0,
    more: Mapping[str, str] | None = None,
    dropped: Sequence[str] = (),
) -> str:
    """Return the capture kernel's command line, made from the running kernel's.

    ``targets`` in the order in which they are to be tried.
    ``keep``, ``free`` and ``watchdog`` are ``vmcapture.keep=`` and so on (see ``capture.boot.config``), ``more`` are
    other such words. ``dropped`` are names of parameters of ``base`` that are not wanted, besides those that never are.
    ``boot_cpu`` is the APIC id of the CPU that the firmware started: with more than one CPU the capture kernel must not
    wake it up, because an INIT would reset the machine (kernel-parameters.txt up to Linux 6.8, disable_cpu_apicid).
    Since about 6.9 the kernel finds that CPU itself and does not know the word, which does no harm.
    """
    unwanted = {_key(name) for name in dropped}
    kept = [word for word in _words(base) if not is_dropped(word) and _key(word) not in unwanted]
    added = [*ADDED, f"nr_cpus={cpus}"]
    if cpus > 1 and boot_cpu is not None:
        added.append(f"disable_cpu_apicid={boot_cpu}")
    ours = [*(("target", target) for target in targets), ("path", path), ("final", final), ("failure", failure)]
    ours += [("keep", str(keep or "")), ("free", free or ""), ("watchdog", str(watchdog or ""))]
    ours += (more or {}).items()
    for key, value in ours:
        if re.search(r"[\s\"]", value):
            raise UsageError(f"vmcapture.{key}={value!r}: blanks and quotes do not survive a kernel command line")
    added.extend(f"vmcapture.{key}={value}" for key, value in ours if value)
    line = " ".join((*kept, *added, *extra.split()))
    check_length(line)
    return line


def cpus_of(command_line: str) -> int:
    """Return how many CPUs a capture kernel with this command line uses; 1 where it does not say."""
    found = re.findall(r"(?:^|\s)nr_cpus=([1-9]\d{0,3})(?=\s|$)", command_line)
    return int(found[-1]) if found else 1


def check_length(line: str) -> None:
    """Refuse a command line that the capture kernel would cut off."""
    room = MAX_COMMAND_LINE - KEXEC_ADDS
    if len(line.encode()) > room:
        raise UsageError(
            f"the capture kernel's command line has {len(line.encode())} characters, {room} fit: "
            "give a shorter one with --command-line"
        )


def _words(line: str) -> Iterator[str]:
    """Yield the kernel's parameters: blanks inside double quotes are part of one; what follows -- is for init."""
    for match in re.finditer(r'(?:"[^"]*"?|[^\s"])+', line):
        if match.group() == "--":
            return
        yield match.group()


def is_dropped(word: str) -> bool:
    """Tell a parameter that the capture kernel never gets from the running kernel's command line."""
    key = _key(word)
    return key in DROPPED or key.startswith(DROPPED_PREFIXES)


def _key(word: str) -> str:
    """Return the name of a kernel parameter, in which - and _ are the same."""
    return word.strip('"').partition("=")[0].replace("-", "_")


def boot_cpu_apic_id(cpuinfo: Path = CPUINFO) -> int | None:
    """Return the APIC id of the first CPU, which the firmware started; None where there is no such thing."""
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^initial apicid\s*:\s*(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else None


def load(request: CrashKernel) -> Loaded:
    """Load the capture kernel into the reserved memory, or say in one line why not and what to do."""
    kexec = ready(request.kernel, request.image)
    check_length(request.command_line)
    flags = {"file": ("-s",), "load": ("-c",), "auto": ("-s", "-c")}[request.syscall]
    errors = []
    for flag in flags:
        words: list[str | Path] = [
            kexec,
            "-p",
            flag,
            request.kernel,
            f"--initrd={request.image}",
            f"--command-line={request.command_line}",
        ]
        try:
            tools.run(words)
        except ToolError as error:
            errors.append(f"kexec -p {flag}: {error}")
            continue
        loaded = Loaded(
            kernel=str(request.kernel),
            image=str(request.image),
            command_line=request.command_line,
            syscall="file" if flag == "-s" else "load",
            files=files_digest(request.kernel, request.image),
            machine=machine_digest(),
        )
        state.write(RECORD, asdict(loaded), 0o644)
        return loaded
    if finds_no_hole(errors[-1]):
        errors.append(
            f"kernel and image do not fit into the {reservation() >> 20} MiB that crashkernel= reserves: "
            "reserve more and reboot"
        )
    if _read_number(CRASH_LOADED) != 1:  # a load that fails has freed what was loaded before
        errors.append("the machine is not armed now")
    raise KexecError("; ".join(errors))


def finds_no_hole(said: str) -> bool:
    """Tell from what kexec said whether the reserved memory is too small for kernel and image."""
    return any(words in said for words in NO_HOLE)


def out_of_date(loaded: Loaded) -> str | None:
    """Return why what is loaded has to be loaded again, in a few words; None when it need not."""
    if loaded.files != files_digest(Path(loaded.kernel), Path(loaded.image)):
        return "kernel or image have changed since"
    if loaded.machine != machine_digest():
        return "memory or CPUs have come or gone since"
    return None


def is_loaded(request: CrashKernel) -> bool:
    """Return whether just that is loaded already, by us, and of this machine as it is now."""
    there = loaded()
    return there is not None and out_of_date(there) is None and is_of(request, there)


def is_of(request: CrashKernel, there: Loaded) -> bool:
    """Return whether what was loaded is what is asked for."""
    wanted = (str(request.kernel), str(request.image), request.command_line)
    same_call = request.syscall in ("auto", there.syscall)
    return wanted == (there.kernel, there.image, there.command_line) and same_call


def files_digest(kernel: Path, image: Path) -> str:
    """Return what tells whether two files have changed: their sizes and times."""
    parts = []
    for path in (kernel, image):
        status = path.stat() if path.exists() else None
        parts.append("" if status is None else f"{status.st_size} {status.st_mtime_ns}")
    return _digest(*parts)


def machine_digest() -> str:
    """Return what tells whether memory and CPUs have changed: a capture kernel is told of them when it is loaded.

    What the kernel itself keeps up to date is left out.
    """
    memory = [] if _read_number(MEMORY_HOTPLUG) else predict.memory_ranges()
    cpus = CPUS.read_text(encoding="utf-8") if CPUS.exists() and not _read_number(CPU_HOTPLUG) else ""
    return _digest(repr(memory), cpus.strip())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def unload() -> None:
    """Disarm the machine."""
    _require_root()
    tools.run([_kexec(), "-p", "-u"])
    RECORD.unlink(missing_ok=True)


def armed() -> bool:
    """Return whether a capture kernel is loaded, whoever did it."""
    return _read_number(CRASH_LOADED) == 1


def loaded() -> Loaded | None:
    """Return what we loaded last, if anything is loaded; another tool may have loaded something since."""
    return _read_record() if armed() else None


def ready(kernel: Path, image: Path) -> Path:
    """Refuse what cannot work before kexec does so in more words, and return the path of kexec."""
    _require_root()
    kexec = _kexec()
    reserved = reservation()
    if not reserved:
        raise KexecError(": ".join(NO_RESERVATION))
    if not kernel.is_file():
        raise KexecError(f"{kernel}: no such kernel; name one with --kernel-image")
    if not image.is_file():
        raise KexecError(f"{image}: no such image; build it with vmcapture initramfs -o {image}")
    if not is_image(image):
        raise KexecError(f"{image}: no image that a kernel unpacks; build it anew with vmcapture initramfs -o {image}")
    needed = kernel.stat().st_size + image.stat().st_size
    if needed > reserved:
        raise KexecError(
            f"{image} and its kernel take {needed >> 20} MiB, crashkernel= reserves "
            f"{reserved >> 20} MiB: reserve more and reboot"
        )
    _check_room_to_unpack(image, reserved)
    return kexec


def _check_room_to_unpack(image: Path, reserved: int) -> None:
    """Refuse what the capture kernel could not unpack, a plain tree or a distribution's image: half would be missing.

    The kernel unpacks into a tmpfs that may take half of the memory (Documentation/filesystems/tmpfs.rst), while the
    packed image is still there.
    """
    unpacked = unpacked_size(image)
    taken = image.stat().st_size + KERNEL_MEMORY
    if unpacked is not None and unpacked > (reserved - taken) // 2:
        raise KexecError(
            f"{image}: {unpacked >> 20} MiB when it is unpacked, for which crashkernel={reserved >> 20}M has no room"
            f": reserve {(2 * unpacked + taken >> 20) + 1}M, or have vmcapture initramfs build one with a squashfs"
        )


def reservation() -> int:
    """Return the bytes that are reserved for a capture kernel."""
    return _read_number(CRASH_SIZE)


def small_reservation(image: Path, target: int = 0) -> str | None:
    """Return a line when the reserved memory may not be enough; None when it is. ``target`` is estimate()'s."""
    reserved, needed = reservation(), estimate(memory_of(image), target=target)
    if reserved >= needed.needed:
        return None
    return (
        f"crashkernel= reserves {reserved >> 20} MiB, the capture kernel with this image needs about "
        f"{needed.needed >> 20} MiB: reserve more ({needed.parameter}), or test a crash before you rely on it"
    )


def _require_root() -> None:
    if os.geteuid() != 0:
        raise KexecError("only root may load a capture kernel, or unload it: use sudo")


def _kexec() -> Path:
    return tools.require("kexec", "kexec-tools")


def _read_number(path: Path) -> int:
    """Return the number in a file of sysfs; 0 where the kernel has no such file (built without CONFIG_CRASH_DUMP)."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0


def _read_record() -> Loaded | None:
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        return Loaded(**{name: str(value) for name, value in record.items() if name in Loaded.__slots__})
    except (OSError, ValueError, AttributeError, TypeError):
        return None
