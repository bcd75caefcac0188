"""``vmcapture save`` without a directory, at one target."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot import job, mounting, targets
from capture.boot.config import BootConfig
from capture.boot.save import save_to_target
from capture.console import Console
from capture.errors import CaptureError, SourceError, TargetError
from tests.builders import crashed_core
from tests.outcome import FILES, WHEN, Run, dump_options, listing, read_back

WriteFile = Callable[[bytes], str]

QUIET = dump_options()


def test_on_the_command_line_that_is_one_line_and_status_2(vmcore_file: WriteFile, run: Run) -> None:
    if "vmcapture.target=" in Path("/proc/cmdline").read_text():
        pytest.skip("this kernel's command line names a target")
    ran = run("save", "--source", vmcore_file(crashed_core()))
    assert (ran.status, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert "vmcapture save DIR" in ran.err


def test_a_target_that_is_not_there_is_a_failure_of_the_target(vmcore_file: WriteFile, console: Console) -> None:
    with pytest.raises(TargetError, match="LABEL=vmcapture-none"):
        save_to_target(BootConfig(wait=0), "LABEL=vmcapture-none", console, QUIET, vmcore_file(crashed_core()))


def test_without_a_vmcore_nothing_is_mounted(disk: Callable[..., Path], tmp_path: Path, console: Console) -> None:
    disk()
    with pytest.raises(SourceError):
        save_to_target(BootConfig(wait=0), "LABEL=x", console, QUIET, str(tmp_path / "none"))
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("path", ["/var/crash", "/"])
def test_the_crash_lies_below_the_path_and_is_named_as_on_the_target_itself(
    path: str, vmcore_file: WriteFile, disk: Callable[..., Path], tmp_path: Path, console: Console
) -> None:
    root = disk()
    saved = save_to_target(BootConfig(path=path), "LABEL=x", console, QUIET, vmcore_file(crashed_core()))
    assert saved.directory == Path(path) / f"db7-{WHEN}"
    assert listing(root / path.lstrip("/") / f"db7-{WHEN}") == set(FILES)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["findfs", "mount", "umount"]


def test_a_link_on_the_target_that_leads_out_of_it_is_refused(
    vmcore_file: WriteFile, disk: Callable[..., Path], tmp_path: Path, console: Console
) -> None:
    """On the crashed system /var/crash was a link to another place of its own: here it would be our own memory."""
    root = disk()
    (root / "var").mkdir(parents=True)
    (root / "var/crash").symlink_to(tmp_path)
    with pytest.raises(TargetError, match="symbolic link"):
        save_to_target(BootConfig(), "LABEL=x", console, QUIET, vmcore_file(crashed_core()))
    (root / "var/crash").unlink()
    (root / "srv").mkdir()
    (root / "var/crash").symlink_to("../srv")
    saved = save_to_target(BootConfig(), "LABEL=x", console, QUIET, vmcore_file(crashed_core()))
    assert listing(root / "srv" / saved.directory.name) == set(FILES)


def test_what_was_saved_is_told_before_the_disk_is_unmounted(
    vmcore_file: WriteFile, disk: Callable[..., Path], tmp_path: Path, console: Console
) -> None:
    """It may hang there."""
    disk()
    told: list[str] = []

    def tell(saved: job.SaveReport) -> None:
        assert "umount" not in (tmp_path / "calls").read_text()
        told.append(str(saved.directory))

    save_to_target(BootConfig(), "LABEL=x", console, QUIET, vmcore_file(crashed_core()), tell=tell)
    assert told == [f"/var/crash/db7-{WHEN}"]


def test_a_source_need_not_be_mapped(vmcore_file: WriteFile, disk: Callable[..., Path], console: Console) -> None:
    root = disk()
    mapped = save_to_target(BootConfig(), "LABEL=x", console, QUIET, vmcore_file(crashed_core()))
    read = save_to_target(BootConfig(), "LABEL=x", console, QUIET, vmcore_file(crashed_core()), can_map=False)
    pages = [read_back(root / str(saved.directory)[1:] / "vmcore") for saved in (mapped, read)]
    assert pages[0] == pages[1]


def test_what_was_saved_is_not_called_lost_because_the_disk_cannot_be_unmounted(
    vmcore_file: WriteFile, disk: Callable[..., Path], console: Console
) -> None:
    """Everything is on the disk and synced; a person at 3 a.m. must be told where, and that unmounting failed."""
    disk(umount="echo target is busy >&2; exit 32")
    try:
        saved = save_to_target(BootConfig(), "LABEL=x", console, QUIET, vmcore_file(crashed_core()))
    except CaptureError as error:
        assert f"db7-{WHEN}" in str(error)  # noqa: PT017  (either way of telling is fine)
        assert "busy" in str(error)  # noqa: PT017
    else:
        assert saved.directory.name == f"db7-{WHEN}"
        assert any("busy" in line for line in [*saved.failures, *console.lines])


def test_a_crash_saved_to_a_real_disk_is_there_after_it_is_mounted_again(
    loop_disk: tuple[str, str],
    vmcore_file: WriteFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: Console,
) -> None:
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")
    _, label = loop_disk
    saved = save_to_target(BootConfig(wait=5), f"LABEL={label}", console, QUIET, vmcore_file(crashed_core()))
    assert job.exit_status(saved) == 0
    assert not os.path.ismount(tmp_path / "mnt")
    with targets.mounted_target(f"LABEL={label}", 5, console) as root:
        folder = root / str(saved.directory).lstrip("/")
        assert listing(folder) == set(FILES)
        assert json.loads((folder / "manifest.json").read_bytes())["complete"] is True


def test_the_default_source_is_the_dead_kernel() -> None:
    if "elfcorehdr=" in Path("/proc/cmdline").read_text():
        pytest.skip("this is a crash boot")
    assert job.default_source() == "/proc/vmcore"
