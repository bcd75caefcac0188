"""Stripping: what runs is all there, at its place; what does not run is gone."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zstandard
from elftools.elf.elffile import ELFFile
from hypothesis import example, given
from hypothesis import strategies as st

from initramfs.strip import strip

OBJECTS = sorted(
    {
        Path(sys.executable).resolve(),
        *Path(zstandard.__file__).parent.glob("*.so"),
        *Path(np.__file__).parent.parent.glob("numpy.libs/*.so*"),  # patchelf was here
        *Path(np.__file__).parent.glob("_core/_multiarray_umath*.so"),
    }
)


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_every_segment_stays_byte_for_byte_where_it_was(path: Path) -> None:
    before = path.read_bytes()
    after = strip(before)
    assert len(after) <= len(before)
    old, new = ELFFile(io.BytesIO(before)), ELFFile(io.BytesIO(after))
    assert new.num_sections() == 0
    assert old.num_segments() == new.num_segments()
    for mine, theirs in zip(new.iter_segments(), old.iter_segments(), strict=True):
        assert mine.header == theirs.header
        start, end = theirs["p_offset"], theirs["p_offset"] + theirs["p_filesz"]
        header = 64 if start == 0 else start  # the ELF header names no sections any more
        assert after[header:end] == before[header:end]
    assert strip(after) == after


def test_a_stripped_program_runs(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_bytes(strip(Path("/bin/echo").read_bytes()))
    program.chmod(0o755)
    assert subprocess.run([program, "runs"], capture_output=True, check=True, text=True).stdout == "runs\n"


def test_symbols_and_debug_data_are_gone() -> None:
    """Behind the last segment: they would be most of an interpreter that was built with ``-g``."""
    content = Path("/bin/echo").read_bytes()
    assert b".shstrtab" in content
    assert b".shstrtab" not in strip(content)


@pytest.mark.parametrize(
    "content",
    [b"", b"#!/bin/sh\n", b"\x7fELF", b"\x7fELF" + bytes(60), b"\x7fELF\x01\x01\x01".ljust(64, b"\0")],
)
def test_what_is_no_program_comes_back_as_it_is(content: bytes) -> None:
    assert strip(content) == content


@given(st.binary(max_size=400), st.integers(0, 2**64 - 1), st.integers(0, 0xFFFF))
@example(b"", 64, 1)
def test_a_damaged_program_never_raises(rest: bytes, table: int, entries: int) -> None:
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, table, 0, 0, 64, 56, entries, 0, 0, 0
    )
    assert len(strip(header + rest)) <= len(header + rest)
