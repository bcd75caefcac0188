"""Fixtures of the set-up side: a module tree of a kernel that does not exist, and one real image a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from initramfs import image, tools
from initramfs.image import ImageReport, ImageRequest

RELEASE = "6.99.0-test"


@pytest.fixture
def module_tree(tmp_path: Path) -> Path:
    """``/lib/modules/6.99.0-test`` as depmod would leave it; the modules hold their own names."""
    return make_module_tree(tmp_path / "lib" / "modules" / RELEASE)


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
        path.write_text(path.stem)
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


def need_image_tools() -> None:
    """Skip where no image can be built."""
    for name, package in (("busybox", "busybox-static"), ("mksquashfs", "squashfs-tools")):
        if tools.find(name) is None:
            pytest.skip(f"{name} is not installed: apt-get install {package}")


@pytest.fixture(scope="session")
def squashfs_image(tmp_path_factory: pytest.TempPathFactory) -> ImageReport:
    """An image with everything of ours and one extra program, for the kernel that does not exist."""
    need_image_tools()
    folder = tmp_path_factory.mktemp("image")
    program = shutil.which("ls")
    assert program is not None
    extra = folder / "extra.txt"
    extra.write_text("extra")
    return image.build_image(
        ImageRequest(
            output=folder / "test.img",
            kernel_release=RELEASE,
            modules_dir=make_module_tree(folder / "modules"),
            modules=("virtio_blk",),
            python_roots=("capture", "initramfs"),
            launcher_module="initramfs",
            binaries=(Path(program),),
            files=(("/etc/extra", extra),),
        )
    )
