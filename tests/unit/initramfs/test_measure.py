"""The measurement: which reservation it ends with, and what it says when anything around it fails."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from capture.dumpfile.output import MANIFEST
from capture.errors import CaptureError
from initramfs import cpio, measure, qemu, tools
from initramfs.errors import ImageError, MeasureError, NotSavedError, ToolError
from initramfs.estimate import MIB, STEP
from initramfs.image import LOAD_ORDER
from initramfs.measure import Measurement, Request, Run, search
from initramfs.modules import read_tree
from initramfs.tree import File, Tree

from .conftest import RELEASE, elf_module, program_of


def saved(reservation: int, left: int) -> Run:
    return Run(reservation, reservation - 30 * MIB, left, 45 * MIB)


class Machine:
    """Takes ``used`` bytes of what is reserved, and saves nothing below ``smallest``."""

    def __init__(self, used: int, smallest: int = 0) -> None:
        self.used = used
        self.smallest = smallest
        self.tried: list[int] = []

    def crash(self, reservation: int) -> Run:
        self.tried.append(reservation)
        if reservation < max(self.smallest, self.used):
            raise NotSavedError("out of memory")
        return saved(reservation, reservation - self.used)


steps = st.integers(4, 40).map(lambda count: count * STEP)


@given(steps, st.integers(30 * MIB, 700 * MIB), st.integers(0, 700 * MIB), st.integers(0, 64 * MIB))
def test_the_smallest_reservation_that_leaves_enough(first: int, used: int, smallest: int, spare: int) -> None:
    machine = Machine(used, smallest)
    enough = [size for size in range(STEP, 1 << 30, STEP) if size >= max(smallest, used + spare)]
    if enough[0] > first + measure.STEPS_UP * STEP:
        with pytest.raises(MeasureError, match="was enough"):
            search(first, spare, machine.crash)
        return
    run, failed = search(first, spare, machine.crash)
    assert run.reservation == enough[0]
    assert run.memory_available_least >= spare
    assert len(machine.tried) == len(set(machine.tried))  # nothing twice: each takes a minute
    assert [size for size, _ in failed] == sorted(size for size in machine.tried if size < enough[0])


def test_two_crashes_are_enough_where_the_first_says_what_to_try() -> None:
    machine = Machine(90 * MIB)
    run, failed = search(192 * MIB, 8 * MIB, machine.crash)
    assert (machine.tried, run.reservation, failed) == ([192 * MIB, 112 * MIB], 112 * MIB, ())


def test_what_has_been_measured_stays_when_a_later_run_says_nothing() -> None:
    def crash(reservation: int) -> Run:
        if reservation < 128 * MIB:
            raise MeasureError("time is up")
        return saved(reservation, 60 * MIB)

    run, failed = search(128 * MIB, 8 * MIB, crash)
    assert run.reservation == 128 * MIB
    assert failed == ((80 * MIB, "not measured: time is up"),)


def test_a_first_run_that_says_nothing_ends_it() -> None:
    def crash(_: int) -> Run:
        raise ToolError("qemu failed")

    with pytest.raises(ToolError, match="qemu failed"):
        search(128 * MIB, 8 * MIB, crash)


GOOD = {"complete": True, "dump": {"level": 31}, "failures": []}
UP, CRASHED = measure.UP, measure.CRASHED


class Host:
    """Fake QEMU, mke2fs, debugfs and kexec. ``qemu`` is the guest's script; $MIB is what it reserves."""

    def __init__(self, folder: Path, modules_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(tools, "SYSTEM_DIRECTORIES", str(self.bin))
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setattr(qemu, "MACHINE", "x86_64")
        monkeypatch.setattr(qemu, "KVM", folder / "kvm")
        monkeypatch.setattr(qemu, "HOST_SPARE", -(1 << 40))
        monkeypatch.setattr(measure, "static_busybox", lambda: program_of(self.bin / "busybox", "exit 0"))
        self.kernel, self.image = folder / "vmlinuz", folder / "image"
        self.kernel.write_text("kernel")
        tree = Tree()
        tree.add(LOAD_ORDER, File(b"loop.ko\nvirtio_blk.ko queue_depth=1\n"))
        with self.image.open("wb") as file:
            cpio.write(tree, file)
        self.request = Request(self.kernel, modules_dir, self.image, 20 * MIB, 128 * MIB, deadline=30)
        self.said: list[str] = []
        self.tool("kexec", "exit 0")
        self.tool("mke2fs", 'for last; do image=$size; size=$last; done; echo made >> "$HOST/made"; : > "$image"')
        answers = f'case $2 in ls*) cat "$HOST/list" ;; cat*/{MANIFEST}) cat "$HOST/manifest" ;; esac'
        self.tool("debugfs", answers)
        self.list("/12/040700/0/0/localhost-2026//", "/0/040700/0/0/deleted//")
        self.guest(f"echo {UP}; echo '[1.0] {CRASHED}'; save $((MIB - 100))")

    def tool(self, name: str, script: str) -> None:
        environment = f"export HOST='{self.folder}' PATH=/usr/bin:/bin\n"
        program_of(self.bin / name, environment + script)

    def list(self, *lines: str) -> None:
        (self.folder / "list").write_text("\n".join(("/2/040755/0/0/.//", "/2/040755/0/0/..//", *lines)) + "\n")

    def guest(self, script: str, **manifest: object) -> None:
        """``save N`` leaves a manifest that says N MiB were left."""
        machine = {"memory_total": 90 << 20, "memory_available_least": "LEFT", "peak_rss": 44 << 20}
        text = json.dumps({**GOOD, "capture_machine": machine, **manifest}).replace('"LEFT"', "$(($1 * 1048576))")
        self.tool(
            "qemu-system-x86_64",
            f'save() {{ cat > "$HOST/manifest" <<END\n{text}\nEND\n}}\n'
            ': > "$HOST/manifest"\n'
            'MIB=${*##*crashkernel=}; MIB=${MIB%%M*}; echo "$MIB $*" >> "$HOST/guests"\n' + script,
        )

    def measure(self) -> Measurement:
        return measure.measure(self.request, self.folder / "scratch", self.said.append)

    def failure(self, kind: type[CaptureError] = MeasureError) -> str:
        with pytest.raises(kind) as caught:
            self.measure()
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def host(tmp_path: Path, module_tree: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, module_tree, monkeypatch)


def test_a_guest_is_crashed_with_less_until_little_is_left(host: Host) -> None:
    measured = host.measure()

    assert measured.parameter == "crashkernel=112M"
    assert measured.run == Run(112 * MIB, 90 * MIB, 12 * MIB, 44 * MIB)
    assert host.said == [f"crashing a guest in QEMU (tcg) with crashkernel={size}M" for size in (128, 112)]
    assert (host.folder / "made").read_text() == "made\n" * 2  # a new disk for each
    first, *others = measured.lines()
    assert first == "crashkernel=112M"
    assert any("complete save at 112M, 12 MiB left at the least, peak RSS 44 MiB" in line for line in others)
    values = measured.values()
    assert values["reservation"] == 112 * MIB
    assert values["memory_available_least"] == 12 * MIB
    assert json.loads(json.dumps(values)) == values


def test_more_is_reserved_where_the_computed_size_saves_nothing(host: Host) -> None:
    host.guest(f"echo {UP}; echo '{CRASHED}'; [ $MIB -ge 160 ] && save 10; echo 'vmcapture: not saved: no memory'")

    measured = host.measure()

    assert measured.run.reservation == 160 * MIB
    assert [size >> 20 for size, _ in measured.failed] == [128, 144]
    assert "  not at 144M: no complete save: not saved: no memory" in measured.lines()


def test_a_reservation_that_kernel_and_image_do_not_fit_into_is_too_small(host: Host) -> None:
    said = f"{measure.FAILED}kexec -p: locate_hole failed"
    host.guest(f"echo {UP}; [ $MIB -ge 144 ] || {{ echo '{said}'; exit; }}; echo '{CRASHED}'; save 10")

    measured = host.measure()

    assert measured.run.reservation == 144 * MIB
    why = "kernel and image do not fit into the reserved memory: kexec -p: locate_hole failed"
    assert measured.failed == ((128 * MIB, why),)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("echo '[0.1] Linux'; echo '[0.2] no device'", "the guest did not come to its crash: [0.2] no device"),
        (f"echo {UP}; echo '{measure.FAILED}kexec -p: Invalid'", "did not come to its crash: kexec -p: Invalid"),
        ("true", "the guest did not come to its crash: it said nothing"),
    ],
)
def test_a_guest_that_does_not_crash_is_a_line(host: Host, script: str, line: str) -> None:
    host.guest(script)
    assert line in host.failure()
    assert len((host.folder / "guests").read_text().splitlines()) == 1  # more memory would not help


