"""What the package installs beside the program: systemd reads the units, the kernel's hooks call what they should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.initramfs.conftest import program_of

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
UNITS = sorted((PACKAGING / "systemd").iterdir())
HOOKS = sorted(
    path for folder in ("postinst.d", "postrm.d", "install.d") for path in (PACKAGING / "kernel" / folder).iterdir()
)


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    copies = []
    for unit in UNITS:
        # The program is not installed here, and systemd looks for it.
        text = re.sub(r"^(Exec\w+)=vmcapture\b", r"\1=/bin/true", unit.read_text(), flags=re.MULTILINE)
        assert text.count("/bin/true") == text.count("Exec") - text.count("ExecStartPre") or unit.suffix == ".timer"
        (tmp_path / unit.name).write_text(text)
        copies.append(tmp_path / unit.name)
    done = subprocess.run(
        [analyze, "verify", "--man=no", *copies], capture_output=True, text=True, check=False,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "info"},
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "vmcapture" in line]
    assert ours == []
    assert done.returncode == 0, done.stderr


def test_each_command_of_a_unit_is_one_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    from initramfs.cli import main

    commands = {words for unit in UNITS for words in re.findall(r"^Exec\w+=vmcapture (.*)$", unit.read_text(), re.M)}
    assert commands == {"arm", "unload", "report", "collect --quiet", "status --prometheus"}
    for words in commands:
        with pytest.raises(SystemExit, match="0"):
            main([*words.split(), "--help"])
    capsys.readouterr()


def test_the_unit_that_arms_is_not_stopped_at_shutdown_and_excludes_the_others() -> None:
    text = (PACKAGING / "systemd/vmcapture.service").read_text()
    assert "DefaultDependencies=no" in text
    assert "shutdown.target" not in text
    assert re.search(r"^Conflicts=kdump\.service kdump-tools\.service$", text, re.MULTILINE)
    assert "SuccessExitStatus=3" in text


@pytest.fixture
def called(tmp_path: Path) -> Path:
    """A PATH with a vmcapture that notes how it is called, and with what status it ends; and a systemctl."""
    (tmp_path / "bin").mkdir()
    program_of(tmp_path / "bin/vmcapture", f'echo "$@" >> {tmp_path}/calls; exit $(cat {tmp_path}/status)')
    program_of(tmp_path / "bin/systemctl", f"test ! -e {tmp_path}/disabled")
    program_of(tmp_path / "bin/uname", "echo 6.1.0-running")
    (tmp_path / "status").write_text("0\n")
    return tmp_path


def hook(called: Path, name: str, *arguments: str) -> tuple[int, str]:
    """Run a hook; its exit status, and what vmcapture was called with."""
    environment = {"PATH": f"{called / 'bin'}:/usr/bin:/bin"}
    done = subprocess.run(
        [PACKAGING / "kernel" / name, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    calls = called / "calls"
    return done.returncode, calls.read_text() if calls.exists() else ""


@pytest.mark.parametrize("name", ["postinst.d/vmcapture", "install.d/98-vmcapture.install"])
def test_a_new_kernel_gets_its_image_and_is_not_loaded(name: str, called: Path) -> None:
    command = ["add"] if name.startswith("install") else []
    assert hook(called, name, *command, "6.2.0-new") == (0, "arm --kernel 6.2.0-new --build-only\n")


def test_the_running_kernel_rebuilt_is_armed_with_at_once(called: Path) -> None:
    assert hook(called, "postinst.d/vmcapture", "6.1.0-running", "/boot/vmlinuz-6.1.0-running") == (0, "arm\n")


@pytest.mark.parametrize("status", ["0", "1", "3"])
def test_no_failure_of_ours_stops_a_kernel_from_being_installed(status: str, called: Path) -> None:
    (called / "status").write_text(f"{status}\n")
    assert hook(called, "postinst.d/vmcapture", "6.2")[0] == 0
    assert hook(called, "install.d/98-vmcapture.install", "add", "6.2")[0] == 0


@pytest.mark.parametrize(
    "arguments", [("postinst.d/vmcapture", "6.2"), ("install.d/98-vmcapture.install", "add", "6.2")]
)
def test_nothing_is_built_where_it_is_not_enabled(arguments: tuple[str, ...], called: Path) -> None:
    (called / "disabled").touch()
    assert hook(called, *arguments) == (0, "")


def test_hooks_without_a_release_do_nothing(called: Path) -> None:
    for path in HOOKS:
        assert os.access(path, os.X_OK)
        assert hook(called, str(path.relative_to(PACKAGING / "kernel"))) == (0, "")


@pytest.mark.parametrize(
    ("said", "stays"),
    [(None, False), ("remove", False), ("'remove'", False), ("upgrade 6.1.170-1", True), ("purge", True)],
)
def test_the_image_of_a_kernel_goes_when_that_is_removed_and_not_when_it_is_upgraded(
    said: str | None, stays: bool, tmp_path: Path
) -> None:
    """dpkg has the old package's postrm run on an upgrade, and that runs the hooks (Debian's linux-image)."""
    text = (PACKAGING / "kernel/postrm.d/vmcapture").read_text()
    assert "/var/lib/vmcapture/" in text
    (tmp_path / "hook").write_text(text.replace("/var/lib/vmcapture/", f"{tmp_path}/"))
    files = [tmp_path / f"initramfs-6.1.img{kind}" for kind in ("", ".stamp", ".loaded")]
    for file in (*files, tmp_path / "initramfs-6.1-rt.img"):
        file.touch()
    environment = {"PATH": "/usr/bin:/bin"} | ({} if said is None else {"DEB_MAINT_PARAMS": said})
    subprocess.run(["sh", tmp_path / "hook", "6.1", "/boot/vmlinuz-6.1"], env=environment, check=True)
    assert [file.exists() for file in files] == [stays] * 3
    assert (tmp_path / "initramfs-6.1-rt.img").exists()


@pytest.mark.parametrize(("release", "stays"), [("6.0.0-old", False), ("6.1.0-running", True)])
def test_a_kernel_that_is_installed_anew_while_it_runs_keeps_its_image(
    release: str, stays: bool, called: Path, tmp_path: Path
) -> None:
    """Fedora's kernel.spec calls kernel-install remove whenever a package goes, a new one of the same release too."""
    text = (PACKAGING / "kernel/install.d/98-vmcapture.install").read_text()
    (tmp_path / "hook").write_text(text.replace("/var/lib/vmcapture/", f"{tmp_path}/"))
    files = [tmp_path / f"initramfs-{release}.img{kind}" for kind in ("", ".stamp", ".loaded")]
    for file in files:
        file.touch()
    environment = {"PATH": f"{called / 'bin'}:/usr/bin:/bin"}
    subprocess.run(["sh", tmp_path / "hook", "remove", release], env=environment, check=True)
    assert [file.exists() for file in files] == [stays] * 3


def test_each_rule_leads_to_a_label_that_there_is() -> None:
    text = (PACKAGING / "udev/98-vmcapture.rules").read_text()
    labels = set(re.findall(r'LABEL="(\w+)"', text))
    assert set(re.findall(r'GOTO="(\w+)"', text)) == labels
    (unit,) = re.findall(r'RUN\+="/usr/bin/systemctl --no-block restart ([\w.-]+)"', text)
    assert (PACKAGING / "systemd" / unit).exists()
