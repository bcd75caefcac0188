"""How each file of a save is created: new, private from its first byte, no link followed, no name to be guessed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.builders import crashed_core, numbered
from tests.encryption import Key
from tests.outcome import the_directory

WATCHER = """
import json, os, sys
opened, plain = [], os.open
def watched(path, flags, mode=0o777, **options):
    opened.append((os.fspath(path), flags, mode))
    return plain(path, flags, mode, **options)
os.open = watched
others = []
def hook(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        others.append(str(arguments[0]))
sys.addaudithook(hook)
if os.environ.get("WITHOUT_UNNAMED_FILES"):
    os.O_TMPFILE = os.O_DIRECTORY | os.O_CREAT | os.O_EXCL
from capture.cli import main
status = main(sys.argv[1:])
print(json.dumps([status, opened, others]))
"""
SLOW_CLOCK = """
import itertools, sys, time
from capture.cli import main
ticks = itertools.count()
time.monotonic = lambda: next(ticks) / 2
sys.exit(main(sys.argv[1:]))
"""
"""A deadline of a second has always passed when it is looked at."""
WRITES = os.O_CREAT | os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND


class Opened(NamedTuple):
    path: str
    flags: int
    mode: int


def opened_for_writing(*arguments: str | Path, **environment: str) -> tuple[int, list[Opened]]:
    """Exit status, and what one command opened to write to, below nothing but os.open."""
    ran = subprocess.run(
        [sys.executable, "-B", "-c", WATCHER, *map(str, arguments)],
        capture_output=True, text=True, check=True, umask=0, env={**os.environ, **environment},
    )  # fmt: skip
    status, opened, others = json.loads(ran.stdout)
    assert [path for path in others if path != os.devnull and not path.isdecimal()] == []  # (a number: open already)
    found: list[Any] = [Opened(*entry) for entry in opened]
    return status, [entry for entry in found if entry.flags & WRITES]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "core").write_bytes(crashed_core(pages=numbered(0, 40)))
    return tmp_path / "core"


def check(opened: list[Opened], folder: Path) -> None:
    """What was created is new, private, and has no name or one that is not followed."""
    assert opened
    for path, flags, mode in opened:
        assert mode == 0o600, path
        if flags & os.O_DIRECTORY:  # in O_TMPFILE
            assert path == str(folder)
            continue
        assert Path(path).parent == folder
        assert flags & os.O_NOFOLLOW, path
        assert flags & (os.O_CREAT | os.O_EXCL) == os.O_CREAT | os.O_EXCL, path


@pytest.mark.parametrize("unnamed", ["", "1"])
def test_a_save_creates_each_of_its_files_so(unnamed: str, source: Path, tmp_path: Path) -> None:
    status, opened = opened_for_writing("save", "--source", source, tmp_path / "crash", WITHOUT_UNNAMED_FILES=unnamed)
    assert status == 0
    folder = the_directory(tmp_path / "crash")
    check(opened, folder)
    named = {Path(entry.path).name for entry in opened if not entry.flags & os.O_DIRECTORY}
    made = {path.name for path in folder.iterdir()}
    assert {name.removesuffix(".incomplete") for name in named if not name.startswith(".order-")} == made
    assert bool(unnamed) == any(name.startswith(".order-") for name in named)


@pytest.mark.parametrize("unnamed", ["", "1"])
def test_so_does_an_encrypted_one(unnamed: str, source: Path, key: Key, tmp_path: Path) -> None:
    status, opened = opened_for_writing(
        "save", "--recipients", key.recipients, "--source", source, tmp_path / "crash", WITHOUT_UNNAMED_FILES=unnamed
    )
    assert status == 0
    check(opened, the_directory(tmp_path / "crash"))


def test_a_file_that_is_gone_on_with_is_no_link(source: Path, tmp_path: Path) -> None:
    """Only the unfinished dump is opened though it is there."""
    command = ("save", "--source", source, tmp_path / "crash")
    late = subprocess.run([sys.executable, "-c", SLOW_CLOCK, *map(str, command), "--deadline", "1"], check=False)
    assert late.returncode == 3
    folder = the_directory(tmp_path / "crash")
    dump = folder / "vmcore.incomplete"
    assert dump.exists()
    _, opened = opened_for_writing(*command)
    (again,) = [entry for entry in opened if entry.path == str(dump)]
    assert again.flags & os.O_NOFOLLOW
    assert not again.flags & (os.O_CREAT | os.O_TRUNC)
    check([entry for entry in opened if entry != again], folder)


def test_a_flattened_dump_is_put_together_so(source: Path, tmp_path: Path) -> None:
    with (tmp_path / "flat").open("wb") as flat:
        command = [sys.executable, "-m", "capture", "dump", "-q", source, "-"]
        subprocess.run(list(map(str, command)), check=True, stdout=flat)
    status, opened = opened_for_writing("dump", tmp_path / "flat", tmp_path / "vmcore")
    assert status == 0
    check(opened, tmp_path)
    assert time.time() - (tmp_path / "vmcore").stat().st_mtime < 60


def test_what_goes_to_standard_output_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with (tmp_path / "flat").open("wb") as flat:
        command = [sys.executable, "-m", "capture", "dump", "-q", source, "-"]
        environment = {**os.environ, "TMPDIR": str(tmp_path / "scratch")}
        subprocess.run(list(map(str, command)), check=True, stdout=flat, env=environment)
    assert list((tmp_path / "scratch").iterdir()) == []
