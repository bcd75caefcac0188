"""What holds: the command line first, then the file, then what the command does by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from capture.boot.config import BootConfig, parse
from initramfs import devices, kexec, settings, targets
from initramfs.cli import main
from initramfs.devices import Mount, Needed
from initramfs.image import ImageReport, ImageRequest

from .conftest import program_of


@pytest.fixture
def here(machine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose disks are not there, but for the one that everything is on."""
    monkeypatch.setattr(devices, "find_device", lambda _: None)
    monkeypatch.setattr(devices, "mount_of", lambda path: Mount("/dev/vda", Path("/"), "/", "ext4") if path else None)
    monkeypatch.setattr(targets, "named_mount", lambda _: "UUID=0123")
    return machine


def loaded(machine: Path, *arguments: str) -> tuple[str, BootConfig]:
    """Load; return kexec's flag and what the capture kernel is told."""
    assert main(["load", "--kernel-image", str(machine / "kernel"), "--image", str(machine / "image"), *arguments]) == 0
    call = (machine / "calls").read_text().splitlines()[-1]
    boot = parse(call)
    assert boot.problems == ()
    return call, boot


FILE = """\
xfs UUID=a
ext4 LABEL=b
path /srv/crash
level 1,31
compress zlib
failure_action halt
final_action poweroff
keep 3
free 20%
wait 7
timeout 8
deadline 9
watchdog 60
cpus 2
syscall load
append one two=2
command_line_base base=1 quiet gone=1
command_line_remove gone
"""


def test_load_does_what_the_file_says(here: Path, no_configuration: Path) -> None:
    no_configuration.write_text(FILE)
    call, boot = loaded(here)
    assert boot.targets == ("UUID=a", "LABEL=b")
    assert (boot.path, boot.final, boot.failure) == ("/srv/crash", "poweroff", "halt")
    assert (boot.levels, boot.compression, boot.keep) == ((1, 31), "zlib", 3)
    assert boot.free is not None
    assert (boot.wait, boot.timeout, boot.deadline, boot.watchdog) == (7, 8, 9, 60)
    words = call.split()
    assert words[1] == "-c"  # without -s before it
    assert (here / "calls").read_text().count("\n") == 1
    assert {"one", "two=2", "base=1", "nr_cpus=2"} <= set(call.partition("--command-line=")[2].split())
    assert not {"quiet", "gone=1"} & set(words)


def test_the_command_line_wins(here: Path, no_configuration: Path) -> None:
    no_configuration.write_text(FILE)
    call, boot = loaded(
        here, "--target", "LABEL=c", "--path", "/x", "--level", "17", "--compress", "none", "--failure", "shell",
        "--final", "reboot", "--keep", "4", "--free", "1G", "--wait", "1", "--timeout", "2", "--deadline", "3",
        "--watchdog", "0", "--cpus", "1", "--syscall", "auto", "--append", "three",
    )  # fmt: skip
    assert (boot.targets, boot.path, boot.levels, boot.compression) == (("LABEL=c",), "/x", (17,), "none")
    assert (boot.failure, boot.final, boot.keep, boot.wait, boot.timeout) == ("shell", "reboot", 4, 1, 2)
    assert (boot.deadline, boot.watchdog) == (3, 0)
    assert {"nr_cpus=1", "two=2", "three"} <= set(call.split())


def test_without_a_file_nothing_is_new(here: Path) -> None:
    call, boot = loaded(here)
    assert (boot.targets, boot.path) == (("UUID=0123",), "/var/crash")
    assert boot == BootConfig(targets=("UUID=0123",))
    assert "vmcapture.level" not in call


def test_another_file_can_be_named(here: Path, no_configuration: Path, tmp_path: Path) -> None:
    no_configuration.write_text("keep 3\n")
    other = tmp_path / "other.conf"
    other.write_text("keep 4\n")
    assert loaded(here, "--config", str(other))[1].keep == 4
    assert loaded(here, "--config", "/dev/null")[1].keep is None


def test_a_file_without_targets_means_a_directory_of_this_machine(here: Path, no_configuration: Path) -> None:
    no_configuration.write_text("path /srv\n")
    assert loaded(here)[1][:2] == (("UUID=0123",), "/srv")
    assert loaded(here, "--path", "/x")[1][:2] == (("UUID=0123",), "/x")


def test_the_root_file_system_is_the_last_target(here: Path, no_configuration: Path) -> None:
    no_configuration.write_text("ext4 LABEL=b\nfailure_action dump_to_rootfs\nfinal_action halt\n")
    _, boot = loaded(here)
    assert (boot.targets, boot.failure) == (("LABEL=b", "UUID=0123"), "halt")
    assert loaded(here, "--failure", "shell")[1].targets == ("LABEL=b",)
    no_configuration.write_text("failure_action dump_to_rootfs\n")
    assert loaded(here)[1].targets == ("UUID=0123",)


