"""The capture kernel's command line, and refusals that say what to do."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from capture.errors import UsageError
from initramfs import kexec
from initramfs.errors import KexecError, ToolError
from initramfs.kexec import CrashKernel, Loaded, capture_command_line


def line(base: str, extra: str = "", *, cpus: int = 1, boot_cpu: int | None = None) -> list[str]:
    return capture_command_line(
        base, ("UUID=0123",), "/var/crash", "reboot", "shell", extra, cpus=cpus, boot_cpu=boot_cpu
    ).split()


@pytest.mark.parametrize(
    "word",
    [
        "console=ttyS0,115200n8",
        "console=tty0",
        "earlyprintk=serial",
        "nokaslr",
        "pci=nomsi",
        "acpi=off",
        "noapic",
        "intel_iommu=on",
        "iommu=pt",
        "amd_iommu=off",
        "no5lvl",
        "mitigations=off",
        "nvme_core.default_ps_max_latency_us=0",
        "8250.nr_uarts=4",
        "random.trust_cpu=on",
        'dyndbg="file a.c +p"',
        "apparmor=0",
        "selinux=0",
        "security=selinux",
        "nowatchdog",
    ],
)
def test_what_describes_the_hardware_is_kept(word: str) -> None:
    command_line = capture_command_line(f"ro {word} quiet", ("/dev/vda",), "/", "reboot", "shell")

    assert command_line.startswith(word + " ")


@pytest.mark.parametrize(
    "word",
    [
        "BOOT_IMAGE=/boot/vmlinuz-6.1",
        "crashkernel=256M",
        "crashkernel=512M,high",
        "root=UUID=1",
        "rootflags=subvol=@",
        "rootwait",
        "ro",
        "rw",
        "initrd=/initrd.img",
        "hugepages=512",
        "hugepagesz=1G",
        "default_hugepagesz=1G",
        "mem=4G",
        "isolcpus=1-3",
        "nohz_full=1-3",
        "rcu_nocbs=1-3",
        "resume=/dev/sda2",
        "init=/bin/bash",
        "rdinit=/bin/sh",
        "rd.luks.uuid=1",
        "rd.lvm.lv=vg/root",
        "systemd.unit=rescue.target",
        "quiet",
        "splash",
        "vmcapture.target=/dev/sdz",
        "vmcapture.failure=halt",
        "elfcorehdr=768M",
        "memmap=64K@0",
        "panic=0",
        "panic_on_oops=1",
        "nr_cpus=8",
        "maxcpus=4",
        "hugetlb_cma=2G",
        "log_buf_len=64M",
        'init="/bin/a b"',
        "panic_on_warn=1",
        "panic_print=0x3f",
        "hardlockup_panic=1",
        "unknown_nmi_panic",
        "nmi_watchdog=panic",
        "softlockup_all_cpu_backtrace=1",
        "watchdog_thresh=5",
        "swiotlb=65536",
        "slab_debug=FZ",
        "slub_debug=FZ,dentry",
        "slub-debug",
        "hugetlb-cma=1G",
        "panic-on-oops=1",
        "kfence.sample_interval=100",
        "kfence.sample-interval=100",
        "kmemleak=on",
        "memtest=4",
        "kgdbwait",
        "kgdboc=ttyS0",
        'dm-mod.create="crash,,,rw,0 8 linear /dev/sda 0"',
        "vt.handoff=7",
        "ima_policy=tcb",
        "ima_appraise=fix",
        "cloud-init=disabled",
    ],
)
def test_what_belongs_to_the_crashed_system_is_dropped(word: str) -> None:
    command_line = capture_command_line(f"{word} console=ttyS0", ("UUID=0123",), "/var/crash", "reboot", "shell")
    assert command_line.startswith("console=ttyS0 ")
    assert word not in command_line.split()
    assert word.partition("=")[0] + "=x" not in line(word.partition("=")[0] + "=x")


def test_what_stands_behind_two_dashes_was_for_init() -> None:
    assert "single" not in line("console=ttyS0 -- single")


def test_what_a_capture_kernel_needs_is_added_once() -> None:
    words = line("console=ttyS0 irqpoll reset_devices nr_cpus=4 panic=30")

    for word in (
        "irqpoll",
        "reset_devices",
        "nr_cpus=1",
        "cgroup_disable=memory",
        "mce=off",
        "numa=off",
        "novmcoredd",
        "acpi_no_memhotplug",
        "iomem=relaxed",
        "panic=10",
        "vmcapture.target=UUID=0123",
        "vmcapture.path=/var/crash",
        "vmcapture.final=reboot",
        "vmcapture.failure=shell",
    ):
        assert words.count(word) == 1, word
    assert not [word for word in words if word.startswith(("nr_cpus=4", "panic=30"))]


def test_extra_words_come_last_so_that_they_win() -> None:
    assert line("", "nr_cpus=2 debug")[-2:] == ["nr_cpus=2", "debug"]


def test_with_more_cpus_the_boot_cpu_is_left_asleep() -> None:
    assert "disable_cpu_apicid=6" in line("", cpus=2, boot_cpu=6)
    assert not [word for word in line("", cpus=1, boot_cpu=6) if word.startswith("disable_cpu_apicid")]


def test_the_boot_cpu_is_the_first_of_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\napicid\t\t: 4\ninitial apicid\t: 4\n\nprocessor\t: 1\ninitial apicid\t: 5\n")

    assert kexec.boot_cpu_apic_id(cpuinfo) == 4
    assert kexec.boot_cpu_apic_id(tmp_path / "none") is None


def test_a_line_that_the_kernel_would_cut_off_is_refused() -> None:
    with pytest.raises(UsageError, match="--command-line"):
        line("", "x" * 1900)
    assert len(" ".join(line("", "x" * 1500))) + kexec.KEXEC_ADDS < 2048


def test_a_blank_in_a_path_is_refused() -> None:
    with pytest.raises(UsageError, match=r"vmcapture\.path"):
        capture_command_line("", ("/dev/vda",), "/my crash", "reboot", "shell")


def test_what_is_to_be_kept_stands_there_when_somebody_said_so() -> None:
    asked = capture_command_line("", ("/dev/vda",), "/", "reboot", "shell", "debug", keep=3, free="10%")
    assert asked.endswith(" vmcapture.failure=shell vmcapture.keep=3 vmcapture.free=10% debug")
    assert not [word for word in line("") if word.startswith(("vmcapture.keep", "vmcapture.free"))]


def crash_kernel(machine: Path, syscall: str = "auto") -> CrashKernel:
    return CrashKernel(machine / "kernel", machine / "image", "console=ttyS0", syscall)


def test_a_watchdog_is_to_be_used_when_somebody_said_so() -> None:
    asked = capture_command_line("", "/dev/vda", "/", "reboot", "shell", "debug", watchdog=60)
    assert asked.endswith(" vmcapture.failure=shell vmcapture.watchdog=60 debug")
    assert not [word for word in line("") if word.startswith("vmcapture.watchdog")]


def test_auto_takes_the_second_system_call_when_the_first_is_refused(machine: Path) -> None:
    assert kexec.load(crash_kernel(machine)).syscall == "load"

    calls = (machine / "calls").read_text().splitlines()
    assert [call.split()[:2] for call in calls] == [["-p", "-s"], ["-p", "-c"]]
    assert calls[1].endswith("--command-line=console=ttyS0")


def test_what_kexec_said_is_in_the_one_line(machine: Path) -> None:
    with pytest.raises(KexecError, match=r"kexec -p -s: .*kexec_file_load failed: EPERM"):
        kexec.load(crash_kernel(machine, "file"))


@pytest.mark.parametrize("said", ["kexec_file_load failed: Cannot assign requested address", "locate_hole failed"])
def test_what_does_not_fit_into_the_reservation_says_what_to_do(machine: Path, said: str) -> None:
    (machine / "kexec").write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    remedy = r"do not fit into the \d+ MiB that crashkernel= reserves: reserve more and reboot"
    with pytest.raises(KexecError, match=f"{said}; kernel and image {remedy}"):
        kexec.load(crash_kernel(machine))


@pytest.mark.parametrize(("loaded", "armed"), [("0", False), ("1", True)])
def test_a_load_that_failed_says_when_the_machine_is_not_armed_any_more(
    machine: Path, loaded: str, armed: bool
) -> None:
    # kexec_file_load frees what was loaded before it looks at the new kernel; other failures leave it in place.
    with (machine / "kexec").open("w") as program:
        program.write(f"#!/bin/sh\necho {loaded} > {machine}/crash_loaded\necho refused >&2\nexit 1\n")
    (machine / "crash_loaded").write_text("1\n")

    with pytest.raises(KexecError, match=r"kexec -p -s: .*refused; kexec -p -c: .*refused") as raised:
        kexec.load(crash_kernel(machine))

    assert ("the machine is not armed now" in str(raised.value)) is not armed


@pytest.mark.parametrize(
    ("mebibytes", "said"),
    [(96, "96 MiB, the capture kernel with this image needs about 97 MiB: reserve more (crashkernel=112M)"), (112, "")],
)
def test_a_small_reservation_is_doubted(machine: Path, mebibytes: int, said: str) -> None:
    (machine / "crash_size").write_text(f"{mebibytes << 20}\n")

    image = crash_kernel(machine).image
    assert said in (kexec.small_reservation(image) or "")
    assert (kexec.small_reservation(image) is None) is (not said)


def test_what_load_recorded_counts_while_it_is_armed(machine: Path) -> None:
    kexec.load(crash_kernel(machine))
    (machine / "crash_loaded").write_text("0\n")
    assert (kexec.armed(), kexec.loaded()) == (False, None)

    (machine / "crash_loaded").write_text("1\n")

    assert kexec.armed()
    assert kexec.loaded() == Loaded(
        str(machine / "kernel"),
        str(machine / "image"),
        "console=ttyS0",
        "load",
        files=kexec.files_digest(machine / "kernel", machine / "image"),
        machine=kexec.machine_digest(),
    )


@pytest.mark.parametrize("record", ['["odd"]', "", '{"kernel": "x"}'])
def test_a_capture_kernel_that_someone_else_loaded_is_not_ours(record: str, machine: Path) -> None:
    (machine / "crash_loaded").write_text("1\n")
    (machine / "run").mkdir()
    (machine / "run/loaded.json").write_text(record)

    assert kexec.armed()
    assert kexec.loaded() is None


def test_what_was_loaded_is_out_of_date_when_a_file_or_the_machine_has_changed(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = crash_kernel(machine)
    kexec.load(request)
    (machine / "crash_loaded").write_text("1\n")
    assert kexec.is_loaded(request)
    assert not kexec.is_loaded(crash_kernel(machine, "file"))  # it was kexec_load that worked
    assert not kexec.is_loaded(CrashKernel(request.kernel, request.image, "console=ttyS1"))

    ranges = [(0, 0xFFFFF)]
    monkeypatch.setattr("initramfs.predict.memory_ranges", lambda: ranges)
    monkeypatch.setattr(kexec, "MEMORY_HOTPLUG", machine / "crash_hotplug")
    kexec.load(request)
    ranges.append((0x100000, 0x1FFFFF))
    assert kexec.out_of_date(kexec.loaded() or Loaded("", "", "", "")) == "memory or CPUs have come or gone since"
    (machine / "crash_hotplug").write_text("1\n")  # the kernel tells the capture kernel itself
    kexec.load(request)
    ranges.pop()
    assert kexec.is_loaded(request)

    request.image.write_bytes(b"another one")
    assert kexec.out_of_date(kexec.loaded() or Loaded("", "", "", "")) == "kernel or image have changed since"
    assert not kexec.is_loaded(request)


@pytest.mark.parametrize(
    ("line", "cpus"),
    [("", 1), ("nr_cpus=4", 4), ("quiet nr_cpus=4 x nr_cpus=2", 2), ("nr_cpus=0", 1), ("xnr_cpus=9 nr_cpus=99999", 1)],
)
def test_the_last_number_of_cpus_counts(line: str, cpus: int) -> None:
    assert kexec.cpus_of(line) == cpus


def test_unload_disarms_and_forgets(machine: Path) -> None:
    kexec.load(crash_kernel(machine))

    kexec.unload()

    assert (machine / "calls").read_text().splitlines()[-1] == "-p -u"
    assert not (machine / "run/loaded.json").exists()


def test_without_a_reservation_the_line_says_what_to_add(machine: Path) -> None:
    (machine / "crash_size").write_text("0\n")

    with pytest.raises(KexecError, match="crashkernel=256M"):
        kexec.load(crash_kernel(machine))


def test_an_image_larger_than_the_reservation_is_refused(machine: Path) -> None:
    (machine / "crash_size").write_text("1500\n")

    with pytest.raises(KexecError, match="reserve more"):
        kexec.load(crash_kernel(machine))


@pytest.mark.parametrize(("gone", "remedy"), [("kernel", "--kernel-image"), ("image", "vmcapture initramfs")])
def test_a_missing_file_is_named_with_its_remedy(machine: Path, gone: str, remedy: str) -> None:
    (machine / gone).unlink()

    with pytest.raises(KexecError, match=remedy):
        kexec.load(crash_kernel(machine))


def test_a_missing_kexec_names_its_package(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "kexec").unlink()
    monkeypatch.setenv("PATH", str(machine))
    monkeypatch.setattr("initramfs.tools.SYSTEM_DIRECTORIES", str(machine))

    with pytest.raises(ToolError, match="install kexec-tools"):
        kexec.load(crash_kernel(machine))


@pytest.mark.parametrize(("unpacked", "refused"), [(80 << 20, False), (110 << 20, True)])
def test_a_plain_tree_that_half_of_the_memory_cannot_hold_is_refused(
    machine: Path, unpacked: int, refused: bool
) -> None:
    """(256 MiB - 48 MiB for the kernel) / 2 = 104 MiB."""
    (machine / "image").write_bytes(gzip.compress(bytes(unpacked), 1))

    if not refused:
        assert kexec.load(crash_kernel(machine)).syscall == "load"
        return
    with pytest.raises(
        KexecError, match="110 MiB when it is unpacked, for which crashkernel=256M has no room"
    ) as error:
        kexec.load(crash_kernel(machine))
    reserved = re.search(r"reserve (\d+)M", str(error.value))
    assert reserved is not None
    (machine / "crash_size").write_text(f"{int(reserved[1]) << 20}\n")
    assert kexec.load(crash_kernel(machine)).syscall == "load"


def test_every_target_is_handed_over_in_its_order() -> None:
    words = capture_command_line("", ("UUID=1", "LABEL=b"), "/var/crash", "reboot", "shell").split()
    assert [word for word in words if "target" in word] == ["vmcapture.target=UUID=1", "vmcapture.target=LABEL=b"]


@pytest.mark.parametrize("content", [b"", b"an old letter", bytes(4096)], ids=["empty", "text", "zeros"])
def test_what_no_kernel_unpacks_does_not_arm_a_machine(machine: Path, content: bytes) -> None:
    (machine / "image").write_bytes(content)

    with pytest.raises(KexecError, match="vmcapture initramfs -o"):
        kexec.load(crash_kernel(machine))
    assert not (machine / "calls").exists()
