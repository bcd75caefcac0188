"""Fixtures of the set-up side: a module tree of a kernel that does not exist, and one real image a session."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest

from capture.console import Console
from initramfs import commands_config, config, image, kexec, scripts, tools
from initramfs.image import ImageReport, ImageRequest

RELEASE = "6.99.0-test"


@pytest.fixture(autouse=True)
def no_configuration(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this machine's configuration file would be: its own says nothing about a test."""
    place = tmp_path_factory.mktemp("etc") / "vmcapture.conf"
    for module in (config, commands_config):
        monkeypatch.setattr(module, "CONFIG", place)
    return place


@pytest.fixture(autouse=True)
def scripts_below_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's own programs are there."""
    monkeypatch.setattr(scripts, "HIDDEN", ())


@pytest.fixture
def module_tree(tmp_path: Path) -> Path:
    """``/lib/modules/6.99.0-test`` as depmod would leave it; the modules hold their own names."""
    return make_module_tree(tmp_path / "lib" / "modules" / RELEASE)


def elf_module(*modinfo: str) -> bytes:
    """Return a relocatable ELF file with a ``.modinfo`` section, written by hand from the ELF specification."""
    content = b"".join(pair.encode() + b"\0" for pair in modinfo)
    strings = b"\0.modinfo\0.shstrtab\0"
    header_size, section_size = 64, 64
    table = header_size + len(content) + len(strings)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, table, 0, header_size, 0, 0, section_size, 3, 2
    )

    def section(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)

    sections = (
        section(0, 0, 0, 0)
        + section(1, 1, header_size, len(content))
        + section(10, 3, header_size + len(content), len(strings))
    )
    return header + content + strings + sections


def make_module_tree(directory: Path) -> Path:
    names = (
        "drivers/block/loop",
        "drivers/block/virtio_blk",
        "drivers/virtio/virtio",
        "drivers/virtio/virtio_ring",
        "drivers/virtio/virtio_pci",
        "fs/squashfs/squashfs",
        "fs/xfs/xfs",
        "lib/libcrc32c",
        "crypto/crc32c_generic",
    )
    for name in names:
        path = directory / "kernel" / f"{name}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(elf_module(f"name={path.stem}"))
    (directory / "modules.dep").write_text(
        "kernel/drivers/block/loop.ko:\n"
        "kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n"
        "kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko\n"
        "kernel/drivers/virtio/virtio_ring.ko:\n"
        "kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n"
        "kernel/fs/squashfs/squashfs.ko:\n"
        "kernel/fs/xfs/xfs.ko: kernel/lib/libcrc32c.ko\n"
        "kernel/lib/libcrc32c.ko:\n"
        "kernel/crypto/crc32c_generic.ko:\n"
    )
    (directory / "modules.softdep").write_text("# Soft dependencies\nsoftdep libcrc32c pre: crc32c post: later\n")
    (directory / "modules.alias").write_text(
        "# Aliases\nalias crc32c crc32c_generic\nalias virtio:d00000002v* virtio_blk\nalias fs-xfs xfs\n"
    )
    (directory / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/drivers/nvme/host/nvme-core.ko\n")
    (directory / "modules.builtin.modinfo").write_bytes(b"ext4.alias=fs-ext4\0ext4.license=GPL\0")
    return directory


@pytest.fixture
def no_squashfs_tree(module_tree: Path) -> Path:
    """The same kernel without squashfs."""
    dep = module_tree / "modules.dep"
    dep.write_text("".join(line for line in dep.read_text().splitlines(keepends=True) if "squashfs" not in line))
    return module_tree


def program_of(path: Path, script: str) -> Path:
    """Make a program of a shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def need_image_tools() -> None:
    """Skip where no image can be built."""
    for name, package in (("busybox", "busybox-static"), ("mksquashfs", "squashfs-tools")):
        if tools.find(name) is None:
            pytest.skip(f"{name} is not installed: apt-get install {package}")


FIRMWARE_THERE = ("vendor/one.bin.xz", f"updates/{RELEASE}/vendor/one.bin", "updates/two.fw", f"{RELEASE}/two.fw.zst")


def make_firmware(directory: Path) -> Path:
    """A firmware directory with what the image's module names, and more."""
    for name in (*FIRMWARE_THERE, "two.fw.gz", "6.98.0-other/two.fw", "vendor/another.bin", "vendor/one.bin.sig"):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"firmware {name}")
    return directory


