"""Verify: every page read back, each kind of damage named by its PFN, and the exit status of each."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture import progress
from capture.dump import write_dump
from capture.dumpfile import kdump
from capture.dumpfile.reader import KdumpFile
from capture.memory import elfcore
from capture.memory.image import MemoryImage
from capture.memory.source import Source
from capture.selftest import elf_core
from capture.verify import MAX_NAMED, VerifyReport, verify
from capture.vmcore import open_vmcore
from tests.builders import PAGE, crashed_core, filled, numbered, patched, prstatus_note, vmcoreinfo_note
from tests.dumps import BLOCK_SIZE, INCOMPLETE, STATUS, dump_of
from tests.kernels import busy_kernel
from tests.outcome import Run, dump_options, the_directory
from tests.readers import bitmaps, by_hand

WriteFile = Callable[..., str]

FIRST = 0x100
PAGES = [filled("."), numbered(1, 1), random.Random(2).randbytes(PAGE), filled("c"), filled("."), numbered(5, 1)]
NOTES = prstatus_note(7, 1000) + vmcoreinfo_note()


def core(pages: dict[int, bytes]) -> bytes:
    """A vmcore of ``pages`` by PFN, one segment each."""
    return elf_core([NOTES], [(0, pfn * PAGE, page) for pfn, page in sorted(pages.items())])


def dump_from(source: Path, target: Path) -> Path:
    with open_vmcore(str(source)) as vmcore:
        return write_dump(vmcore, target, dump_options()).path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A vmcore of PFNs 0x100 to 0x105, and its dump."""
    (tmp_path / "vmcore.elf").write_bytes(core({FIRST + number: page for number, page in enumerate(PAGES)}))
    return tmp_path / "vmcore.elf", dump_from(tmp_path / "vmcore.elf", tmp_path / "dump")


def place(dump: Path, number: int) -> tuple[int, int, int]:
    """Where descriptor ``number`` of a dump lies, and the offset and size that it holds."""
    raw = dump.read_bytes()
    block, sub, bitmaps = struct.unpack_from("<iiI", raw, BLOCK_SIZE)
    at = (1 + sub + bitmaps) * block + 24 * number
    return (at, *struct.unpack_from("<qI", raw, at))


def change(path: Path, offset: int, layout: str, *values: int) -> None:
    path.write_bytes(patched(path.read_bytes(), offset, layout, *values))


def mark_incomplete(dump: Path) -> None:
    (status,) = struct.unpack_from("<I", dump.read_bytes(), STATUS)
    change(dump, STATUS, "I", status | INCOMPLETE)


def test_a_good_dump_is_good(pair: tuple[Path, Path], run: Run) -> None:
    source, dump = pair
    alone, against = run("verify", dump), run("verify", dump, "--against", source)
    assert (alone.status, against.status) == (0, 0)
    assert alone.out == f"{dump}: 6 pages read back well\n"
    assert against.out == f"{dump}: 6 pages equal the source\n"


