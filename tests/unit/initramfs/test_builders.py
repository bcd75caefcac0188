"""A distribution's builder gets our parts, and its failure is ours."""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from initramfs import builders, directives, estimate, measure, services, stamp
from initramfs.builders import DISTRIBUTIONS, DRACUT, INITRAMFS_TOOLS
from initramfs.cli import main
from initramfs.errors import ImageError, ToolError
from initramfs.image import OWN, ImageRequest

from .conftest import RELEASE, make_module_tree, need_image_tools, program_of

PACKAGING = Path(__file__).parents[3] / "packaging"


@pytest.fixture
def wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageRequest:
    """An image for a kernel whose modules are where the builder looks for them."""
    need_image_tools()
    tree = make_module_tree(tmp_path / "modules" / RELEASE)
    monkeypatch.setattr(builders, "MODULES", tree.parent)
    return ImageRequest(
        output=tmp_path / "out/image", kernel_release=RELEASE, modules_dir=tree, modules=("virtio_blk",),
        builder=INITRAMFS_TOOLS,
    )  # fmt: skip


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a script in the place of mkinitramfs; its words are what a builder is called with."""
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    (hooks / "hook").touch()

    def make(script: str) -> Path:
        path = program_of(tmp_path / "mkinitramfs", script)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        builder = DISTRIBUTIONS[INITRAMFS_TOOLS]._replace(hooks=hooks, settings=(tmp_path / "settings",))
        monkeypatch.setitem(DISTRIBUTIONS, INITRAMFS_TOOLS, builder)
        return path

    return make


def test_the_configuration_file_knows_each_builder() -> None:
    assert (OWN, *DISTRIBUTIONS) == directives.BUILDERS


def test_what_the_builders_are_given_is_in_the_sources() -> None:
    for name, builder in DISTRIBUTIONS.items():
        assert (PACKAGING / name / (builder.hooks.name if name == DRACUT else "hooks")).is_dir()


def test_the_builder_finds_the_parts_and_its_image_is_put_in_place(
    wanted: ImageRequest, program: Callable[[str], Path], tmp_path: Path
) -> None:
    settings = tmp_path / "settings"
    settings.mkdir()
    (settings / "initramfs.conf").write_text("MODULES=dep\n")
    made_by = program('[ "$1 $2 $3" = "-d /usr/share/vmcapture/initramfs-tools -o" ] || exit 7\n'
                      'cat "$VMCAPTURE_PARTS/vmcapture/modules" > "$4"; echo "$5" >> "$4"; chmod 644 "$4"')  # fmt: skip
    report = builders.build(wanted)
    assert wanted.output.read_text() == f"loop\nsquashfs\nvirtio_ring\nvirtio\nvirtio_blk\n{RELEASE}\n"
    assert stat.S_IMODE(wanted.output.stat().st_mode) == 0o600
    assert [path.name for path in wanted.output.parent.iterdir()] == ["image"]
    assert (report.path, report.size) == (wanted.output, wanted.output.stat().st_size)
    assert {made_by, settings / "initramfs.conf", tmp_path / "hooks/hook"} <= set(report.sources)

    stamp.write(wanted, report)
    assert stamp.stale(wanted) is None
    assert stamp.stale(replace(wanted, builder=DRACUT)) == "configuration, target or devices have changed"
    (settings / "initramfs.conf").write_text("MODULES=most\n")
    assert stamp.stale(wanted) == f"{settings}/initramfs.conf changed since it was built"


@pytest.mark.parametrize("there", [True, False])
def test_a_setting_that_is_new_makes_the_image_out_of_date(
    wanted: ImageRequest, program: Callable[[str], Path], tmp_path: Path, there: bool
) -> None:
    settings = tmp_path / "settings"
    if there:
        (settings / "conf.d").mkdir(parents=True)
    program('echo image > "$4"')
    stamp.write(wanted, builders.build(wanted))
    assert stamp.stale(wanted) is None
    (settings / "conf.d").mkdir(parents=True, exist_ok=True)
    (settings / "conf.d/compress").write_text("COMPRESS=xz\n")
    assert stamp.stale(wanted) == f"{settings}{'/conf.d' if there else ''} changed since it was built"


def test_estimate_computes_for_a_builders_image_and_says_why_in_one_line(
    wanted: ImageRequest, program: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program('head -c 30000000 /dev/zero | gzip > "$4"')
    (tmp_path / "conf").write_text("image_builder initramfs-tools\n")
    (tmp_path / "vmlinuz").touch()
    words = ["--config", str(tmp_path / "conf"), "--kernel-image", str(tmp_path / "vmlinuz")]
    words += ["--modules-dir", str(wanted.modules_dir), "--module", "virtio_blk"]
    assert main(["estimate", *words]) == 0
    shown = capsys.readouterr()
    first, *parts, last = shown.out.splitlines()
    assert first == estimate.estimate(30000000).parameter
    assert [part.split()[:2] for part in parts if "image" in part] == [["image", "28.6"]]
    assert last == f"  computed, not measured: {measure.OTHER_BUILDER}"
    assert shown.err == ""


@pytest.mark.parametrize("systemd", [True, False])
def test_dracut_is_not_given_a_file_system_to_freeze(
    wanted: ImageRequest, program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, systemd: bool
) -> None:
    """It freezes the one that holds its image, where systemd runs."""
    program(f'echo "${{4%/*}}" > {tmp_path}/where; echo image > "$4"')
    monkeypatch.setitem(DISTRIBUTIONS, INITRAMFS_TOOLS, DISTRIBUTIONS[INITRAMFS_TOOLS]._replace(freezes=True))
    monkeypatch.setattr(builders, "RUN", tmp_path / "run")
    monkeypatch.setattr(services, "SYSTEMD", tmp_path if systemd else tmp_path / "none")
    builders.build(wanted)
    where = Path((tmp_path / "where").read_text().strip())
    assert where.parent == (tmp_path / "run" if systemd else tmp_path)
    assert (where == wanted.output.parent) is not systemd
    assert (wanted.output.read_text(), stat.S_IMODE(wanted.output.stat().st_mode)) == ("image\n", 0o600)
    assert [path.name for path in wanted.output.parent.iterdir()] == ["image"]
    assert not systemd or list((tmp_path / "run").iterdir()) == []
    assert [name for name, builder in DISTRIBUTIONS.items() if builder.freezes] == [INITRAMFS_TOOLS, DRACUT]


def test_dracut_makes_no_unified_kernel_image_whatever_the_machine_wants(tmp_path: Path) -> None:
    words = DISTRIBUTIONS[DRACUT].command(Path("/usr/bin/dracut"), tmp_path / "image", RELEASE)
    assert "--no-uefi" in words
    assert words[-2:] == (tmp_path / "image", RELEASE)


def test_dracut_puts_each_module_in_whatever_the_machines_own_initrd_is_without(tmp_path: Path) -> None:
    (tmp_path / "vmcapture").mkdir()
    (tmp_path / "vmcapture/modules").write_text("loop\nvirtio_blk queue_depth=64\n")
    setup = PACKAGING / "dracut/98vmcapture/module-setup.sh"
    script = (
        f'initdir={tmp_path} hostonly=1 omit_drivers="virtio_blk"; . {setup}\n'
        'instmods() { echo "[$hostonly][$omit_drivers] $*"; [ "$FAILING" != "$2" ]; }\n'
        'installkernel || echo failed'
    )  # fmt: skip

    def said(failing: str) -> list[str]:
        done = subprocess.run(
            ["bash", "-c", script], env={"FAILING": failing}, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    assert said("") == ["[][] -c loop", "[][] -c virtio_blk"]
    assert said("loop") == ["[][] -c loop", "failed"]


def test_a_builder_that_fails_leaves_the_image_that_was_there(
    wanted: ImageRequest, program: Callable[[str], Path]
) -> None:
    made_by = program('echo half > "$4"; echo "W: something" >&2; echo "E: no space left" >&2; exit 1')
    wanted.output.parent.mkdir()
    wanted.output.write_text("before")
    with pytest.raises(ToolError, match=f"{made_by} failed with status 1: E: no space left"):
        builders.build(wanted)
    assert wanted.output.read_text() == "before"
    assert [path.name for path in wanted.output.parent.iterdir()] == ["image"]


def test_what_is_missing_is_said_before_anything_is_made(
    wanted: ImageRequest, program: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("exit 9")
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(ImageError, match=rf"{elsewhere}: mkinitramfs takes modules from .*/RELEASE alone"):
        builders.build(replace(wanted, modules_dir=elsewhere))
    (tmp_path / "hooks/hook").unlink()
    (tmp_path / "hooks").rmdir()
    with pytest.raises(
        ImageError, match=r"no such directory, .*: copy it from packaging/initramfs-tools of the sources"
    ):
        builders.build(wanted)
    (tmp_path / "mkinitramfs").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("initramfs.tools.SYSTEM_DIRECTORIES", str(tmp_path))
    with pytest.raises(ToolError, match="mkinitramfs was not found: install initramfs-tools"):
        builders.build(wanted)


SHELLS = [words for words in (["dash"], ["busybox", "sh"], ["sh"]) if shutil.which(words[0])]


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_mkinitramfs_is_told_what_the_machine_says_and_not_what_an_editor_left(
    shell: list[str], tmp_path: Path
) -> None:
    text = (PACKAGING / "initramfs-tools/initramfs.conf").read_text()
    assert "/etc/initramfs-tools" in text

    def settings() -> str:
        script = text.replace("/etc/initramfs-tools", str(tmp_path)) + 'echo "$COMPRESS $MODULES $UMASK $RESUME"'
        return subprocess.run([*shell, "-euc", script], capture_output=True, text=True, check=True).stdout.strip()

    (tmp_path / "initramfs.conf").write_text("COMPRESS=gzip\nMODULES=most\n")
    assert settings() == "gzip dep 0077 none"
    (tmp_path / "conf.d").mkdir()
    for name in ("compress", "compress~", "compress.dpkg-old", "compress.bak~", "#compress#", "not this", ".swp"):
        (tmp_path / "conf.d" / name).write_text(f"COMPRESS='{'zstd' if name == 'compress' else name}'\n")
    assert settings() == "zstd dep 0077 none"


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
@pytest.mark.parametrize("parts", ["made already", "by the hook"])
def test_the_hook_of_mkinitramfs_puts_parts_and_modules_in(shell: list[str], parts: str, tmp_path: Path) -> None:
    root = tmp_path / "a root"
    rules = root / "lib/udev/rules.d"
    rules.mkdir(parents=True)
    for name in ("60-block.rules", "64-md-raid-assembly.rules", "69-lvm.rules", "69-lvm-metad.rules"):
        (rules / name).touch()
    made = tmp_path / "some parts/vmcapture"
    made.mkdir(parents=True)
    (made / "modules").write_text("virtio_blk queue_depth=64\nsd_mod\n")
    (tmp_path / "functions").write_text(
        'manual_add_modules() { [ "$1" = refused ] || : > "$DESTDIR/lib/$(echo "$1" | tr _ -).ko.xz"; }\n'
    )
    program_of(tmp_path / "vmcapture", f'echo "$@" > "{tmp_path}/calls"; cp -a "{made}" "$6"')
    text = (PACKAGING / "initramfs-tools/hooks/vmcapture").read_text()
    (tmp_path / "hook").write_text(text.replace("/usr/share/initramfs-tools/hook-functions", f"{tmp_path}/functions"))
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DESTDIR": str(root), "version": RELEASE}
    if parts == "made already":
        environment[builders.PARTS] = str(made.parent)

    def hook() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*shell, tmp_path / "hook"], env=environment, capture_output=True, text=True, check=False
        )  # fmt: skip

    done = hook()
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in (root / "lib").glob("*.ko*")) == ["sd-mod.ko.xz", "virtio-blk.ko.xz"]
    assert [path.name for path in rules.iterdir()] == ["60-block.rules"], "arrays and volumes are for the job"
    if parts == "by the hook":
        assert (tmp_path / "calls").read_text() == f"initramfs --quiet --kernel {RELEASE} --into {root}\n"
    shutil.rmtree(root / "vmcapture")
    (made / "modules").write_text("refused\n")
    done = hook()
    assert done.returncode == 1
    assert done.stderr == "vmcapture: mkinitramfs has not put the kernel module refused into the image\n"


def test_our_drivers_are_loaded_before_udev_by_the_order_of_names() -> None:
    """mkinitramfs sorts boot scripts without prerequisites by their names; Debian's own of this time are these."""
    (ours,) = (PACKAGING / "initramfs-tools/scripts/init-top").iterdir()
    assert min("all_generic_ide", "blacklist", "keymap", "udev", ours.name) == ours.name
    said = subprocess.run([ours, "prereqs"], capture_output=True, text=True, check=True).stdout
    assert said == ""
