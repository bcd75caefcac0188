"""Our parts for a distribution's image: what its hooks need is there, and it runs."""

from __future__ import annotations

import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from initramfs import parts, tools
from initramfs.errors import ImageError
from initramfs.image import ImageReport, ImageRequest
from initramfs.parts import PLACE, write_parts

from .conftest import RELEASE, make_module_tree, need_image_tools

HERE = PLACE[1:]


@pytest.fixture(scope="module")
def module_request(tmp_path_factory: pytest.TempPathFactory) -> ImageRequest:
    need_image_tools()
    tree = make_module_tree(tmp_path_factory.mktemp("modules") / RELEASE)
    return ImageRequest(
        output=Path("nowhere"), kernel_release=RELEASE, modules_dir=tree, modules=("virtio_blk",),
        module_options=(("virtio_blk", "queue_depth=64 name=\"a b\""),), files=(("/etc/secret", b"key"),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(module_request: ImageRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ImageReport]:
    root = tmp_path_factory.mktemp("root")
    return root, write_parts(module_request, root)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_all_of_it_is_in_one_directory_that_root_alone_may_read(written: tuple[Path, ImageReport]) -> None:
    root, report = written
    assert [path.name for path in root.iterdir()] == [HERE]
    assert sorted(path.name for path in (root / HERE).iterdir()) == [
        "busybox", "functions", "hand-over", "modules", "newroot", "root.squashfs",
    ]  # fmt: skip
    assert mode(root / HERE) == 0o700
    assert mode(root / HERE / "root.squashfs") == 0o600
    assert os.access(root / HERE / "busybox", os.X_OK)
    assert report.path == root / HERE
    assert report.size == sum(path.stat().st_size for path in (root / HERE).iterdir() if path.is_file())


def test_the_modules_are_named_first_to_last_and_left_to_the_distribution(written: tuple[Path, ImageReport]) -> None:
    root, report = written
    assert (root / HERE / "modules").read_text() == (
        'loop\nsquashfs\nvirtio_ring\nvirtio\nvirtio_blk queue_depth=64 name="a b"\n'
    )
    assert report.modules == ("loop", "squashfs", "virtio_ring", "virtio", "virtio_blk")
    assert not list(root.rglob("*.ko*"))
    assert any(path.name == "virtio_blk.ko" for path in report.sources)


def test_a_plain_tree_is_the_same_system_and_runs(module_request: ImageRequest, tmp_path: Path) -> None:
    report = write_parts(replace(module_request, squashfs=False), tmp_path)
    tree = tmp_path / HERE / "tree"
    assert not report.squashfs
    assert (tree / "etc/secret").read_bytes() == b"key"
    assert (tmp_path / HERE / "modules").read_text().startswith("virtio_ring\n")
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    chroot = tools.require("chroot", "coreutils")
    done = subprocess.run([chroot, tree, "vmcapture", "--version"], env={"PATH": "/usr/bin"}, check=True, text=True,
                          capture_output=True)  # fmt: skip
    assert done.stdout.startswith("vmcapture ")


def test_parts_that_are_there_already_are_not_mixed_with_others(module_request: ImageRequest, tmp_path: Path) -> None:
    (tmp_path / HERE).mkdir()
    with pytest.raises(ImageError, match=f"{tmp_path}/{HERE}: File exists"):
        write_parts(module_request, tmp_path)


@pytest.fixture
def hand_over(tmp_path: Path) -> tuple[Path, Path]:
    """The script with files of ours for /proc, and a modprobe that notes how it was called: script and notes."""
    need_image_tools()
    busybox = tools.require("busybox", "busybox-static")
    place = tmp_path / "place"
    place.mkdir()
    notes = tmp_path / "calls"
    (place / "modprobe").write_text(
        f'#!/bin/sh\nfor word; do printf "[%s]" "$word"; done >> {notes}\necho >> {notes}\n'
        '[ "$1" != refused ] || { echo "modprobe: ERROR: could not insert: Invalid argument" >&2; exit 1; }\n'
    )
    (place / "modprobe").chmod(0o755)
    (place / "modules").write_text('loop\nrefused\nvirtio_blk queue_depth=64 flags=* name="a b"\n')
    (tmp_path / "cmdline").write_text("console=ttyS0\n")
    for name in ("functions", "hand-over"):
        text = (Path(parts.__file__).with_name(name)).read_text()
        for word, here in (
            ("/vmcapture/busybox", busybox), ("place=/vmcapture", f"place={place}"),
            ("/proc/vmcore", tmp_path / "vmcore"), ("/proc/cmdline", tmp_path / "cmdline"),
            ("/sbin/modprobe", place / "modprobe"),
        ):  # fmt: skip
            text = text.replace(word, str(here))
        (place / name).write_text(text)
    return place / "hand-over", notes


def called(script: Path, what: str) -> subprocess.CompletedProcess[str]:
    busybox = tools.require("busybox", "busybox-static")
    return subprocess.run([busybox, "sh", script, what], text=True, capture_output=True, check=False)


@pytest.mark.parametrize("what", ["check", "modules", "save"])
def test_where_no_kernel_has_crashed_nothing_is_done(hand_over: tuple[Path, Path], what: str) -> None:
    script, notes = hand_over
    done = called(script, what)
    assert (done.stdout, done.stderr, notes.exists()) == ("", "", False)
    assert done.returncode == 1


@pytest.mark.parametrize("sign", ["/proc/vmcore", "elfcorehdr"])
def test_a_crash_is_known_by_the_vmcore_or_the_command_line(
    hand_over: tuple[Path, Path], tmp_path: Path, sign: str
) -> None:
    if sign == "elfcorehdr":
        (tmp_path / "cmdline").write_text("panic=10 elfcorehdr=0x2f000000\n")
    else:
        (tmp_path / "vmcore").touch()
    assert called(hand_over[0], "check").returncode == 0


def test_modules_are_loaded_in_their_order_with_their_options(hand_over: tuple[Path, Path], tmp_path: Path) -> None:
    script, notes = hand_over
    (tmp_path / "vmcore").touch()
    done = called(script, "modules")
    assert notes.read_text() == (
        '[loop]\n[refused]\n[virtio_blk][queue_depth=64][flags=*][name="a][b"]\n'  # (kmod joins them with blanks)
    )
    assert done.stdout == "vmcapture: kernel module refused: Invalid argument; going on without it\n"
    assert done.returncode == 0


@pytest.mark.parametrize("console", ["there", "missing"])
def test_the_job_runs_whether_or_not_there_is_a_console(
    hand_over: tuple[Path, Path], tmp_path: Path, console: str
) -> None:
    script, _ = hand_over
    text = script.read_text()
    for word, here in (("/dev/console", f"{tmp_path}/console"), ("/run/systemd/system", f"{tmp_path}/systemd"),
                       ("udevadm", "true")):  # fmt: skip
        assert word in text
        text = text.replace(word, here)
    script.write_text(text)
    script.with_name("functions").write_text('mount_root() { true; }\nrun_job() { echo "the job"; }\n')
    (tmp_path / "vmcore").touch()
    if console == "there":
        (tmp_path / "console").touch()
    done = called(script, "save")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if console == "there" else "the job\n")
    assert console == "missing" or (tmp_path / "console").read_text() == "the job\n"
