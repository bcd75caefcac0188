"""``list``, ``show`` and ``report`` from the outside."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from initramfs import notify, state
from initramfs.cli import main
from tests.builders import PANIC
from tests.saved import FIRST, name_of, save_crash

from .conftest import program_of


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with two crashes, which its configuration leads to."""
    monkeypatch.setattr(state, "DIRECTORY", tmp_path / "state")
    monkeypatch.setattr("initramfs.settings.CRASH_DIRECTORY", tmp_path / "none")
    monkeypatch.setattr(notify, "DIRECTORY", tmp_path / "notify.d")
    (tmp_path / "crash").mkdir()
    for when in (FIRST, FIRST + 60):
        save_crash(tmp_path / "crash", when)
    program_of(tmp_path / "hook", f'echo "$1" >> {tmp_path}/told')
    (tmp_path / "conf").write_text(f"path {tmp_path}/crash\nnotify command {tmp_path}/hook\n")
    return tmp_path


def config(host: Path) -> tuple[str, str]:
    return "--config", str(host / "conf")


def test_list_finds_what_the_configuration_names(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *config(host)]) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.startswith(f"{host}/crash: ")
    assert [line.split()[0] for line in (first, second)] == [name_of(FIRST + 60), name_of(FIRST)]
    assert main(["list", "--json", str(host / "crash")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [crash["state"] for crash in found] == ["whole", "whole"]
    assert found[0]["panic"] == PANIC.decode()


def test_list_without_a_crash_says_so(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(host / "crash")
    (host / "crash").mkdir()
    assert main(["list", str(host / "crash")]) == 0
    assert capsys.readouterr() == ("", f"vmcapture: no crash was saved in {host}/crash\n")
    assert main(["list", str(host / "nowhere")]) == 4
    assert capsys.readouterr().err == f"vmcapture: {host}/nowhere: no such directory\n"


def test_show_shows_the_newest_or_the_one_that_is_named(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", *config(host)]) == 0
    assert f"directory  {host}/crash/{name_of(FIRST + 60)}" in capsys.readouterr().out
    assert main(["show", name_of(FIRST), *config(host)]) == 0
    assert f"directory  {host}/crash/{name_of(FIRST)}" in capsys.readouterr().out
    assert main(["show", str(host / "crash" / name_of(FIRST)), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["panicked_cpu"] == 1
    assert shown["registers"]["rip"]
    assert any(PANIC.decode() in line for line in shown["log"])
    assert shown["open"][0].startswith("crash /usr/lib/debug/")


def test_show_of_what_is_not_there_is_a_line(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "web1-2001-01-01-00:00:00", *config(host)]) == 4
    said = capsys.readouterr().err
    assert said.startswith("vmcapture: web1-2001-01-01-00:00:00: no such crash is in ")
    assert said.count("\n") == 1
    assert main(["show", str(host)]) == 4
    assert "not a crash that vmcapture saved" in capsys.readouterr().err


def test_report_tells_once_whom_the_configuration_names(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = save_crash(host / "crash", int(time.time()) - 60)
    assert main(["report", *config(host)]) == 0
    said = capsys.readouterr().err
    assert said.count("more than 7 days old, not reported") == 2
    assert f"{new}: whole, every page read back" in said
    assert (host / "told").read_text() == f"{new}\n"
    assert main(["report", *config(host)]) == 0
    assert capsys.readouterr().err == "vmcapture: no crash that was not reported before\n"
    assert (host / "told").read_text() == f"{new}\n"


def test_report_ends_with_1_when_somebody_could_not_be_told(host: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_crash(host / "crash", int(time.time()) - 60)
    program_of(host / "hook", "echo 'pager is on fire' >&2; exit 1")
    assert main(["report", "--json", *config(host)]) == 1
    out = json.loads(capsys.readouterr().out)
    assert [crash["status"] for crash in out["crashes"]] == [0]
    assert out["not_told"] == [f"notify command {host}/hook: failed with status 1: pager is on fire"]
    assert main(["report", "--no-notify", *config(host)]) == 0