@pytest.fixture(scope="session")
def squashfs_image(tmp_path_factory: pytest.TempPathFactory) -> ImageReport:
    """An image with everything of ours and one extra program, for the kernel that does not exist."""
    need_image_tools()
    folder = tmp_path_factory.mktemp("image")
    program = shutil.which("ls")
    assert program is not None
    hook = folder / "hook"
    hook.write_text("#!/bin/bash\nwords=(hook of bash)\necho ${words[@]} $1\n")
    hook.chmod(0o755)
    extra = folder / "extra.txt"
    extra.write_text("extra")
    modules_dir = make_module_tree(folder / "modules")
    (modules_dir / "kernel/drivers/block/virtio_blk.ko").write_bytes(
        elf_module("name=virtio_blk", "firmware=vendor/one.bin", "firmware=two.fw", "firmware=not/there.bin")
    )
    return image.build_image(
        ImageRequest(
            output=folder / "test.img",
            kernel_release=RELEASE,
            modules_dir=modules_dir,
            modules=("virtio_blk",),
            module_options=(("virtio_blk", "queue_depth=64"), ("xfs", "odd=1"), ("virtio_blk", 'name="a b"')),
            firmware_dir=make_firmware(folder / "firmware"),
            python_roots=("capture", "initramfs"),
            launcher_module="initramfs",
            binaries=(Path(program),),
            files=(("/etc/extra", extra),),
            before=(hook,),
            after=(hook, Path(program)),
        )
    )


@pytest.fixture
def console() -> Console:
    """Keeps lines, prints none."""
    return Console(quiet=True)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine's sysfs files and a kexec of its own, which succeeds with -c only."""
    if os.geteuid() != 0:
        pytest.skip("load refuses everyone but root")
    (tmp_path / "crash_size").write_text(f"{256 << 20}\n")
    (tmp_path / "crash_loaded").write_text("0\n")
    for name in ("kernel", "image"):
        (tmp_path / name).write_bytes(b"070701".ljust(1000, b"x"))
    program = tmp_path / "kexec"
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        '[ "$2" = -s ] && { echo first; echo "kexec_file_load failed: EPERM"; exit 1; } >&2\n'
        f"echo 1 > {tmp_path}/crash_loaded\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(kexec, "CRASH_SIZE", tmp_path / "crash_size")
    monkeypatch.setattr(kexec, "CRASH_LOADED", tmp_path / "crash_loaded")
    monkeypatch.setattr(kexec, "RECORD", tmp_path / "run" / "loaded.json")
    return tmp_path


class Sysfs:
    """A /sys that a test fills."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def driver(self, device: str, module: str, *, loaded: bool = True) -> None:
        """Give a device a driver that a module brought."""
        state = self.root / "module" / module
        state.mkdir(parents=True, exist_ok=True)
        if loaded:
            (state / "initstate").write_text("live\n")
        driver = self.root / "bus" / f"driver-{module}"
        driver.mkdir(parents=True, exist_ok=True)
        if not (driver / "module").exists():
            (driver / "module").symlink_to(state)
        (self.root / "devices" / device).mkdir(parents=True, exist_ok=True)
        (self.root / "devices" / device / "driver").symlink_to(driver)

    def block(self, number: str, path: str, device: str | None = None) -> Path:
        """Make a block device, and its entry in dev/block."""
        place = self.root / "devices" / path
        place.mkdir(parents=True)
        if device is not None:
            (place / "device").symlink_to(self.root / "devices" / device)
        entry = self.root / "dev/block" / number
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.symlink_to(place)
        return place


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path / "sys")


def virtio_disk(sysfs: Sysfs) -> Path:
    sysfs.driver("pci0000:00/0000:00:02.0", "virtio_pci")
    sysfs.driver("pci0000:00/0000:00:02.0/virtio1", "virtio_blk")
    return sysfs.block("254:0", "pci0000:00/0000:00:02.0/virtio1/block/vda", "pci0000:00/0000:00:02.0/virtio1")
