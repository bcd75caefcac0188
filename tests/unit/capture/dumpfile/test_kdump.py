"""The kdump-compressed structures against hand-written offsets, and dumps of makedumpfile read with them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.dumpfile import kdump
from capture.dumpfile.reader import KdumpFile
from tests.readers import ElfPages, makedumpfile, mapped

# --- structures

# Written down from diskdump_mod.h as an x86_64 or aarch64 compiler lays it out: name, offset, bytes.
DISK_DUMP_HEADER = [
    ("signature", 0, 8), ("header_version", 8, 4), ("utsname", 12, 390), ("tv_sec", 408, 8), ("tv_usec", 416, 8),
    ("status", 424, 4), ("block_size", 428, 4), ("sub_hdr_size", 432, 4), ("bitmap_blocks", 436, 4),
    ("max_mapnr", 440, 4), ("total_ram_blocks", 444, 4), ("device_blocks", 448, 4), ("written_blocks", 452, 4),
    ("current_cpu", 456, 4), ("nr_cpus", 460, 4),
]  # fmt: skip
KDUMP_SUB_HEADER = [
    ("phys_base", 0, 8), ("dump_level", 8, 4), ("split", 12, 4), ("start_pfn", 16, 8), ("end_pfn", 24, 8),
    ("offset_vmcoreinfo", 32, 8), ("size_vmcoreinfo", 40, 8), ("offset_note", 48, 8), ("size_note", 56, 8),
    ("offset_eraseinfo", 64, 8), ("size_eraseinfo", 72, 8), ("start_pfn_64", 80, 8), ("end_pfn_64", 88, 8),
    ("max_mapnr_64", 96, 8),
]  # fmt: skip
PAGE_DESC = [("offset", 0, 8), ("size", 8, 4), ("flags", 12, 4), ("page_flags", 16, 8)]

STRUCTURES = [
    pytest.param(kdump.DISK_DUMP_HEADER, 464, DISK_DUMP_HEADER, id="disk_dump_header"),
    pytest.param(kdump.KDUMP_SUB_HEADER, 104, KDUMP_SUB_HEADER, id="kdump_sub_header"),
    pytest.param(kdump.PAGE_DESCRIPTOR, 24, PAGE_DESC, id="page_desc"),
]


@pytest.mark.parametrize(("declared", "size", "members"), STRUCTURES)
def test_members_lie_where_c_puts_them(
    declared: np.dtype[np.void], size: int, members: list[tuple[str, int, int]]
) -> None:
    assert declared.fields is not None
    assert {name: (at, kind.itemsize) for name, (kind, at, *_) in declared.fields.items()} == {
        name: (at, length) for name, at, length in members
    }
    assert declared.itemsize == size


@pytest.mark.parametrize(("declared", "size", "members"), STRUCTURES)
def test_numbers_are_little_endian(declared: np.dtype[np.void], size: int, members: list[tuple[str, int, int]]) -> None:
    for name, offset, length in members:
        if name in ("signature", "utsname"):
            continue
        raw = bytearray(size)
        raw[offset] = 0x5A
        assert int(np.frombuffer(bytes(raw), declared)[0][name]) == 0x5A, f"{name} of {length} bytes"


def test_the_hand_written_offsets_are_those_of_the_c_declarations() -> None:
    """struct new_utsname is 6 fields of 65 bytes, struct timeval two longs; ctypes lays out as the compiler does."""

    class DiskDumpHeader(ctypes.Structure):
        _fields_ = (
            ("signature", ctypes.c_char * 8), ("header_version", ctypes.c_int), ("utsname", ctypes.c_char * 65 * 6),
            ("tv_sec", ctypes.c_int64), ("tv_usec", ctypes.c_int64), ("status", ctypes.c_uint),
            ("block_size", ctypes.c_int), ("sub_hdr_size", ctypes.c_int), ("bitmap_blocks", ctypes.c_uint),
            ("max_mapnr", ctypes.c_uint), ("total_ram_blocks", ctypes.c_uint), ("device_blocks", ctypes.c_uint),
            ("written_blocks", ctypes.c_uint), ("current_cpu", ctypes.c_uint), ("nr_cpus", ctypes.c_int),
        )  # fmt: skip

    assert ctypes.sizeof(DiskDumpHeader) == 464
    for name, offset, size in DISK_DUMP_HEADER:
        member = getattr(DiskDumpHeader, name)
        assert (member.offset, member.size) == (offset, size)


# --- layout

sizes = st.sampled_from([4096, 16384, 65536])


@given(sizes, st.integers(0, 10 << 20), st.integers(1, 1 << 40), st.integers(0, 1 << 40))
def test_parts_follow_each_other_in_whole_blocks(block: int, notes: int, max_mapnr: int, descriptors: int) -> None:
    layout = kdump.Layout(block, notes, max_mapnr, descriptors)
    assert layout.sub_header == block
    assert layout.notes == block + 104
    # As few blocks as hold the sub-header with the notes.
    assert (layout.sub_header_blocks - 1) * block < 104 + notes <= layout.sub_header_blocks * block
    assert layout.bitmap1 == block + layout.sub_header_blocks * block
    # As few blocks as have a bit for each PFN.
    assert layout.bitmap_bytes % block == 0
    assert (layout.bitmap_bytes - block) * 8 < max_mapnr <= layout.bitmap_bytes * 8
    assert layout.bitmap2 - layout.bitmap1 == layout.bitmap_bytes == layout.descriptor_table - layout.bitmap2
    assert layout.data - layout.descriptor_table == 24 * descriptors


def test_the_layout_of_a_real_dump_is_that_of_makedumpfile() -> None:
    """makedumpfile 1.7.2 on Debian's 6.1 kernel, 512 MiB, 4 CPUs: notes of 4736 bytes, sub_hdr_size 2, bitmap_blocks 8,
    VMCOREINFO at 5648."""
    layout = kdump.Layout(4096, 4736, 131037, 81787)
    assert layout.sub_header_blocks == 2
    assert 2 * layout.bitmap_bytes == 8 * 4096
    assert layout.notes == 4200
    assert layout.descriptor_table == (1 + 2 + 8) * 4096


# --- dumps of makedumpfile


@pytest.fixture(scope="module", params=[0, 1], ids=["-d 0", "-d 1"])
def foreign(
    request: pytest.FixtureRequest, corpus_file: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Path, int]]:
    """A vmcore, makedumpfile's dump of it, and its dump level."""
    vmcore = corpus_file("linux-6.1-la57")
    target = tmp_path_factory.mktemp("makedumpfile") / "dump"
    makedumpfile("-c", "-d", str(request.param), vmcore, target)
    yield vmcore, target, request.param
    target.unlink()


def test_every_page_of_a_dump_by_makedumpfile_equals_the_source(foreign: tuple[Path, Path, int]) -> None:
    vmcore, target, level = foreign
    source, dump = ElfPages(mapped(vmcore)), KdumpFile(target)
    assert not dump.incomplete
    assert dump.level == level
    pfns: list[int] = []
    for batch in dump.pages():
        assert not batch.bad
        assert all(source.page(int(pfn)) == data.tobytes() for pfn, data in zip(batch.pfns, batch.data, strict=True))
        pfns += batch.pfns.tolist()
    dump.close()
    # makedumpfile leaves out a last page that is not whole: the 640 KiB end within PFN 0x9f.
    assert pfns == source.whole_pfns()