def test_a_guest_that_hangs_ends_at_the_deadline(host: Host) -> None:
    host.request = replace(host.request, deadline=1)
    host.guest("echo booting; exec sleep 60")
    assert host.failure() == "not done within 1 s; last seen: booting"


def test_a_smaller_one_that_hangs_is_not_waited_for_until_the_deadline(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PATIENCE", 1)
    monkeypatch.setattr(measure, "SHORTEST", 0)
    host.guest(f"echo {UP}; echo '{CRASHED}'; [ $MIB -ge 128 ] || exec sleep 60; sleep 1; save 60")
    measured = host.measure()
    assert measured.run.reservation == 128 * MIB
    assert measured.failed[0][1].startswith("nothing saved within ")


def test_a_rescue_shell_is_not_waited_for(host: Host) -> None:
    host.guest(f"echo {UP}; echo '{CRASHED}'; echo 'vmcapture: not saved'; printf 'vmcapture# '; exec sleep 60")
    assert "nothing up to 192M was enough: no complete save: not saved" in host.failure()


@pytest.mark.parametrize(
    ("manifest", "line"),
    [
        ({"complete": False, "failures": ["vmcore: no room"]}, "no complete save: vmcore: no room"),
        ({"complete": "yes"}, "no complete save: ?"),
        ({"capture_machine": {"memory_total": 5}}, "no complete save: the end"),
        ({"capture_machine": {"memory_total": 5, "memory_available_least": None, "peak_rss": 1}}, "no complete save"),
        ({"capture_machine": []}, "no complete save: the end"),
        ({"dump": 31}, "no complete save: the end"),
        ({"dump": None}, "a dump of level None was made, not 31"),
        ({"dump": {"level": 15}}, "a dump of level 15 was made, not 31"),
    ],
)
def test_a_manifest_that_says_something_else_is_a_line(host: Host, manifest: dict[str, object], line: str) -> None:
    host.guest(f"echo {UP}; echo '{CRASHED}'; save 60; echo 'vmcapture: the end'", **manifest)
    assert line in host.failure()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\x00\x01"])
def test_a_manifest_that_is_none_is_a_line(host: Host, text: str) -> None:
    host.guest(f"echo {UP}; echo '{CRASHED}'; printf '%s' '{text}' > \"$HOST/manifest\"; echo 'vmcapture: the end'")
    assert "no complete save: the end" in host.failure()


def test_no_folder_or_two_on_the_disk_are_no_save(host: Host) -> None:
    for lines in ((), ("/12/040700/0/0/one//", "/13/040700/0/0/two//")):
        host.list(*lines)
        assert "no complete save" in host.failure()
        (host.folder / "scratch").rename(host.folder / f"scratch-{len(lines)}")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("qemu-system-x86_64", "qemu-system-x86"), ("mke2fs", "e2fsprogs"), ("debugfs", "e2fsprogs"),
        ("kexec", "kexec-tools"),
    ],
)  # fmt: skip
def test_a_missing_program_is_said_with_its_package(host: Host, name: str, package: str) -> None:
    (host.bin / name).unlink()
    assert host.failure(ToolError) == f"{name} was not found: install {package}"
    assert not (host.folder / "guests").exists()