@pytest.mark.parametrize("root", [Mount("tmpfs", Path("/"), "/", "tmpfs"), Mount("/dev/vda", Path("/"), "/@", "btrfs")])
def test_a_root_that_cannot_be_a_target_is_refused_with_its_line(
    root: Mount, here: Path, no_configuration: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    no_configuration.write_text("\next4 LABEL=b\nfailure_action dump_to_rootfs\n")
    monkeypatch.setattr(devices, "mount_of", lambda _: root)
    assert main(["load", "--kernel-image", str(here / "kernel"), "--image", str(here / "image")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"vmcapture: {no_configuration}:3: failure_action dump_to_rootfs: the root file system (")
    assert "name a second target instead" in said
    assert not (here / "calls").exists()


def test_mistakes_in_the_file_stop_both_commands_with_a_line_each(
    here: Path, no_configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_configuration.write_text("keep none\npath x\n")
    for command in (["load", "--kernel-image", str(here / "kernel"), "--image", str(here / "image")], ["initramfs"]):
        assert main(command) == 2
        first, second = capsys.readouterr().err.splitlines()
        assert first == f"vmcapture: {no_configuration}:1: keep none: a number from 1 to 9999 is needed"
        assert second.startswith(f"vmcapture: {no_configuration}:2: path x: ")
    assert not (here / "calls").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--level", "32"), ("--compress", "lzo"), ("--wait", "-1"), ("--wait", "3601"), ("--deadline", "x")],
    ids=" ".join,
)
def test_nonsense_is_refused(arguments: tuple[str, str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        loaded(here, *arguments)
    assert capsys.readouterr().err.startswith(f"vmcapture load: argument {arguments[0]}: ")


# --- the image ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ImageRequest]:
    """What was asked to be built."""
    requests: list[ImageRequest] = []

    def build(request: ImageRequest) -> ImageReport:
        requests.append(request)
        return ImageReport(request.output, 1, True, request.kernel_release, (), (), 1)

    monkeypatch.setattr("initramfs.builders.build", build)
    monkeypatch.setattr("initramfs.stamp.write", lambda *_: None)
    monkeypatch.setattr(targets, "needed_by", lambda target, _: Needed((f"for_{target}",), ()))
    monkeypatch.setattr(targets, "needed_by_mount", lambda mount, _: Needed((f"for_{mount.device}",), ()))
    monkeypatch.setattr(devices, "mount_of", lambda path: Mount(str(path), Path("/"), "/", "ext4"))
    return requests


def test_the_image_has_what_the_file_asks_for(
    asked: list[ImageRequest],
    no_configuration: Path,
    module_tree: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    programs = {name: program_of(tmp_path / name, "true") for name in ("pre", "post", "extra")}
    no_configuration.write_text(
        f"ext4 LABEL=a\nxfs UUID=b\nkdump_pre {programs['pre']}\nkdump_post {programs['post']}\n"
        f"extra_bins {programs['extra']}\nextra_modules xfs virtio-blk\nforce_rebuild 1\n"
    )
    assert main(["initramfs", "--modules-dir", str(module_tree)]) == 0
    (request,) = asked
    assert request.modules == ("for_LABEL=a", "for_UUID=b", "xfs", "virtio-blk")
    assert (request.before, request.after) == ((programs["pre"],), (programs["post"],))
    assert programs["extra"] in request.binaries
    assert f"{no_configuration}:7: force_rebuild 1: " in capsys.readouterr().err


def test_the_file_says_who_makes_the_image_and_the_option_wins(
    asked: list[ImageRequest], no_configuration: Path, module_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["initramfs", "--modules-dir", str(module_tree)]) == 0
    no_configuration.write_text("image_builder dracut\n")
    assert main(["initramfs", "--modules-dir", str(module_tree)]) == 0
    assert "(made by dracut, squashfs in it), for" in capsys.readouterr().err
    assert main(["initramfs", "--modules-dir", str(module_tree), "--builder", "initramfs-tools"]) == 0
    assert [request.builder for request in asked] == ["vmcapture", "dracut", "initramfs-tools"]


def test_parts_are_written_where_they_are_asked_for_and_no_image_is_made(
    asked: list[ImageRequest], module_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[ImageRequest, Path]] = []

    def write(request: ImageRequest, directory: Path) -> ImageReport:
        written.append((request, directory))
        return ImageReport(directory, 1, True, request.kernel_release, (), (), 1)

    monkeypatch.setattr("initramfs.cli.write_parts", write)
    assert main(["initramfs", "--modules-dir", str(module_tree), "--into", str(tmp_path / "image")]) == 0
    assert [directory for _, directory in written] == [tmp_path / "image"]
    assert written[0][0].modules == ("for_/var/crash",)
    assert asked == []


def test_the_directory_of_the_file_decides_what_the_image_can_mount(
    asked: list[ImageRequest], no_configuration: Path, module_tree: Path
) -> None:
    no_configuration.write_text("path /srv/crash\n")
    assert main(["initramfs", "--modules-dir", str(module_tree)]) == 0
    assert asked[0].modules == ("for_/srv/crash",)


def test_what_is_not_there_is_named_before_anything_is_built(
    asked: list[ImageRequest], no_configuration: Path, module_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    no_configuration.write_text("extra_modules xsf\nkdump_pre /no/such/program\n")
    assert main(["initramfs", "--modules-dir", str(module_tree)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert sorted(said) == [
        f"vmcapture: {no_configuration}:1: extra_modules xsf: {module_tree} has no such module; is xfs meant?",
        f"vmcapture: {no_configuration}:2: kdump_pre /no/such/program: no such file",
    ]
    assert asked == []


def test_what_is_measured_runs_no_programs_of_the_administrators(
    asked: list[ImageRequest], no_configuration: Path, module_tree: Path, tmp_path: Path
) -> None:
    no_configuration.write_text(f"kdump_pre {program_of(tmp_path / 'pre', 'true')}\n")
    assert main(["estimate", "--no-measure", "--modules-dir", str(module_tree)]) in (0, 1)
    assert asked[0].before == ()


def test_parameters_to_be_left_out_are_named_as_the_kernel_takes_them() -> None:
    line = kexec.capture_command_line("a-b=1 c.d=2 e", ("x",), "/", "reboot", "shell", dropped=("a_b", "c.d=5"))
    assert line.split()[0] == "e"


def test_the_defaults_are_those_of_the_capture_kernel() -> None:
    assert (BootConfig().final, BootConfig().failure) == (settings.FINAL, settings.FAILURE)
    assert str(settings.CRASH_DIRECTORY) == BootConfig().path
