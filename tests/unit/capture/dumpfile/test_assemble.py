"""Flattened dumps put together: ours and makedumpfile's, whole, cut short and damaged."""

from __future__ import annotations

import filecmp
import os
import random
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.dumpfile.assemble import Assembled, assemble
from capture.errors import SourceError, TargetError
from tests.builders import PAGE, crashed_core
from tests.dumps import INCOMPLETE, STATUS
from tests.faults import tmpfs, umask
from tests.outcome import Run, read_back
from tests.readers import by_hand, makedumpfile, read_by_drgn
from tests.unit.capture.dumpfile.test_flattened import laid_out, records, written
from tests.unit.capture.dumpfile.test_writer import PAGES

STREAM = written(PAGES)


def put_together(stream: bytes, folder: Path) -> Assembled:
    (folder / "flat").write_bytes(stream)
    return assemble(str(folder / "flat"), folder / "dump", replace=True, progress=False)


def test_a_whole_stream_becomes_the_dump(tmp_path: Path) -> None:
    found = put_together(STREAM, tmp_path)
    assert found == Assembled(tmp_path / "dump", len(laid_out(STREAM)), len(records(STREAM)) - 1, False, None)
    assert (tmp_path / "dump").read_bytes() == laid_out(STREAM)
    assert by_hand(tmp_path / "dump").pages == PAGES
    assert not (tmp_path / "dump.incomplete").exists()


@pytest.fixture
def theirs(corpus_file: Callable[[str], Path], tmp_path: Path) -> Path:
    """A peer's stream, with records in its own order and of its own sizes."""
    with (tmp_path / "flat").open("wb") as flat:
        makedumpfile("-c", "-F", "-d", "31", corpus_file("linux-6.1-la57"), output=flat)
    return tmp_path / "flat"


def test_what_makedumpfile_flattens_becomes_what_it_rearranges(theirs: Path, tmp_path: Path) -> None:
    with theirs.open("rb") as flat:
        makedumpfile("-R", tmp_path / "rearranged", source=flat)
    found = assemble(str(theirs), tmp_path / "ours", progress=False)
    assert found.failure is None
    assert filecmp.cmp(tmp_path / "ours", tmp_path / "rearranged", shallow=False)


def test_a_cut_stream_of_makedumpfile_gets_the_mark_that_it_lacks(theirs: Path, tmp_path: Path) -> None:
    os.truncate(theirs, theirs.stat().st_size // 2)
    found = assemble(str(theirs), tmp_path / "ours", progress=False)
    with found.path.open("rb") as dump:
        assert struct.unpack_from("<I", dump.read(PAGE), STATUS)[0] & INCOMPLETE
    pages, _ = read_back(found.path)
    assert pages


@settings(max_examples=80, deadline=None)
@given(st.integers(0, len(STREAM) - 1))
def test_a_stream_cut_anywhere_is_an_incomplete_dump_of_what_came(
    tmp_path_factory: pytest.TempPathFactory, at: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    expected = laid_out(STREAM[:at]) if at >= 4096 else b""
    if not expected.startswith(b"KDUMP   "):
        with pytest.raises(SourceError):
            put_together(STREAM[:at], folder)
        assert [path.name for path in folder.iterdir()] == ["flat"]
        return
    found = put_together(STREAM[:at], folder)
    assert found.path == folder / "dump.incomplete"
    assert found.incomplete
    assert found.failure is not None
    assert "without its last record" in found.failure
    dump = by_hand(found.path)
    assert dump.incomplete
    assert {pfn: PAGES[pfn] for pfn in dump.pages} == dump.pages


def test_a_record_beyond_what_a_file_can_have_costs_what_follows_only(tmp_path: Path) -> None:
    damaged = bytearray(STREAM)
    *_, last = (data for offset, data in records(STREAM) if offset >= 0)
    struct.pack_into(">q", damaged, len(STREAM) - 16 - len(last) - 16, 1 << 61)
    found = put_together(bytes(damaged), tmp_path)
    assert found.failure is not None
    assert "damaged before byte" in found.failure
    assert by_hand(found.path).incomplete


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(STREAM) - 1), st.integers(0, 255))
def test_a_damaged_stream_costs_a_line_never_more(tmp_path_factory: pytest.TempPathFactory, at: int, byte: int) -> None:
    """Offsets of exabytes are refused by the file system, or are holes."""
    folder = tmp_path_factory.mktemp("damaged")
    damaged = bytearray(STREAM)
    damaged[at] = byte
    try:
        assert put_together(bytes(damaged), folder).path.exists()
    except (SourceError, TargetError):
        assert not (folder / "dump.incomplete").exists()


def test_drgn_opens_what_was_put_together_of_a_cut_stream(tmp_path: Path, run: Run) -> None:
    (tmp_path / "core").write_bytes(crashed_core(pages=random.Random(2).randbytes(20 * PAGE)))
    with (tmp_path / "flat").open("wb") as flat:
        command = [sys.executable, "-m", "capture", "dump", "--no-progress", tmp_path / "core", "-"]
        subprocess.run(list(map(str, command)), stdout=flat, check=True, stderr=subprocess.DEVNULL)
    os.truncate(tmp_path / "flat", (tmp_path / "flat").stat().st_size - 20)
    ran = run("dump", tmp_path / "flat", tmp_path / "dump")
    assert ran.status == 3
    assert len(ran.err.splitlines()) == 1
    assert "dump.incomplete: put together from" in ran.err
    assert "it is readable and marked incomplete" in ran.err
    dump = by_hand(tmp_path / "dump.incomplete")
    assert dump.incomplete
    assert read_by_drgn(tmp_path / "dump.incomplete", dump.pages) == dump.pages