@pytest.mark.parametrize("name", ["qemu-system-x86_64", "mke2fs", "debugfs"])
def test_a_program_that_fails_is_a_line(host: Host, name: str) -> None:
    host.tool(name, "echo 'it broke' >&2; exit 3")
    assert host.failure(ToolError) == f"{host.bin / name} failed with status 3: it broke"


@pytest.mark.parametrize("script", ["echo 'failed to initialize kvm' >&2; exit 1", "kill -ABRT $$", "exec sleep 60"])
def test_without_a_kvm_that_works_the_guest_runs_without_it(
    host: Host, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "KVM_BOOT", 0.5)
    qemu.KVM.touch()
    host.guest(f"case \"$*\" in *'-accel kvm'*) {script} ;; esac; echo {UP}; echo '{CRASHED}'; save 10")

    measured = host.measure()

    assert measured.accelerator == "tcg"
    assert any(line.startswith("no guest comes up with kvm (") and line.endswith("trying tcg") for line in host.said)


def test_kvm_is_used_where_it_works(host: Host) -> None:
    qemu.KVM.touch()
    assert host.measure().accelerator == "kvm"
    assert all("-accel kvm" in line for line in (host.folder / "guests").read_text().splitlines())


@pytest.mark.parametrize("which", ["kernel", "image"])
def test_a_file_that_is_not_there_is_a_line(host: Host, which: str) -> None:
    path: Path = getattr(host, which)
    path.unlink()
    assert f"{path}: " in host.failure(MeasureError if which == "kernel" else ImageError)


def test_a_kernel_without_a_virtual_disk_is_a_line(host: Host) -> None:
    dep = host.request.modules_dir / "modules.dep"
    dep.write_text("".join(line for line in dep.read_text().splitlines(True) if "virtio_blk.ko:" not in line))
    assert "no module virtio_blk" in host.failure(ImageError)


