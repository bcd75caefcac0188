"""The image holds what stage one and the job need, twice the same, whole or not at all."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from capture.boot.hooks import AFTER, BEFORE
from initramfs import image, runtime, tools
from initramfs.errors import ImageError, ModuleNotThereError, ToolError
from initramfs.image import ImageReport, ImageRequest, written_whole
from initramfs.modules import read_tree
from tests.faults import tmpfs

from .conftest import FIRMWARE_THERE, RELEASE, need_image_tools


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
    assert (stage_one / "root/bin/busybox").stat().st_size == 0  # stage one lends its own: there is one in the image
    shutil.copy(stage_one / "bin/busybox", stage_one / "root/bin/busybox")
    return stage_one / "root"


def test_modules_are_there_in_the_order_of_the_list(squashfs_image: ImageReport, stage_one: Path) -> None:
    order = [line.split()[0] for line in (stage_one / "modules/order").read_text().splitlines()]

    assert order == ["loop.ko", "squashfs.ko", "virtio_ring.ko", "virtio.ko", "virtio_blk.ko"]
    assert squashfs_image.modules == tuple(name.removesuffix(".ko") for name in order)
    for name in order:
        assert f"name={name[:-3]}\0".encode() in (stage_one / "modules" / name).read_bytes()


def test_a_modules_options_stand_behind_its_file(stage_one: Path) -> None:
    *others, disk = (stage_one / "modules/order").read_text().splitlines()

    assert disk == 'virtio_blk.ko queue_depth=64 name="a b"'
    assert all(" " not in line for line in others)


def test_firmware_that_a_module_names_is_where_the_kernel_looks_for_it(stage_one: Path) -> None:
    directory = stage_one / "lib/firmware"

    assert {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} == set(FIRMWARE_THERE)
    assert all((directory / name).read_text() == f"firmware {name}" for name in FIRMWARE_THERE)


def test_the_console_exists_before_anything_is_mounted(stage_one: Path) -> None:
    assert {"dev/console", "dev/null", "init", "functions", "bin/busybox", "newroot"} <= set(
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


def test_hooks_lie_at_their_own_paths_with_numbered_links_to_them(root: Path) -> None:
    before, after = root / BEFORE[1:], root / AFTER[1:]
    assert [link.name for link in sorted(before.iterdir())] == ["000"]
    assert [link.name for link in sorted(after.iterdir())] == ["000", "001"]
    hook = (before / "000").readlink()
    assert (after / "000").readlink() == hook
    assert (root / str(hook)[1:]).stat().st_mode & 0o777 == 0o755


def test_a_hook_runs_in_the_root_with_its_interpreter(root: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    chroot = tools.require("chroot", "coreutils")
    done = subprocess.run([chroot, root, f"{AFTER}/000", "3"], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("hook of bash 3\n", "", 0)


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


@pytest.mark.parametrize(("symbol", "squashfs"), [("zlib_inflate", False), ("zstd_init_dstream", True)])
def test_a_squashfs_that_cannot_unpack_zstd_is_none(
    symbol: str, squashfs: bool, request_for: ImageRequest, tmp_path: Path
) -> None:
    """As in a kernel with CONFIG_SQUASHFS_ZSTD off, its default: the module takes zlib's symbols alone."""
    module = request_for.modules_dir / "kernel/fs/squashfs/squashfs.ko"
    (tmp_path / "x.c").write_text(f"int {symbol}(void); int begin(void) {{ return {symbol}(); }}\n")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler is installed")
    subprocess.run([compiler, "-c", "-o", module, tmp_path / "x.c"], check=True)
    assert image.reads_zstd(read_tree(request_for.modules_dir)) == squashfs
    if not squashfs:
        with pytest.raises(ImageError, match="this kernel has no zstd in its squashfs; use --no-squashfs"):
            image.build_image(replace(request_for, squashfs=True))


@pytest.mark.parametrize(
    ("configuration", "squashfs"),
    [
        ("CONFIG_SQUASHFS=y\n# CONFIG_SQUASHFS_ZSTD is not set\n", False),
        ("CONFIG_SQUASHFS=y\nCONFIG_SQUASHFS_ZSTD=y\n", True),
        (None, True),
    ],
)
def test_what_a_squashfs_inside_the_kernel_unpacks_its_configuration_says(
    configuration: str | None, squashfs: bool, no_squashfs_tree: Path
) -> None:
    with (no_squashfs_tree / "modules.builtin").open("a") as built_in:
        built_in.write("kernel/fs/squashfs/squashfs.ko\n")
    if configuration is not None:
        (no_squashfs_tree / "config").write_text(configuration)
    assert image.reads_zstd(read_tree(no_squashfs_tree)) == squashfs


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


