"""A dump as SOURCE: filtered and compressed again, asked for its log, verified against; ours and makedumpfile's."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.dumpfile import foreign
from capture.dumpfile.source import KdumpSource
from capture.errors import SourceError
from capture.vmcore import open_vmcore
from tests.builders import PAGE, as_file
from tests.dumps import INCOMPLETE, STATUS, dump_of
from tests.kernels import busy_kernel
from tests.outcome import Run
from tests.readers import bitmaps, by_hand, makedumpfile

WriteFile = Callable[..., str]

LZO, SNAPPY = 0x2, 0x4
"""DUMP_DH_COMPRESSED_LZO, DUMP_DH_COMPRESSED_SNAPPY."""


@pytest.fixture
def kernel(vmcore_file: WriteFile) -> str:
    return vmcore_file(busy_kernel().core())


@pytest.mark.parametrize("compression", ["zstd", "zlib", "none"])
def test_a_dump_filtered_again_is_the_one_that_was_filtered_at_once(
    compression: str, kernel: str, tmp_path: Path, run: Run
) -> None:
    """Byte for byte: bitmaps, notes, pages."""
    whole, again, once = (tmp_path / name for name in ("whole", "again", "once"))
    assert run("dump", "-q", "-d", "1", "-c", compression, kernel, whole).status == 0
    assert run("dump", "-q", "-d", "31", whole, again).status == 0
    assert run("dump", "-q", "-d", "31", kernel, once).status == 0
    # Other page tables are walked where there is no ELF header to map memory: what is saved first may differ.
    ours, expected = by_hand(again), by_hand(once)
    assert ours.pages == expected.pages
    assert (ours.status, ours.level, ours.data_start) == (expected.status, expected.level, expected.data_start)
    assert all((one == other).all() for one, other in zip(bitmaps(again), bitmaps(once), strict=True))


def test_what_a_first_dump_left_out_stays_out_and_the_level_says_so(kernel: str, tmp_path: Path, run: Run) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("dump", "-q", "-d", "27", kernel, first).status == 0
    ran = run("dump", "-d", "0", "-c", "zlib", first, second)
    assert ran.status == 0
    assert f"{first} is a dump of level 27: what it left out stays out" in ran.err
    assert by_hand(second).pages == by_hand(first).pages
    assert by_hand(second).level == 26
    existing, _ = bitmaps(first)
    assert bitmaps(second)[0].tolist() == existing.tolist()


def test_log_registers_and_info_of_a_dump_are_those_of_its_vmcore(
    corpus_vmcore: Path, tmp_path: Path, run: Run
) -> None:
    """The direct map is in the page tables: a dump has no ELF header to tell of it."""
    core, dump = corpus_vmcore, tmp_path / "dump"
    assert run("dump", "-q", core, dump).status == 0
    for command in ("dmesg", "registers"):
        assert run(command, dump) == run(command, core)
    found, expected = run("info", dump).out.splitlines(), run("info", core).out.splitlines()
    assert found[:5] == expected[:5]


def test_a_dump_is_compared_with_a_dump(kernel: str, tmp_path: Path, run: Run) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    run("dump", "-q", "-d", "0", "-c", "none", kernel, one)
    run("dump", "-q", "-d", "31", one, other)
    assert run("verify", "-q", other, "--against", one).status == 0


def test_a_dump_may_replace_itself(kernel: str, tmp_path: Path, run: Run) -> None:
    dump = tmp_path / "dump"
    assert run("dump", "-q", "-d", "1", kernel, dump).status == 0
    before = by_hand(dump).pages
    assert run("dump", "-q", "--force", "-d", "31", dump, dump).status == 0
    after = by_hand(dump)
    assert after.level == 31
    assert after.pages == {pfn: before[pfn] for pfn in after.pages}


def test_a_save_of_a_dump_has_its_files(corpus_file: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    dump = tmp_path / "dump"
    run("dump", "-q", "-d", "31", corpus_file("linux-6.12"), dump)
    assert run("save", "-q", "--source", dump, tmp_path / "saved").status == 0
    (saved,) = (tmp_path / "saved").iterdir()
    assert by_hand(saved / "vmcore").pages == by_hand(dump).pages


def test_an_incomplete_dump_gives_what_it_has(tmp_path: Path, kernel: str, run: Run) -> None:
    """A page without data is zeros, counted, and named."""
    dump, again = tmp_path / "dump", tmp_path / "again"
    run("dump", "-q", "-d", "0", "-c", "none", kernel, dump)
    data = bytearray(dump.read_bytes())
    (status,) = struct.unpack_from("<I", data, STATUS)
    struct.pack_into("<I", data, STATUS, status | INCOMPLETE)
    first = by_hand(dump).data_start - 24 * len(by_hand(dump).descriptors)
    data[first + 24 * 100 : first + 24 * 110] = bytes(240)
    dump.write_bytes(data)
    ran = run("dump", "-d", "0", dump, again)
    assert ran.status == 3
    assert "is marked incomplete" in ran.err
    assert "10 pages unreadable, zeros in the dump (PFN 0x64-0x6d)" in ran.err
    assert by_hand(again).pages[0x63] == by_hand(dump).pages[0x63]


@pytest.mark.parametrize(("flag", "package"), [(LZO, "liblzo2-2"), (SNAPPY, "libsnappy1v5")])
def test_without_the_library_a_line_says_what_to_install(
    flag: int, package: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "_library", lambda _flag: None)
    (tmp_path / "dump").write_bytes(dump_of({1: (flag, b"x" * 100)}, status=flag))
    ran = run("dmesg", tmp_path / "dump")
    assert ran.status == 4
    assert ran.err.count("\n") == 1
    assert package in ran.err


@pytest.mark.parametrize("flag", [LZO, SNAPPY])
@given(content=st.binary(max_size=5000))
@settings(max_examples=200, deadline=None)
def test_damaged_pages_of_others_are_an_answer(flag: int, content: bytes) -> None:
    if foreign.missing_library(flag):
        pytest.skip(foreign.missing_library(flag) or "")
    found = foreign.decompress(flag, content, PAGE)
    assert isinstance(found, str) or len(found) == PAGE


def test_what_is_wrong_with_a_dump_is_one_line(kernel: str, tmp_path: Path, run: Run) -> None:
    dump = tmp_path / "dump"
    run("dump", "-q", "-d", "31", kernel, dump)
    good = dump.read_bytes()
    sub = PAGE + 12  # kdump_sub_header.split
    for change, said in (
        (b"KDUMP   " + bytes(500), "header version 0"),
        (good[:464], "truncated"),
        (good[:PAGE], "truncated"),
        (good[: 2 * PAGE], "truncated"),
        (good[:12] + bytes(390) + good[402:], "machine unknown"),
        (good[:sub] + struct.pack("<i", 1) + good[sub + 4 :], "split"),
        (good[: PAGE + 56] + struct.pack("<Q", 1 << 60) + good[PAGE + 64 :], "notes of"),
    ):
        dump.write_bytes(change)
        ran = run("info", dump)
        assert (ran.status, ran.err.count("\n"), ran.out) == (4, 1, ""), said
        assert said in ran.err


def test_a_machine_that_nobody_knows_is_named_without_its_control_characters(
    kernel: str, tmp_path: Path, run: Run
) -> None:
    dump = tmp_path / "dump"
    run("dump", "-q", "-d", "31", kernel, dump)
    data = dump.read_bytes()
    dump.write_bytes(data[: 12 + 260] + b"x86\x1b[2J\n" + data[12 + 268 :])
    with pytest.raises(SourceError) as error, open_vmcore(str(dump)):
        pass
    assert str(error.value) == f"{dump}: machine x86\\x1b[2J\\n: only x86_64 and aarch64 are read"


GOOD: list[bytes] = []


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 20))
def test_a_damaged_dump_never_raises_anything_else(seed: int, hits: int) -> None:
    if not GOOD:
        with as_file(busy_kernel().core()) as core, as_file(b"") as target:
            from capture.cli import main

            assert main(["dump", "-q", "--force", "-d", "31", core, target]) == 0
            GOOD.append(Path(target).read_bytes())
    generator = random.Random(seed)
    data = bytearray(GOOD[0])
    for _ in range(hits):
        data[generator.randrange(generator.choice([600, 4 * PAGE, len(data)]))] = generator.randrange(256)
    with as_file(bytes(data)) as name, contextlib.suppress(SourceError), open_vmcore(name) as vmcore:
        for chunk in vmcore.image.chunks():
            vmcore.image.fetch(chunk)


def test_only_pages_of_the_dump_are_read(tmp_path: Path) -> None:
    pages = {3: bytes([3]) * PAGE, 4: bytes([4]) * PAGE, 200: bytes([200]) * PAGE}
    (tmp_path / "dump").write_bytes(dump_of({pfn: (0, page) for pfn, page in pages.items()}))
    with KdumpSource(str(tmp_path / "dump")) as source:
        assert source.read(3 * PAGE, 2 * PAGE) == pages[3] + pages[4]
        assert source.read(200 * PAGE + 5, 7) == pages[200][:7]
        for offset, length in ((2 * PAGE, 1), (4 * PAGE, PAGE + 1), (300 * PAGE, 1), (1 << 50, 1)):
            with pytest.raises(OSError, match="PFN"):
                source.read(offset, length)


# --- real ones


@pytest.mark.parametrize("options", [("-c",), ("-l",), ()], ids=["zlib", "LZO", "raw"])
def test_a_dump_of_makedumpfile_is_filtered_again(
    options: tuple[str, ...], corpus_file: Callable[[str], Path], tmp_path: Path, run: Run
) -> None:
    vmcore, theirs = corpus_file("linux-6.1-la57"), tmp_path / "theirs"
    makedumpfile(*options, "-d", "1", vmcore, theirs)
    again, once = tmp_path / "again", tmp_path / "once"
    assert run("dump", "-q", "-d", "31", theirs, again).status == 0
    assert run("dump", "-q", "-d", "31", vmcore, once).status == 0
    ours, expected = bitmaps(again)[1], bitmaps(once)[1]
    assert (ours ^ expected).nonzero()[0].tolist() == [0x9F]  # the page that makedumpfile leaves out
    assert run("verify", "-q", again, "--against", theirs).status == 0
    assert run("dmesg", theirs).out == run("dmesg", vmcore).out


def test_a_dump_of_a_real_kernel_filtered_again_is_the_one_made_at_once(
    corpus_vmcore: Path, tmp_path: Path, run: Run
) -> None:
    whole, again, once = (tmp_path / name for name in ("whole", "again", "once"))
    for level, source, target in (("1", corpus_vmcore, whole), ("31", whole, again), ("31", corpus_vmcore, once)):
        assert run("dump", "-q", "-d", level, source, target).status == 0
    # Other page tables are walked where there is no ELF header to map memory: what is saved first may differ.
    ours, expected = by_hand(again), by_hand(once)
    assert ours.pages == expected.pages
    assert (ours.status, ours.level, ours.data_start) == (expected.status, expected.level, expected.data_start)
    assert all((one == other).all() for one, other in zip(bitmaps(again), bitmaps(once), strict=True))
