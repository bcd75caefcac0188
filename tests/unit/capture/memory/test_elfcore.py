"""ELF core header → segments; what is refused, and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capture.errors import SourceError
from capture.memory import elfcore
from capture.memory.source import Source
from capture.selftest import elf_core, note
from capture.vmcore import open_vmcore
from tests import builders
from tests.builders import PAGE, PT_LOAD, PT_NOTE, filled, patched, program_header, simple_core
from tests.readers import mapped, program_headers

WriteFile = Callable[[bytes], str]


def parse(name: str) -> elfcore.ElfCore:
    with Source(name) as source:
        return elfcore.parse(source)


def refusal(name: str) -> str:
    with pytest.raises(SourceError) as refused:
        parse(name)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_status == 4
    return str(refused.value)


def test_segments_are_what_struct_finds_in_a_real_vmcore(corpus_vmcore: Path) -> None:
    table = program_headers(mapped(corpus_vmcore))
    core = parse(str(corpus_vmcore))
    assert [tuple(load) for load in core.loads.tolist()] == [row for row in table if row.type == PT_LOAD and row.filesz]
    assert [tuple(row) for row in core.notes.tolist()] == [row for row in table if row.type == PT_NOTE]
    assert core.machine == "x86_64"
    assert core.missing_bytes == 0


def test_aarch64_is_read_too(vmcore_file: WriteFile) -> None:
    assert parse(vmcore_file(elf_core([], [(0, 0x4000_0000, filled("a"))], machine=183))).machine == "aarch64"


def test_segments_without_bytes_are_left_out_and_order_is_kept(vmcore_file: WriteFile) -> None:
    core = parse(vmcore_file(elf_core([], [(0, 0x9000, filled("b")), (0, 0x5000, b""), (0, 0x1000, filled("a"))])))
    assert core.loads["p_paddr"].tolist() == [0x9000, 0x1000]


def test_seventy_thousand_segments_are_counted_in_section_0(vmcore_file: WriteFile) -> None:
    core = parse(vmcore_file(builders.pn_xnum_core(70_000)))
    assert len(core.loads) == 70_000
    assert core.loads["p_paddr"][-1] == 69_999 * 2 * PAGE


def test_pn_xnum_without_section_0_is_refused(vmcore_file: WriteFile) -> None:
    assert "section 0" in refusal(vmcore_file(builders.pn_xnum_core(8, with_section=False)))


def test_a_count_in_section_0_that_no_kernel_writes_is_refused(vmcore_file: WriteFile) -> None:
    sh_info = 64 + 44
    assert "limit" in refusal(vmcore_file(patched(builders.pn_xnum_core(8), sh_info, "I", 0xFFFF_FFFF)))


def test_a_truncated_vmcore_gives_what_is_there_and_says_how_much_is_missing(vmcore_file: WriteFile) -> None:
    whole = elf_core([], [(0, 0x1000, filled("a", "b")), (0, 0x9000, filled("c"))])
    core = parse(vmcore_file(whole[: -PAGE - 100]))
    assert core.loads["p_filesz"].tolist() == [2 * PAGE - 100]
    assert core.missing_bytes == PAGE + 100


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"\x7fEL", "truncated", id="3 bytes"),
        pytest.param(b"MZ" + bytes(100), "not an ELF file", id="another format"),
        pytest.param(b"makedumpfile" + bytes(4096), "flattened", id="flattened"),
        pytest.param(patched(simple_core("a"), builders.E_CLASS, "B", 1), "64-bit", id="ELF32"),
        pytest.param(patched(simple_core("a"), builders.E_CLASS, "B", 0xEE), "class 238", id="no such class"),
        pytest.param(patched(simple_core("a"), builders.E_DATA, "B", 2), "little-endian", id="big endian"),
        pytest.param(patched(simple_core("a"), builders.E_TYPE, "H", 2), "not a core", id="an executable"),
        pytest.param(patched(simple_core("a"), builders.E_TYPE, "H", 0xBEEF), "not a core", id="no such type"),
        pytest.param(patched(simple_core("a"), builders.E_MACHINE, "H", 22), "x86_64", id="s390"),
        pytest.param(patched(simple_core("a"), builders.E_MACHINE, "H", 0xBEEF), "x86_64", id="no such machine"),
        pytest.param(patched(simple_core("a"), builders.E_PHENTSIZE, "H", 0), "0 bytes", id="e_phentsize 0"),
        pytest.param(patched(simple_core("a"), builders.E_PHENTSIZE, "H", 64), "64 bytes", id="e_phentsize 64"),
        pytest.param(patched(simple_core("a"), builders.E_PHNUM, "H", 0), "no program headers", id="no segments"),
        pytest.param(patched(simple_core("a"), builders.E_PHNUM, "H", 0xFFFE), "truncated", id="e_phnum absurd"),
        pytest.param(patched(simple_core("a"), builders.E_PHOFF, "Q", 1 << 40), "truncated", id="e_phoff beyond"),
        pytest.param(patched(simple_core("a"), builders.E_PHOFF, "Q", builders.U64), "range", id="e_phoff 2^64-1"),
        pytest.param(patched(simple_core("a"), program_header(1, builders.P_OFFSET), "Q", 1 << 60), "missing",
                     id="p_offset beyond"),
        pytest.param(patched(simple_core("a"), program_header(1, builders.P_PADDR), "Q", 1 << 60), "52 address bits",
                     id="p_paddr absurd"),
        pytest.param(patched(simple_core("a"), program_header(1, builders.P_FILESZ), "Q", builders.U64),
                     "52 address bits", id="p_filesz absurd"),
        pytest.param(patched(simple_core("a"), program_header(1, 0), "I", 4), "no PT_LOAD", id="only notes"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line(damaged: bytes, said: str, vmcore_file: WriteFile) -> None:
    name = vmcore_file(damaged)
    line = refusal(name)
    assert said in line
    assert line.startswith(name)


def test_every_cut_within_the_headers_is_refused(vmcore_file: WriteFile) -> None:
    whole = simple_core("a")
    headers = 64 + 2 * 56
    for length in [*range(headers), headers]:
        line = refusal(vmcore_file(whole[:length]))
        assert any(word in line for word in ("empty", "truncated", "not an ELF")), (length, line)


def test_one_damaged_segment_among_good_ones_does_not_cost_the_others(vmcore_file: WriteFile) -> None:
    """The dump is what is left of the machine: a bad row is a problem to report, not a reason to save nothing."""
    good = elf_core([note(b"X", 1, b"")], [(0, 0x1000, filled("a")), (0, 0x9000, filled("b"))])
    core = parse(vmcore_file(patched(good, program_header(2, builders.P_PADDR), "Q", 1 << 60)))
    assert core.loads["p_paddr"].tolist() == [0x1000]


def test_a_directory_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    assert "directory" in refusal(str(tmp_path))
    assert "no such file" in refusal(str(tmp_path / "none"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be opened" in refusal(str(tmp_path / "loop"))


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_devices_that_hold_no_vmcore_are_refused(device: str) -> None:
    refusal(device)


def test_segments_of_kcore_that_are_no_memory_of_their_own_are_passed_over(vmcore_file: WriteFile) -> None:
    """vmalloc and vmemmap name the same bytes once more; on a live machine they are no damage."""
    data = elf_core([], [(0, 0x10_0000, filled("a")), (0xFFFF_C900_0000_0000, 0, filled("b"))])
    core = parse(vmcore_file(patched(data, program_header(1, builders.P_PADDR), "Q", 2**64 - 1)))
    assert core.loads["p_paddr"].tolist() == [0x10_0000]
    assert core.problems == ()


def test_a_segment_beyond_what_the_kernel_can_have_is_left_out(vmcore_file: WriteFile) -> None:
    loads = [(0, 0x10_0000, filled("a", "b")), (0, 1 << 46, filled("c"))]
    name = vmcore_file(elf_core([], loads))
    with Source(name) as source:
        whole = elfcore.parse(source)
        assert elfcore.narrowed(source, whole, 47) is whole
        found = elfcore.narrowed(source, whole, 46)
    assert found.loads["p_paddr"].tolist() == [0x10_0000]
    (problem,) = found.problems
    assert problem.startswith(f"{name}: PT_LOAD at physical 0x400000000000, 0x1000 bytes lies beyond 46 address bits")
    assert problem.endswith("left out")


def test_where_most_of_memory_lies_beyond_it_the_number_is_not_believed(vmcore_file: WriteFile) -> None:
    with Source(vmcore_file(elf_core([], [(0, 0, filled("a")), (0, 1 << 46, filled("b", "c"))]))) as source:
        whole = elfcore.parse(source)
        assert elfcore.narrowed(source, whole, 46) is whole


@pytest.mark.parametrize(("bits", "segments"), [(46, 1), (48, 2), (45, 2), (0, 2), (52, 2)])
def test_a_vmcore_is_opened_with_the_width_that_it_names(bits: int, segments: int, vmcore_file: WriteFile) -> None:
    info = note(b"VMCOREINFO", 0, f"NUMBER(MAX_PHYSMEM_BITS)={bits}\n".encode())
    with open_vmcore(vmcore_file(elf_core([info], [(0, 0, filled("a", "b")), (0, 1 << 46, filled("c"))]))) as vmcore:
        assert len(vmcore.core.loads) == segments
        assert len(vmcore.problems) == 2 - segments