@pytest.mark.parametrize("size", ["size=1m", "size=12m"])
def test_no_room_for_temporary_files_is_called_that(
    size: str, request_for: ImageRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image's own name was said to be on a full disk, or our own self-test to have failed."""
    with tmpfs(tmp_path / "small", size) as small:
        monkeypatch.setenv("TMPDIR", str(small))
        monkeypatch.setattr(tempfile, "tempdir", None)
        with pytest.raises(
            ImageError, match=rf"^{small} is full \([01] MiB are free\).*make room, 128 MiB, or .*TMPDIR="
        ):
            image.build_image(request_for)
        assert list(small.iterdir()) == []
    assert not request_for.output.exists()


def test_a_missing_module_is_found_out_before_anything_is_built(request_for: ImageRequest) -> None:
    with pytest.raises(ModuleNotThereError, match="floppy"):
        image.build_image(replace(request_for, modules=("floppy",)))
    assert not request_for.output.parent.exists()


def test_without_a_static_busybox_the_line_says_what_to_install(
    request_for: ImageRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "busybox").symlink_to("/bin/ls")
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ToolError, match=r"install busybox-static \(Fedora calls it busybox\)"):
        image.build_image(request_for)


def test_stage_one_is_a_script_that_its_shell_understands() -> None:
    need_image_tools()
    called: set[str] = set()
    for name in ("init", "functions", "hand-over"):
        script = image.SCRIPTS / name
        subprocess.run([tools.require("busybox", "busybox-static"), "sh", "-n", script], check=True)
        called |= set(re.findall(r"\$busybox (\w+)", script.read_text()))

    # Every program that it calls is an applet of the busybox that is packed.
    applets = subprocess.run(
        [tools.require("busybox", "busybox-static"), "--list"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert called <= set(applets)


def stage_one_functions() -> str:
    """Stage one without what it does."""
    script = (image.SCRIPTS / "init").read_text()
    defined = script[: script.index("$busybox mount -t proc")]
    return defined.replace(". /functions", (image.SCRIPTS / "functions").read_text())


@pytest.fixture
def insmod_calls(tmp_path: Path) -> Callable[[str, str], list[list[str]]]:
    """Run stage one's loading of modules, with an insmod that notes its arguments, on a list and a command line."""
    need_image_tools()
    busybox = tools.require("busybox", "busybox-static")
    modules = tmp_path / "modules"
    modules.mkdir()
    stub = tmp_path / "stub"
    stub.write_text(
        f"#!{busybox} sh\n"
        f'[ $1 = insmod ] || exec {busybox} "$@"\n'
        f'shift\necho "$*" | {busybox} tr "\\n" " " >> {tmp_path}/calls\necho >> {tmp_path}/calls\n'
        '[ "${1##*/}" != refused.ko ] || { echo "insmod: cannot insert: Invalid argument" >&2; exit 1; }\n'
        f'[ "${{1##*/}}" != hangs.ko ] || exec {busybox} sleep 4\n'
    )
    stub.chmod(0o755)

    def run(order: str, command_line: str) -> list[list[str]]:
        (modules / "order").write_text(order)
        for line in order.splitlines():
            (modules / line.split()[0]).touch()
        (tmp_path / "cmdline").write_text(command_line)
        functions = stage_one_functions()
        for word, here in (
            ("/bin/busybox", stub), ("/modules", modules), ("/proc/cmdline", tmp_path / "cmdline"),
            ("module_timeout=60", "module_timeout=1"), ("loaded=$place", f"loaded={tmp_path}"),
        ):  # fmt: skip
            functions = functions.replace(word, str(here))
        done = subprocess.run(
            [busybox, "sh", "-c", f"{functions}\nload_modules"], capture_output=True, text=True, check=True
        )
        (tmp_path / "said").write_text(done.stdout + done.stderr)
        assert not list(modules.glob("*.ko"))  # what is loaded is removed: it would only take memory
        calls = (tmp_path / "calls").read_text().splitlines()
        return [[Path(module).name, *options] for module, *options in (call.split() for call in calls)]

    return run


def test_stage_one_gives_modules_their_options_and_then_the_command_lines(
    insmod_calls: Callable[[str, str], list[list[str]]], tmp_path: Path
) -> None:
    calls = insmod_calls(
        "loop.ko\nvirtio_blk.ko queue_depth=64 flags=*\nvirtio.ko\n",
        "ro virtio-blk.queue-depth=8 console=ttyS0 virtio_blk.x=a.b=c not_virtio_blk.y=1 virtio_blk.bare "
        "virtio.debug=1 loop=5 foo=virtio.z=2 -- virtio_blk.init=1\n",
    )

    assert calls == [
        ["loop.ko"],
        ["virtio_blk.ko", "queue_depth=64", "flags=*", "queue-depth=8", "x=a.b=c"],
        ["virtio.ko", "debug=1"],
    ]
    assert (tmp_path / "said").read_text() == ""


@pytest.fixture
def calm_watchdogs(tmp_path: Path) -> Callable[[str], str]:
    """Run stage one's way with watchdogs before a shell, on files; returns what it said and called."""
    need_image_tools()
    busybox = tools.require("busybox", "busybox-static")
    stub = tmp_path / "stub"
    stub.write_text(f'#!{busybox} sh\n[ $1 = watchdog ] && echo "fed: $*" || exec {busybox} "$@"\n')
    stub.chmod(0o755)
    (tmp_path / "dev").mkdir()

    def run(state: str) -> str:
        (tmp_path / "sys/watchdog0").mkdir(parents=True)
        (tmp_path / "sys/watchdog0/state").write_text(f"{state}\n")
        (tmp_path / "dev/watchdog0").touch()
        functions = stage_one_functions()
        for word, here in (
            ("/bin/busybox", stub), ("/sys/class/watchdog", tmp_path / "sys"), ("/dev/", f"{tmp_path}/dev/"),
            (f"{tmp_path}/dev/null", "/dev/null"),
        ):  # fmt: skip
            functions = functions.replace(word, str(here))
        return subprocess.run(
            [busybox, "sh", "-c", f"{functions}\ncalm_watchdogs"], capture_output=True, text=True, check=True
        ).stdout

    return run


def test_stage_one_disarms_what_a_killed_job_has_left_and_feeds_what_stays_armed(
    calm_watchdogs: Callable[[str], str], tmp_path: Path
) -> None:
    said = calm_watchdogs("active")  # (a file does not change: nowayout)

    assert (tmp_path / "dev/watchdog0").read_text() == "V"
    assert said == (
        "vmcapture: watchdog0 cannot be disarmed (nowayout): it is fed as long as this kernel runs\n"
        f"fed: watchdog -T 60 -t 5 {tmp_path}/dev/watchdog0\n"
    )


def test_stage_one_leaves_alone_what_is_not_armed(calm_watchdogs: Callable[[str], str], tmp_path: Path) -> None:
    assert calm_watchdogs("inactive") == ""
    assert (tmp_path / "dev/watchdog0").read_text() == ""


def test_a_value_with_blanks_does_not_spill_into_stage_ones_options(
    insmod_calls: Callable[[str, str], list[list[str]]],
) -> None:
    assert insmod_calls("a.ko\n", 'a.dyndbg="file x +p" a.name="y" a.last=1\n') == [["a.ko", 'name="y"', "last=1"]]


def test_stage_one_goes_on_without_a_driver_that_waits_for_its_disk(
    insmod_calls: Callable[[str, str], list[list[str]]], tmp_path: Path
) -> None:
    """What it says when it comes to its end, later, is not taken for another one's word."""
    calls = insmod_calls("first.ko\nhangs.ko\nsecond.ko\nthird.ko\n", "")

    assert calls == [["first.ko"], ["hangs.ko"], ["second.ko"], ["third.ko"]]
    assert (tmp_path / "said").read_text() == (
        "vmcapture: kernel module hangs.ko: no answer for 1 s; going on without what it drives\n"
    )


def test_stage_one_goes_on_without_a_module_that_is_refused(
    insmod_calls: Callable[[str, str], list[list[str]]], tmp_path: Path
) -> None:
    assert insmod_calls("refused.ko\nvirtio.ko\n", "quiet\n") == [["refused.ko"], ["virtio.ko"]]
    assert (tmp_path / "said").read_text() == (
        "vmcapture: kernel module refused.ko: Invalid argument; going on without it\n"
    )


def test_an_image_takes_the_place_of_files_only(tmp_path: Path) -> None:
    """As ``initramfs -o /dev/full`` did to the device, which is then gone for the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for name, what in (
        ("pipe", "takes the place of; name the file to write"),
        (".", "is a directory"),
        ("file/image", "cannot be written"),
    ):
        with pytest.raises(ImageError, match=what), written_whole(tmp_path / name):
            pass
    assert (tmp_path / "pipe").is_fifo()
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "file"}


def test_a_full_disk_names_the_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="/image: cannot be written: No space left"), written_whole(tmp_path / "image"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), written_whole(tmp_path / "image"):
        (tmp_path / "a-program").read_bytes()
    assert list(tmp_path.iterdir()) == []
