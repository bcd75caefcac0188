"""The crash boot's own entry, as far as it may run on a machine that has not crashed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from capture.boot import __main__ as boot_main

REPOSITORY = Path(__file__).resolve().parents[4]


def not_here() -> None:
    if "elfcorehdr" in Path("/proc/cmdline").read_text():
        pytest.skip("this kernel was booted by a crash: the real thing would run")


def test_a_kernel_that_was_not_booted_by_a_crash_gets_a_shell_and_is_told_so() -> None:
    not_here()
    answer = subprocess.run(
        [sys.executable, "-m", "capture.boot"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 64
    assert answer.stdout == ""
    assert answer.stderr.endswith("\n")
    last = answer.stderr.splitlines()[-1]
    assert last.startswith("vmcapture: ")
    assert "not booted by a crash" in last


def test_nothing_is_made_anywhere_on_such_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_here()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stderr", None)  # (a kernel without a console)
    assert boot_main.main() == 64
    assert list(tmp_path.iterdir()) == []


def test_stage_one_knows_the_status_that_asks_for_a_shell() -> None:
    (wanted,) = re.findall(r"^shell_wanted=(\d+)", (REPOSITORY / "initramfs/functions").read_text(), re.MULTILINE)
    assert int(wanted) == boot_main.SHELL
