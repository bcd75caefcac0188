"""The image holds what stage one and the job need, twice the same, whole or not at all."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from initramfs import image, runtime, tools
from initramfs.errors import ImageError, ModuleNotThereError, ToolError
from initramfs.image import ImageReport, ImageRequest

from .conftest import RELEASE, need_image_tools


@pytest.fixture
def request_for(tmp_path: Path, module_tree: Path) -> ImageRequest:
    need_image_tools()
    return ImageRequest(
        output=tmp_path / "out" / "test.img", kernel_release=RELEASE, modules_dir=module_tree, modules=("virtio_blk",)
    )


def unpack(content: bytes, into: Path) -> Path:
    """Unpack with an independent reader (device nodes are left out: they need root)."""
    into.mkdir()
    busybox = tools.require("busybox", "busybox-static")
    listed = subprocess.run([busybox, "cpio", "-t"], input=content, capture_output=True, check=True).stdout.decode()
    names = [name for name in listed.splitlines() if name not in ("dev/console", "dev/null")]
    subprocess.run([busybox, "cpio", "-id", *names], input=content, cwd=into, capture_output=True, check=True)
    (into / "listed").write_text(listed)
    return into


@pytest.fixture(scope="session")
def stage_one(squashfs_image: ImageReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(squashfs_image.path.read_bytes(), tmp_path_factory.mktemp("unpacked") / "stage-one")


@pytest.fixture(scope="session")
def root(stage_one: Path) -> Path:
    unsquashfs = tools.find("unsquashfs")
    if unsquashfs is None:
        pytest.skip("unsquashfs is not installed: apt-get install squashfs-tools")
    subprocess.run([unsquashfs, "-d", stage_one / "root", stage_one / "root.squashfs"], capture_output=True, check=True)
    return stage_one / "root"


def test_modules_are_there_in_the_order_of_the_list(squashfs_image: ImageReport, stage_one: Path) -> None:
    order = (stage_one / "modules/order").read_text().split()

    assert order == ["loop.ko", "squashfs.ko", "virtio_ring.ko", "virtio.ko", "virtio_blk.ko"]
    assert squashfs_image.modules == tuple(name.removesuffix(".ko") for name in order)
    assert [(stage_one / "modules" / name).read_text() for name in order] == [name[:-3] for name in order]


def test_the_console_exists_before_anything_is_mounted(stage_one: Path) -> None:
    assert {"dev/console", "dev/null", "init", "bin/busybox", "newroot"} <= set(
        (stage_one / "listed").read_text().split()
    )


def test_the_root_has_mount_points_shell_and_launchers(root: Path) -> None:
    for point in ("proc", "sys", "dev", "run", "tmp", "mnt"):
        assert (root / point).is_dir()
    assert (root / "bin/sh").is_symlink()
    for launcher in (runtime.LAUNCHER, runtime.BOOT_LAUNCHER):
        assert os.access(root / launcher[1:], os.X_OK)
    assert (root / "etc/extra").read_text() == "extra"


def test_a_real_program_wins_over_an_applet_of_its_name(root: Path) -> None:
    assert not (root / "bin/ls").is_symlink()
    assert (root / "bin/ls").stat().st_size > 0


def test_the_command_runs_in_the_root(root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")

    command: list[str | Path] = [tools.require("chroot", "coreutils"), root, "vmcapture", "status"]
    done = subprocess.run(command, env={"PATH": "/usr/bin"}, capture_output=True, text=True, check=False)

    assert done.stdout.startswith("not armed")
    assert done.returncode == 1


def test_sizes_in_the_report_are_those_on_disk(squashfs_image: ImageReport) -> None:
    assert squashfs_image.squashfs
    assert squashfs_image.size == squashfs_image.path.stat().st_size < squashfs_image.runtime_size


def test_two_builds_are_byte_identical(request_for: ImageRequest, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        report = image.build_image(replace(request_for, output=tmp_path / name))
        digests.add(hashlib.sha256(report.path.read_bytes()).hexdigest())

    assert len(digests) == 1


def test_without_squashfs_the_same_tree_is_in_the_archive(request_for: ImageRequest, tmp_path: Path) -> None:
    request = replace(request_for, squashfs=False)

    reports = [image.build_image(replace(request, output=tmp_path / name)) for name in ("one", "two")]

    packed = reports[0].path.read_bytes()
    assert packed == reports[1].path.read_bytes()
    out = unpack(gzip.decompress(packed), tmp_path / "plain")
    assert not (out / "root.squashfs").exists()
    assert (out / "init").is_file()
    assert (out / runtime.LAUNCHER[1:]).is_file()
    assert "loop" not in reports[0].modules


def test_a_kernel_without_squashfs_gets_the_plain_tree(request_for: ImageRequest, no_squashfs_tree: Path) -> None:
    report = image.build_image(replace(request_for, modules_dir=no_squashfs_tree))

    assert not report.squashfs


def test_asking_for_squashfs_where_the_kernel_has_none_is_an_error(
    request_for: ImageRequest, no_squashfs_tree: Path
) -> None:
    with pytest.raises(ImageError, match="has no squashfs"):
        image.build_image(replace(request_for, modules_dir=no_squashfs_tree, squashfs=True))


def test_a_failed_build_leaves_the_old_image_and_nothing_else(request_for: ImageRequest) -> None:
    request_for.output.parent.mkdir()
    request_for.output.write_bytes(b"the image that worked")
    (request_for.modules_dir / "kernel/drivers/block/virtio_blk.ko").unlink()

    with pytest.raises(ImageError, match="virtio_blk"):
        image.build_image(request_for)

    assert request_for.output.read_bytes() == b"the image that worked"
    assert list(request_for.output.parent.iterdir()) == [request_for.output]


def test_a_missing_module_is_found_out_before_anything_is_built(request_for: ImageRequest) -> None:
    with pytest.raises(ModuleNotThereError, match="floppy"):
        image.build_image(replace(request_for, modules=("floppy",)))
    assert not request_for.output.parent.exists()


def test_without_a_static_busybox_the_line_says_what_to_install(
    request_for: ImageRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "busybox").symlink_to("/bin/ls")
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ToolError, match="install busybox-static"):
        image.build_image(request_for)


def test_stage_one_is_a_script_that_its_shell_understands() -> None:
    need_image_tools()
    script = Path(image.__file__).with_name("init")

    subprocess.run([tools.require("busybox", "busybox-static"), "sh", "-n", script], check=True)

    # Every program that it calls is an applet of the busybox that is packed.
    called = set(re.findall(r"\$busybox (\w+)", script.read_text()))
    applets = subprocess.run(
        [tools.require("busybox", "busybox-static"), "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert called <= set(applets)