def test_a_flipped_data_byte_is_named_with_and_without_the_source(pair: tuple[Path, Path], run: Run) -> None:
    source, dump = pair
    _, offset, size = place(dump, 1)
    change(dump, offset + size // 2, "B", dump.read_bytes()[offset + size // 2] ^ 1)
    for ran in (run("verify", dump), run("verify", dump, "--against", source)):
        assert ran.status == 1
        assert "1 cannot be read back" in ran.out
        assert "PFN 0x101: zstd" in ran.out
        assert ran.out.count("PFN") == 1


def test_a_descriptor_outside_the_file_is_named(pair: tuple[Path, Path], run: Run) -> None:
    _, dump = pair
    change(dump, place(dump, 3)[0], "q", 1 << 40)
    ran = run("verify", dump)
    assert ran.status == 1
    assert "1 cannot be read back" in ran.out
    assert re.search(r"PFN 0x103: .*outside the file", ran.out)


def test_a_page_that_was_not_written_is_named(pair: tuple[Path, Path], run: Run) -> None:
    source, dump = pair
    change(dump, place(dump, 5)[0], "qIIQ", 0, 0, 0, 0)
    for ran in (run("verify", dump), run("verify", dump, "--against", source)):
        assert ran.status == 1  # it does not say of itself that it is incomplete
        assert "1 were not written" in ran.out
        assert "PFN 0x105: not written" in ran.out


def test_a_dump_that_says_it_is_incomplete_has_its_own_status(pair: tuple[Path, Path], run: Run) -> None:
    source, dump = pair
    mark_incomplete(dump)
    change(dump, place(dump, 5)[0], "qIIQ", 0, 0, 0, 0)
    for ran in (run("verify", dump), run("verify", dump, "--against", source)):
        assert ran.status == 3
        assert "marked incomplete" in ran.out
        assert "PFN 0x105: not written" in ran.out


def test_an_incomplete_dump_with_a_damaged_page_is_damaged(pair: tuple[Path, Path], run: Run) -> None:
    _, dump = pair
    mark_incomplete(dump)
    change(dump, place(dump, 5)[0], "qIIQ", 0, 0, 0, 0)
    change(dump, place(dump, 3)[0], "q", 1 << 40)
    assert run("verify", dump).status == 1


def test_an_incomplete_dump_with_a_page_that_the_source_does_not_have_is_damaged(tmp_path: Path, run: Run) -> None:
    """Status 3 says that every page in it is right."""
    (tmp_path / "small.elf").write_bytes(core({1: filled("a")}))
    (tmp_path / "large.elf").write_bytes(core({1: filled("a"), 2: filled("b")}))
    dump = dump_from(tmp_path / "large.elf", tmp_path / "dump")
    mark_incomplete(dump)
    assert run("verify", dump, "--against", tmp_path / "small.elf").status == 1


def test_a_page_that_changed_is_named(pair: tuple[Path, Path], run: Run) -> None:
    source, dump = pair
    raw = bytearray(source.read_bytes())
    raw[-1] ^= 1
    source.write_bytes(raw)
    ran = run("verify", dump, "--against", source)
    assert ran.status == 1
    assert "1 differ from the source" in ran.out
    assert f"PFN 0x105: differs from {source}" in ran.out
    assert run("verify", dump).status == 0


@pytest.mark.parametrize("gone", [0x100, 0x103, 0x105], ids=["first", "middle", "last"])
def test_a_missing_page_is_named(gone: int, tmp_path: Path, run: Run) -> None:
    pages = {FIRST + number: page for number, page in enumerate(PAGES)}
    (tmp_path / "all.elf").write_bytes(core(pages))
    (tmp_path / "less.elf").write_bytes(core({pfn: page for pfn, page in pages.items() if pfn != gone}))
    dump = dump_from(tmp_path / "less.elf", tmp_path / "dump")
    ran = run("verify", dump, "--against", tmp_path / "all.elf")
    assert ran.status == 1
    assert "1 of the source are not in the dump" in ran.out
    assert f"PFN {gone:#x}: not in the dump" in ran.out
    assert ran.out.count("PFN") == 1


@pytest.mark.parametrize("extra", [0x100, 0x103, 0x105], ids=["first", "middle", "last"])
def test_an_extra_page_is_named(extra: int, tmp_path: Path, run: Run) -> None:
    pages = {FIRST + number: page for number, page in enumerate(PAGES)}
    (tmp_path / "all.elf").write_bytes(core(pages))
    (tmp_path / "less.elf").write_bytes(core({pfn: page for pfn, page in pages.items() if pfn != extra}))
    dump = dump_from(tmp_path / "all.elf", tmp_path / "dump")
    ran = run("verify", dump, "--against", tmp_path / "less.elf")
    assert ran.status == 1
    assert "1 are not in the source" in ran.out
    assert f"PFN {extra:#x}: not in {tmp_path / 'less.elf'}" in ran.out
    assert ran.out.count("PFN") == 1


def test_json_has_every_count(pair: tuple[Path, Path], run: Run) -> None:
    source, dump = pair
    change(dump, place(dump, 5)[0], "qIIQ", 0, 0, 0, 0)
    ran = run("verify", dump, "--against", source, "--json")
    found = json.loads(ran.out)
    assert {key: found[key] for key in found if key != "named"} == {
        "pages": 6, "unreadable": 0, "damaged": 0, "unwritten": 1, "different": 0, "absent": 0, "extra": 0,
        "left_out": 0, "level": 1, "incomplete": False, "compared": True, "hashed": False, "changed": 0, "good": False,
    }  # fmt: skip
    assert found["named"] == ["PFN 0x105: not written"]


def test_of_many_bad_pages_the_first_are_named_and_all_are_counted(tmp_path: Path, run: Run) -> None:
    (tmp_path / "vmcore.elf").write_bytes(core({1: b"".join(numbered(number, 1) for number in range(3000))}))
    dump = dump_from(tmp_path / "vmcore.elf", tmp_path / "dump")
    (tmp_path / "vmcore.elf").write_bytes(core({1: b"".join(numbered(number + 1, 1) for number in range(3000))}))
    ran = run("verify", dump, "--against", tmp_path / "vmcore.elf")
    assert ran.status == 1
    assert "3000 differ" in ran.out
    assert [line.split(":")[0] for line in ran.out.splitlines()[1:]] == [
        f"PFN {pfn:#x}" for pfn in range(1, MAX_NAMED + 1)
    ]


@pytest.mark.parametrize("content", [b"", b"\x7fELF".ljust(PAGE, b"\0")])
def test_what_is_no_dump_is_refused(content: bytes, vmcore_file: WriteFile, run: Run) -> None:
    ran = run("verify", vmcore_file(content))
    assert ran.status == 4
    assert ran.err.count("\n") == 1
    assert ran.out == ""


def test_a_source_that_is_no_vmcore_is_refused(pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    _, dump = pair
    (tmp_path / "text").write_text("not a vmcore\n")
    ran = run("verify", dump, "--against", tmp_path / "text")
    assert ran.status == 4
    assert ran.err.count("\n") == 1


def test_a_source_with_pages_of_another_size_is_refused_in_a_line(
    pair: tuple[Path, Path], vmcore_file: WriteFile, run: Run
) -> None:
    source, _ = pair
    block = 16384
    large = vmcore_file(dump_of({FIRST: (0, b"q" * block)}, block=block), "large")
    ran = run("verify", large, "--against", source)
    assert ran.status in (1, 4)
    assert "page size" in ran.err + ran.out
    assert "internal error" not in ran.err


def test_progress_without_a_source_goes_up_to_100_percent(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of a dump are several times its size, which is not what they are to be counted towards."""
    (tmp_path / "vmcore.elf").write_bytes(core({1: numbered(0, 5000)}))
    dump = dump_from(tmp_path / "vmcore.elf", tmp_path / "dump")
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    shares = [int(share) for share in re.findall(r"verifying: +(\d+)%", run("verify", dump).err)]
    assert len(shares) > 2
    assert shares == sorted(shares)
    assert 0 < shares[0] < 50
    assert 90 <= shares[-1] <= 100


def test_progress_is_silent_when_asked(pair: tuple[Path, Path], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dump = pair
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    assert run("verify", dump, "--against", source).err != ""
    assert run("verify", dump, "--against", source, "-q").err == ""
    assert run("verify", dump, "--against", source, "--no-progress").err == ""


pages_by_pfn = st.dictionaries(st.integers(0, 40), st.integers(0, 2), min_size=1, max_size=25)


def letters(content: dict[int, int]) -> dict[int, bytes]:
    return {pfn: filled("abc"[letter]) for pfn, letter in content.items()}


@settings(deadline=None, max_examples=60)
@given(pages_by_pfn, pages_by_pfn, st.integers(1, 7), st.integers(1, 7))
def test_any_difference_is_counted_as_sets_count_it(
    tmp_path_factory: pytest.TempPathFactory, theirs: dict[int, int], ours: dict[int, int], chunk: int, batch: int
) -> None:
    """Small chunks and batches, so that they end at different pages."""
    folder = tmp_path_factory.getbasetemp()
    (folder / "v.elf").write_bytes(core(letters(theirs)))
    (folder / "v.dump").write_bytes(dump_of({pfn: (0, page) for pfn, page in letters(ours).items()}, status=0))
    with pytest.MonkeyPatch.context() as patch, Source(str(folder / "v.elf")) as source:
        patch.setattr("capture.memory.image.CHUNK_PAGES", chunk)
        patch.setattr("capture.dumpfile.reader.BATCH_PAGES", batch)
        image = MemoryImage(source, elfcore.parse(source).loads, PAGE)
        report = verify(KdumpFile(folder / "v.dump"), image, progress=False)
    both = theirs.keys() & ours.keys()
    assert (report.pages, report.absent, report.extra, report.different, report.damaged, report.unwritten) == (
        len(ours), len(theirs.keys() - ours.keys()), len(ours.keys() - theirs.keys()),
        sum(theirs[pfn] != ours[pfn] for pfn in both), 0, 0,
    )  # fmt: skip
    assert report.good == (theirs == ours)


def test_only_a_report_without_a_fault_is_good() -> None:
    assert VerifyReport(pages=5).exit_status == 0
    for fault in ("damaged", "unwritten", "different", "absent", "extra", "changed"):
        report = VerifyReport(pages=5)
        setattr(report, fault, 1)
        assert not report.good
        assert report.exit_status == 1
    assert VerifyReport(pages=5, incomplete=True).exit_status == 3
    assert VerifyReport(pages=5, incomplete=True, unwritten=1, absent=1).exit_status == 3
    assert VerifyReport(pages=5, incomplete=True, different=1).exit_status == 1


def test_pages_that_the_level_leaves_out_are_counted_and_not_read(
    tmp_path: Path, vmcore_file: WriteFile, run: Run
) -> None:
    source, dump = vmcore_file(busy_kernel().core()), tmp_path / "filtered"
    assert run("dump", "-q", "-d", "31", source, dump).status == 0
    existing, kept = bitmaps(dump)
    ran = run("verify", dump, "--against", source)
    assert ran.status == 0
    left_out = int((existing & ~kept).sum())
    assert left_out > 2000
    assert ran.out.endswith(f"{int(kept.sum())} pages equal the source; {left_out} left out by level 31\n")


# --- bits that flip


@pytest.fixture(params=["zstd", "zlib", "none"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, run: Run) -> Path:
    """The dump of a save, with its manifest beside it."""
    pages = filled(".", "a", "b", ".") + random.Random(3).randbytes(4 * PAGE) + numbered(9, 2)
    (tmp_path / "vmcore.elf").write_bytes(crashed_core(pages=pages))
    assert (
        run("save", "-d", "1", "-c", request.param, "--source", tmp_path / "vmcore.elf", tmp_path / "crash").status == 0
    )
    return the_directory(tmp_path / "crash") / "vmcore"


def test_the_manifest_beside_it_is_held_against_the_file(saved: Path, run: Run) -> None:
    ran = run("verify", saved)
    assert (ran.status, ran.out.endswith("read back well; SHA-256 as in the manifest\n")) == (0, True)
    assert json.loads(run("verify", "--json", saved).out)["hashed"] is True
    other = saved.rename(saved.with_name("renamed"))
    assert run("verify", other).out.endswith("read back well\n")


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": 7}', '{"files": {"vmcore": {}}, "hash_block": 5}'])
def test_a_manifest_that_says_nothing_is_passed_over(manifest: str, saved: Path, run: Run) -> None:
    (saved.parent / "manifest.json").write_text(manifest)
    assert run("verify", saved).out.endswith("read back well\n")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_passes(data: st.DataObject, saved: Path, run: Run) -> None:
    whole = saved.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    bit = data.draw(st.integers(0, 7))
    saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        ran = run("verify", saved)
        assert ran.status in (1, 3, 4), f"bit {bit} of byte {at:#x}"
        assert ran.out.count("\n") + ran.err.count("\n") >= 1
    finally:
        saved.write_bytes(whole)


def test_a_longer_or_shorter_file_is_not_the_one_of_the_manifest(saved: Path, run: Run) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole + b"x")
    assert run("verify", saved).status == 1
    saved.write_bytes(whole[:-1])
    assert run("verify", saved).status == 1


def test_without_a_manifest_every_page_still_has_its_checksum(saved: Path, run: Run) -> None:
    (saved.parent / "manifest.json").unlink()
    dump, raw = by_hand(saved), saved.read_bytes()
    assert kdump.RAW in {flags for _, _, flags, _ in dump.descriptors.values()}  # noise does not shrink
    for pfn, (offset, size, _, _) in dump.descriptors.items():
        for at in (offset, offset + size // 2, offset + size - 1):
            saved.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
            ran = run("verify", saved)
            assert ran.status == 1, (hex(pfn), at)
            assert f"PFN {pfn:#x}: " in ran.out