def test_a_dump_that_ended_early_keeps_its_mark(tmp_path: Path) -> None:
    """All of the stream is there; the dump in it is not whole."""
    last = STREAM[: -16 - 16 - PAGE]  # without the header that takes the mark off
    found = put_together(last + struct.pack(">qq", -1, -1), tmp_path)
    assert (found.failure, found.incomplete, found.path) == (None, True, tmp_path / "dump")


def test_a_pipe_is_read_to_its_end(tmp_path: Path, run: Run) -> None:
    os.mkfifo(tmp_path / "pipe")
    feeder = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(STREAM,))
    feeder.start()
    ran = run("dump", tmp_path / "pipe", tmp_path / "dump")
    feeder.join()
    assert (ran.status, ran.out) == (0, "")
    assert (tmp_path / "dump").read_bytes() == laid_out(STREAM)


def test_standard_input_is_read_to_its_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "capture", "dump", "-", str(tmp_path / "dump")]
    ran = subprocess.run(command, input=STREAM, capture_output=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, b"")
    assert (tmp_path / "dump").read_bytes() == laid_out(STREAM)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (b"", "nothing came from it"),
        (b"\x7fELF" + bytes(5000), "not a flattened dump; pipe one in, or name a file"),
        (b"age-encryption.org/v1\n", "is encrypted: decrypt it where the key is"),
        (b"makedumpfile\0\0\0\0" + bytes(5000), "a flattened dump of another kind"),
        (STREAM[:100], "a flattened dump of another kind, or cut short in its first 4096 bytes"),
        (
            STREAM[:4096] + struct.pack(">qq", 0, 8) + b"nonsense" + struct.pack(">qq", -1, -1),
            "what is in it is no dump",
        ),
        (STREAM[:4096] + struct.pack(">qq", 0, 464) + laid_out(STREAM)[:464], "the sub-header at 0x1000 is cut short"),
    ],
)
def test_what_is_no_flattened_dump_is_said_in_one_line(stream: bytes, words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "capture", "dump", "-", str(tmp_path / "dump")]
    ran = subprocess.run(command, input=stream, capture_output=True, text=False, check=False)
    assert ran.returncode == 4
    assert ran.stderr.count(b"\n") == 1
    assert words in ran.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_a_flattened_elf_core_is_put_together_as_well(tmp_path: Path) -> None:
    core = crashed_core()
    stream = STREAM[:4096] + struct.pack(">qq", 0, len(core)) + core + struct.pack(">qq", -1, -1)
    assert put_together(stream, tmp_path).failure is None
    assert (tmp_path / "dump").read_bytes() == core


def test_the_file_is_new_private_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(STREAM)
    (tmp_path / "dump.incomplete").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match="creating failed: File exists"):
        assemble(str(tmp_path / "flat"), tmp_path / "dump", progress=False)
    assert not (tmp_path / "elsewhere").exists()
    with umask(0):
        assemble(str(tmp_path / "flat"), tmp_path / "dump", replace=True, progress=False)
    assert stat.S_IMODE((tmp_path / "dump").stat().st_mode) == 0o600


def test_a_full_disk_leaves_an_incomplete_dump(tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(crashed_core(pages=random.Random(2).randbytes(200 * PAGE)))
    with (tmp_path / "flat").open("wb") as flat:
        command = [sys.executable, "-m", "capture", "dump", "--no-progress", str(tmp_path / "core"), "-"]
        subprocess.run(command, stdout=flat, check=True, stderr=subprocess.DEVNULL)
    with tmpfs(tmp_path / "full", "size=400k") as full:
        found = assemble(str(tmp_path / "flat"), full / "dump", progress=False)
        assert found.failure is not None
        assert "no room left" in found.failure
        assert by_hand(full / "dump.incomplete").incomplete


@pytest.mark.parametrize("options", [("-d", "31"), ("-c", "zlib"), ("--exclude-vmemmap",), ("--resume",)])
def test_options_of_a_filter_are_refused(options: tuple[str, ...], tmp_path: Path, run: Run) -> None:
    (tmp_path / "flat").write_bytes(STREAM)
    ran = run("dump", *options, tmp_path / "flat", tmp_path / "dump")
    assert ran.status == 2
    assert "is put together in a file, as it is" in ran.err


def test_other_commands_say_what_to_do_with_it_first(tmp_path: Path, run: Run) -> None:
    (tmp_path / "flat").write_bytes(STREAM)
    (tmp_path / "secret").write_bytes(b"age-encryption.org/v1\n-> X25519 ...".ljust(600))
    for command in ("info", "dmesg", "verify"):
        ran = run(command, tmp_path / "flat")
        assert (ran.status, "put it together first" in ran.err) == (4, True)
        ran = run(command, tmp_path / "secret")
        assert (ran.status, "decrypt it where the key is" in ran.err) == (4, True)
