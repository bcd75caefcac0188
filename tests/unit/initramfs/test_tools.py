"""Programs are found where an administrator keeps them, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs import tools


def program(directory: Path) -> Path:
    directory.mkdir()
    path = directory / "frobnicate"
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return program(tmp_path / "bin")


def test_path_comes_first_and_the_system_directories_count_always(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = program(tmp_path / "sbin")
    monkeypatch.setattr(tools, "SYSTEM_DIRECTORIES", str(other.parent))

    monkeypatch.setenv("PATH", str(path.parent))
    assert tools.find("frobnicate") == path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tools.find("frobnicate") == other
    monkeypatch.delenv("PATH")
    assert tools.find("frobnicate") == other


@pytest.mark.parametrize("value", [None, "", ":", "/nowhere::/nowhere", ".", "bin"])
def test_the_current_directory_is_never_looked_in(
    value: str | None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    if value is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", value)

    assert tools.find("frobnicate") is None
