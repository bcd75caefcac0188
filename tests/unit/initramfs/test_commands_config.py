"""``vmcapture config`` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from initramfs import devices, targets
from initramfs.cli import main
from initramfs.config import parse
from initramfs.devices import Mount, Needed

from .conftest import program_of


@pytest.fixture(autouse=True)
def disks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "needed_by", lambda *_: Needed((), ()))
    monkeypatch.setattr(targets, "named_mount", lambda _: "UUID=1")
    monkeypatch.setattr(devices, "find_device", lambda _: None)
    monkeypatch.setattr(devices, "mount_of", lambda _: Mount("/dev/vda", Path("/"), "/", "ext4"))
    monkeypatch.setattr(targets, "needed_by_mount", lambda *_: Needed((), ()))


def test_check_says_what_would_be_done(
    tmp_path: Path, no_configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = program_of(tmp_path / "page", "true")
    no_configuration.write_text(
        f"ext4 LABEL=a\nnfs db:/srv\npath /crash\ncore_collector makedumpfile -c -d 17,31\nkdump_post {program}\n"
        "failure_action dump_to_rootfs\nkeep 5\nwait 60\nnotify mail root\n"
    )
    assert main(["config", "check"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{no_configuration}: all of it can be followed"
    shown = [(line[2:20].strip(), line[21:]) for line in lines if line.startswith("  ")]
    assert shown[:3] == [
        ("target 1", "LABEL=a"), ("target 2", "nfs:db:/srv"), ("target 3", "the root file system"),
    ]  # fmt: skip
    assert {
        ("directory", "/crash"), ("level", "17,31"), ("compression", "zlib"), ("crashes kept", "5"), ("wait", "60 s"),
        ("after it, too", str(program)), ("after a failure", "reboot"), ("told at next boot", "mail root"),
    } <= set(shown)  # fmt: skip


def test_check_names_what_is_wrong_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.conf"
    file.write_text("keep no\nkeep 3\n")
    assert main(["config", "check", str(file)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split(": ")[1] for line in shown.err.splitlines()] == [f"{file}:1", f"{file}:2"]
    assert main(["config", "check", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_check_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.conf"
    file.write_text("ext4 LABEL=a\nsshkey /k\nnotify mail root\n")
    assert main(["config", "check", "--json", str(file)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["targets"] == ["LABEL=a"]
    assert (values["sshkey"], values["notify"], values["failure"]) == ("/k", [["mail", "root"]], "reboot")


def test_import_writes_a_file_that_check_accepts(
    tmp_path: Path, no_configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "kdump-tools"
    source.write_text("USE_KDUMP=1\nKDUMP_COREDIR=/srv\nKDUMP_NUM_DUMPS=3\nHOSTTAG=ip\n")
    no_configuration.write_text("# keep 3 is only a comment\n")
    assert main(["config", "import", str(source)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert any("HOSTTAG" in line for line in said)
    assert said[-1].startswith(f"vmcapture: {no_configuration}: written; next: ")
    assert parse(no_configuration.read_text(), no_configuration).keep == 3
    assert no_configuration.stat().st_mode & 0o777 == 0o644
    assert main(["config", "check"]) == 0


def test_import_never_replaces_what_somebody_wrote(
    tmp_path: Path, no_configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "kdump-tools"
    source.write_text("KDUMP_COREDIR=/srv\n")
    no_configuration.write_text("keep 7\n")
    assert main(["config", "import", str(source)]) == 2
    assert "--force replaces it" in capsys.readouterr().err
    assert no_configuration.read_text() == "keep 7\n"
    assert main(["config", "import", "-o", "-", str(source)]) == 0
    assert "path /srv\n" in capsys.readouterr().out
    assert main(["config", "import", "--force", str(source)]) == 0
    assert "path /srv" in no_configuration.read_text()


def test_import_that_lost_something_says_so_by_its_status(
    tmp_path: Path, no_configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "kdump-tools"
    source.write_text("KDUMP_COREDIR=/srv\nKDUMP_KERNEL=/boot/other\n")
    assert main(["config", "import", "-q", str(source)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"vmcapture: not carried over: {source}:2: KDUMP_KERNEL: ")
    assert "path /srv" in no_configuration.read_text()


def test_import_without_a_target_writes_nothing(
    tmp_path: Path, no_configuration: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "kdump-tools"
    source.write_text("FTP=a:b\n")
    assert main(["config", "import", str(source)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("vmcapture: nothing was written")
    assert not no_configuration.exists()


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "kdump-tools"
    source.write_text("KDUMP_COREDIR=/srv\n")
    assert main(["config", "import", "-o", str(tmp_path / "no/such/folder"), str(source)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_to_do_about_a_missing_file_is_something_that_check_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "check", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"vmcapture: {tmp_path}/none: No such file or directory; name another file\n"


def test_an_import_takes_the_place_of_no_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kdump.conf").write_text("path /var/crash\n")
    (tmp_path / "out").symlink_to("/dev/null")
    assert main(["config", "import", str(tmp_path / "kdump.conf"), "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"vmcapture: {tmp_path}/out: is a device, ")
    assert line.endswith("takes the place of; name another place with -o\n")
    assert (tmp_path / "out").is_symlink()


def test_a_name_that_would_drive_the_terminal_is_spelt_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "\x1b[2J").write_text("append a\nnotify mail root\nnotify mail root\n")
    assert main(["config", "check", str(tmp_path / "\x1b[2J")]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert shown.endswith(f"{tmp_path}/\\x1b[2J:3: notify mail root: there already\n")
