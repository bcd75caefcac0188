"""PT_NOTE segments → notes and the merged blob."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import footprint
from capture.memory import elfcore
from capture.memory.source import Source
from capture.notes.elfnote import MAX_NOTES, Notes, read_notes
from capture.selftest import elf_core, note
from tests import builders
from tests.builders import PAGE, filled, patched, program_header, prstatus_note, raw_notes, vmcoreinfo_note
from tests.readers import mapped, note_segment

WriteFile = Callable[[bytes], str]


def notes_of(name: str) -> Notes:
    with Source(name) as source:
        return read_notes(source, elfcore.parse(source).notes)


def core(segments: Sequence[bytes]) -> bytes:
    return elf_core(segments, [(0, 0x1000, filled("m"))])


CPUS = [prstatus_note(pid, pid * 1000) for pid in range(4)]
INFO = vmcoreinfo_note()


def test_raw_and_merged_headers_give_the_same_notes_byte_for_byte(vmcore_file: WriteFile) -> None:
    raw = notes_of(vmcore_file(core(raw_notes([*CPUS, INFO]))))
    merged = notes_of(vmcore_file(core([b"".join([*CPUS, INFO])])))
    assert raw.blob == merged.blob == b"".join([*CPUS, INFO])
    assert [(found.name, found.type, found.descriptor) for found in raw.notes] == [
        (found.name, found.type, found.descriptor) for found in merged.notes
    ]
    assert [found.segment for found in raw.notes] == [0, 1, 2, 3, 4]
    assert raw.problems == merged.problems == ()


def test_cpus_that_were_never_stopped_left_an_empty_segment(vmcore_file: WriteFile) -> None:
    found = notes_of(vmcore_file(core(raw_notes([CPUS[0], b"", CPUS[2], b"", INFO]))))
    assert [struct.unpack_from("<i", cpu.descriptor, 32)[0] for cpu in found.prstatus()] == [0, 2]
    assert found.blob == CPUS[0] + CPUS[2] + INFO


def test_unknown_notes_are_kept_byte_for_byte(vmcore_file: WriteFile) -> None:
    strange = [note(b"LINUX", 0x700, b"device dump"), note(b"", 9, b"x"), note(b"A" * 300, 0xFFFF_FFFF, bytes(777))]
    blob = b"".join([CPUS[0], *strange, INFO])
    found = notes_of(vmcore_file(core([blob])))
    assert found.blob == blob
    assert [(entry.name, entry.descriptor) for entry in found.notes[1:4]] == [
        (b"LINUX", b"device dump"), (b"", b"x"), (b"A" * 300, bytes(777)),
    ]  # fmt: skip


def test_what_drivers_dumped_of_their_devices_costs_neither_memory_nor_what_comes_behind_it(
    vmcore_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cards' 32 MiB (drivers/net/ethernet/chelsio), before the notes of CPUs, in a capture kernel of 90 MiB."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {90 << 10} kB\n")
    monkeypatch.setattr(footprint, "MEMINFO", meminfo)
    devices = [note(b"LINUX", 0x700, letter * (32 << 20)) for letter in (b"a", b"b")]
    small = note(b"LINUX", 0x700, b"c" * (2 << 20))
    name = vmcore_file(core([b"".join([devices[0], small, CPUS[0], devices[1], CPUS[1], INFO])]))
    tracemalloc.start()
    found = notes_of(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.blob == b"".join([small, CPUS[0], CPUS[1], INFO])
    assert [entry.type for entry in found.notes] == [0x700, 1, 1, 0]
    for entry in found.notes:
        assert found.blob[entry.offset : entry.offset + len(entry.descriptor)] == entry.descriptor
    assert [problem.split(",")[0] for problem in found.problems] == [
        "PT_NOTE 0: the note at +0x0 is left out: 32 MiB",
        f"PT_NOTE 0: the note at +{len(devices[0] + small + CPUS[0]):#x} is left out: 32 MiB",
    ]
    assert peak < 12 << 20

    meminfo.write_text(f"MemTotal: {8 << 20} kB\n")
    found = notes_of(name)
    assert found.blob == b"".join([devices[0], small, *CPUS[:2], INFO])
    assert len(found.problems) == 1


def test_each_descriptor_lies_where_its_offset_says(vmcore_file: WriteFile) -> None:
    odd = [note(b"x" * size, size, bytes([size]) * size) for size in range(1, 9)]
    found = notes_of(vmcore_file(core([b"".join(odd[:4]), b"".join(odd[4:]).ljust(2048, b"\0"), INFO])))
    assert len(found.notes) == 9
    for entry in found.notes:
        assert found.blob[entry.offset : entry.offset + len(entry.descriptor)] == entry.descriptor


def test_a_blob_of_a_real_vmcore_is_its_note_segment(corpus_vmcore: Path) -> None:
    segment = note_segment(mapped(corpus_vmcore))
    found = notes_of(str(corpus_vmcore))
    assert segment.startswith(found.blob)
    assert not any(segment[len(found.blob) :])
    info = found.vmcoreinfo()
    assert info is not None
    assert info.descriptor.startswith(b"OSRELEASE=6.1")
    assert found.problems == ()


@pytest.mark.parametrize(
    ("name_size", "descriptor_size"),
    [(0xFFFF_FFFF, 0), (5, 0xFFFF_FFFF), (5, 0xFFFF_FFFC), (5, 4000), (0x7FFF_FFFF, 0x7FFF_FFFF), (4000, 1)],
)
def test_a_note_of_absurd_size_ends_its_segment_only(
    name_size: int, descriptor_size: int, vmcore_file: WriteFile
) -> None:
    absurd = struct.pack("<III", name_size, descriptor_size, 1) + b"CORE\0\0\0\0" + bytes(100)
    found = notes_of(vmcore_file(core([CPUS[0] + absurd, CPUS[1], INFO])))
    assert found.blob == CPUS[0] + CPUS[1] + INFO
    assert len(found.problems) == 1
    assert "\n" not in found.problems[0]


def test_a_segment_that_lies_beyond_the_file_is_a_problem_and_the_others_are_read(vmcore_file: WriteFile) -> None:
    for offset in (1 << 40, (1 << 63) - 1, builders.U64):
        found = notes_of(vmcore_file(patched(core([CPUS[0], INFO]), program_header(0, 8), "Q", offset)))
        assert found.blob == INFO
        assert found.problems


def test_endless_notes_are_cut_off_in_bounded_memory(vmcore_file: WriteFile) -> None:
    endless = note(b"E", 1, b"") * 200_000
    name = vmcore_file(core([endless, INFO]))
    tracemalloc.start()
    found = notes_of(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.notes) == MAX_NOTES
    assert found.problems
    assert peak < 128 << 20


def test_a_segment_of_all_memory_does_not_take_all_memory(vmcore_file: WriteFile) -> None:
    data = core([CPUS[0], INFO])
    name = vmcore_file(patched(data, program_header(0, builders.P_FILESZ), "Q", 1 << 62))
    tracemalloc.start()
    found = notes_of(name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.problems
    assert found.notes[0].name == b"CORE"
    assert peak < 256 << 20


def test_a_hundred_thousand_damaged_segments_are_not_a_hundred_thousand_lines(vmcore_file: WriteFile) -> None:
    """Problems are printed on a console that may do 115200 baud: 100,000 lines are most of an hour."""
    count = 60_000
    bad = struct.pack("<III", 5, 1 << 30, 1)
    found = notes_of(vmcore_file(core([bad] * count)))
    assert 0 < len(found.problems) <= 1000


def test_many_segments_over_the_same_large_padding_are_read_in_bounded_time(vmcore_file: WriteFile) -> None:
    """2000 PT_NOTEs that each name the same 32 MiB of zeros: 64 GB of reading for a file of 32 MiB."""
    import time

    count = 2000
    data = core([b""] * count)
    name = vmcore_file(data)
    with Path(name).open("r+b") as file:
        file.truncate(len(data) + (32 << 20))
        for number in range(count):
            file.seek(program_header(number, builders.P_OFFSET))
            file.write(struct.pack("<Q", len(data)))
            file.seek(program_header(number, builders.P_FILESZ))
            file.write(struct.pack("<Q", 32 << 20))
    started = time.monotonic()
    found = notes_of(name)
    assert not found.notes
    assert time.monotonic() - started < 2


@settings(deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=5))
def test_any_bytes_can_be_notes(tmp_path_factory: pytest.TempPathFactory, segments: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any-notes.elf"
    path.write_bytes(core(segments))
    found = notes_of(str(path))
    for entry in found.notes:
        assert found.blob[entry.offset : entry.offset + len(entry.descriptor)] == entry.descriptor
    assert len(found.blob) <= sum(len(segment) + 3 for segment in segments)
    assert len(found.blob) % 4 == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=20).map(lambda b: b.replace(b"\0", b"?")), st.integers(0, 2**32 - 1),
                          st.binary(max_size=60)), min_size=1, max_size=6))  # fmt: skip
def test_what_was_put_in_comes_out(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[tuple[bytes, int, bytes]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "put-in.elf"
    path.write_bytes(core([b"".join(note(*entry) for entry in wanted).ljust(PAGE, b"\0")]))
    assert [(entry.name, entry.type, entry.descriptor) for entry in notes_of(str(path)).notes] == wanted