def test_the_spare_grows_with_drivers_that_have_nothing_to_drive(host: Host) -> None:
    directory = host.request.modules_dir
    for name, alias in (
        ("raid", "pci:v00001000d*"), ("raid_lib", "of:x"), ("part", "pcibus"), ("watchdog/timer", "pci:v00008086d*"),
    ):  # fmt: skip
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / f"{name}.ko").write_bytes(elf_module(f"alias={alias}"))
        with (directory / "modules.dep").open("a") as dep:
            dep.write(f"{name}.ko:\n")
    tree = Tree()
    tree.add(LOAD_ORDER, File(b"raid.ko x=1\nraid_lib.ko\npart.ko\ntimer.ko\nunknown.ko\nvirtio_blk.ko\n"))
    with host.image.open("wb") as file:
        cpio.write(tree, file)

    measured = host.measure()

    assert measured.drivers == ("raid",)
    assert measured.spare == measure.SPARE + measure.DRIVER
    assert measured.run.reservation == 112 * MIB
    assert any("not measured: the devices of raid, which QEMU does not have" in line for line in measured.lines())


def test_the_spare_grows_by_what_the_target_takes(host: Host) -> None:
    host.request = replace(host.request, target_memory=5 * MIB)
    measured = host.measure()
    assert measured.spare == measure.SPARE + 5 * MIB
    assert any("not measured: a save to the target itself; " in line for line in measured.lines())


@pytest.mark.parametrize("pack", [bytes, lambda data: gzip.compress(data)])
def test_an_image_gets_the_modules_that_it_lacks_behind_its_own(
    pack: Callable[[bytes], bytes], tmp_path: Path, module_tree: Path
) -> None:
    tree = Tree()
    tree.add(LOAD_ORDER, File(b"loop.ko\nvirtio_ring.ko\nvirtio.ko a=b\n"))
    first = io.BytesIO()
    cpio.write(tree, first)
    image, output = tmp_path / "image", tmp_path / "output"
    image.write_bytes(pack(first.getvalue()))

    wanted = read_tree(module_tree).plan(measure.GUEST_MODULES).modules
    names = measure.add_modules(image, output, wanted)

    assert names == ("loop", "virtio_ring", "virtio", "virtio_pci", "virtio_blk")
    written = output.read_bytes()
    assert written.startswith(image.read_bytes())
    begin = written.index(cpio.MAGIC.encode(), image.stat().st_size)
    assert begin % cpio.ALIGNMENT == 0
    added = io.BytesIO(written[begin:])
    assert cpio.content(added, LOAD_ORDER) == b"loop.ko\nvirtio_ring.ko\nvirtio.ko a=b\nvirtio_pci.ko\nvirtio_blk.ko\n"
    added.seek(0)
    assert cpio.content(added, "/modules/virtio_pci.ko") == elf_module("name=virtio_pci")
    assert not written[image.stat().st_size : begin].strip(b"\0")

    assert measure.add_modules(image, output, ()) == ("loop", "virtio_ring", "virtio")
    assert output.read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    "content", [b"", bytes(4096), b"\x1f\x8b", gzip.compress(b"x", mtime=0)[:-9], gzip.compress(b"", mtime=0)]
)
def test_what_is_no_image_of_ours_is_a_line(content: bytes, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(content)
    with pytest.raises(ImageError, match="not an image of vmcapture initramfs"):
        measure.add_modules(image, tmp_path / "output", ())


def test_another_initramfs_is_none_of_ours(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        cpio.write(Tree(), file)
    with pytest.raises(ImageError, match=f"no {LOAD_ORDER} in it"):
        measure.add_modules(image, tmp_path / "output", ())


def test_a_capture_kernel_of_a_guest_asks_nobody() -> None:
    words = measure.capture_line(2).split()
    assert {"nr_cpus=2", "vmcapture.target=LABEL=vmcapture", "vmcapture.final=poweroff"} <= set(words)
    assert {"vmcapture.failure=poweroff", "disable_cpu_apicid=0"} <= set(words)
    assert [word for word in words if word.startswith("panic=")][-1] == "panic=-1"


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstandard.compress])
@pytest.mark.parametrize("before", [b"", b"microcode"])
def test_an_image_of_another_builder_is_a_line_that_says_what_to_do_instead(
    pack: Callable[[bytes], bytes], before: bytes, host: Host
) -> None:
    """dracut's and mkinitramfs's: packed, microcode before it, our parts in a directory of their own."""
    archives = []
    for name, content in (("/kernel/x86/microcode/x.bin", before), ("/vmcapture/hand-over", b"#")):
        tree, archive = Tree(), io.BytesIO()
        tree.add(name, File(content))
        cpio.write(tree, archive)
        archives.append(archive.getvalue())
    host.image.write_bytes((archives[0] if before else b"") + pack(archives[1]))
    assert host.failure() == measure.OTHER_BUILDER
    (host.bin / "qemu-system-x86_64").unlink()
    assert host.failure() == measure.OTHER_BUILDER, "nobody is told to install QEMU for it"
    assert "vmcapture test --crash" in measure.OTHER_BUILDER


def test_the_release_is_that_of_the_modules(host: Host) -> None:
    assert host.measure().release == RELEASE
    assert os.listdir(host.folder / "scratch")  # noqa: PTH208
