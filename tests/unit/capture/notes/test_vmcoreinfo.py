"""VMCOREINFO: typed, and every key optional."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capture.notes import vmcoreinfo
from capture.notes.vmcoreinfo import VmcoreInfo, parse
from capture.vmcore import open_vmcore

TEXT = b"""OSRELEASE=6.12.117+deb12-cloud-amd64
PAGESIZE=4096
SYMBOL(prb)=ffffffff82e62bc0
SIZE(prb_desc)=24
OFFSET(prb_desc.text_blk_lpos)=8
LENGTH(zone.free_area)=11
NUMBER(phys_base)=-2097152
NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=-129
NUMBER(kimage_voffset)=0xffff7fffc0000000
NUMBER(sme_mask)=0
KERNELOFFSET=1a000000
CRASHTIME=1762000000
CONFIG_X86_5LEVEL=y
"""


def test_each_kind_of_line_is_read_as_the_kernel_wrote_it() -> None:
    info = parse(TEXT)
    assert info.release == "6.12.117+deb12-cloud-amd64"
    assert info.symbol("prb") == 0xFFFFFFFF82E62BC0
    assert info.size("prb_desc") == 24
    assert info.offset("prb_desc.text_blk_lpos") == 8
    assert info.length("zone.free_area") == 11
    assert info.number("phys_base") == -2097152
    assert info.number("PAGE_SLAB_MAPCOUNT_VALUE") == -129
    assert info.number("kimage_voffset") == 0xFFFF7FFFC0000000
    assert info.number("sme_mask") == 0
    assert info.page_size == 4096
    assert info.crash_time == 1762000000
    assert info.text("CONFIG_X86_5LEVEL") == "y"
    assert info.ignored == 0


def test_a_missing_key_is_none_and_not_zero() -> None:
    info = parse(b"")
    assert (info.symbol("x"), info.size("x"), info.offset("x"), info.length("x"), info.number("x")) == (None,) * 5
    assert (info.text("x"), info.crash_time, info.release, info.page_size) == (None, None, "", 4096)


@pytest.mark.parametrize("value", ["", " ", "x", "0x", "-", "--1", "1.5", "1e3", "9" * 25, "1" * 5000, "½", "\ufffd"])
def test_a_value_that_is_no_number_is_none(value: str) -> None:
    info = parse(f"NUMBER(a)={value}\nSYMBOL(a)={value}!\nSIZE(a)={value}\nPAGESIZE={value}".encode())
    assert info.number("a") is None
    assert info.symbol("a") is None
    assert info.size("a") is None
    assert info.page_size == 4096


def test_sizes_are_not_negative_and_numbers_fit_64_bits() -> None:
    info = parse(b"SIZE(a)=-8\nOFFSET(a)=-1\nNUMBER(a)=18446744073709551616\nNUMBER(b)=18446744073709551615\n")
    assert info.size("a") is None
    assert info.offset("a") is None
    assert info.number("a") is None
    assert info.number("b") == 2**64 - 1


def test_the_last_of_two_equal_keys_counts_and_lines_without_sense_are_counted() -> None:
    info = parse(b"A=1\nnonsense\n=x\n\nA=2\nB=x=y\r\n")
    assert info.text("A") == "2"
    assert info.text("B") == "x=y"
    assert info.ignored == 2


def test_what_follows_a_nul_is_padding() -> None:
    assert parse(b"A=1\nB=2\0C=3\n").keys == {"A": "1", "B": "2"}


@pytest.mark.parametrize(("value", "size"), [("16384", 16384), ("65536", 65536), ("0", 4096), ("4097", 4096)])
def test_only_page_sizes_that_exist_are_believed(value: str, size: int) -> None:
    assert parse(f"PAGESIZE={value}".encode()).page_size == size


@pytest.mark.parametrize("value", ["0", "-5", "99999999999999"])
def test_an_absurd_crash_time_is_not_known(value: str) -> None:
    assert parse(f"CRASHTIME={value}".encode()).crash_time is None


def everything(info: VmcoreInfo) -> None:
    for name in [key.partition("(")[2].rstrip(")") for key in info.keys] + ["a", ""]:
        for kind in (info.symbol, info.size, info.offset, info.length, info.number):
            found = kind(name)
            assert found is None or -(1 << 63) <= found < 1 << 64
    assert info.page_size in vmcoreinfo.PAGE_SIZES
    assert isinstance(info.release, str)
    assert info.crash_time is None or info.crash_time > 0


KINDS = st.sampled_from(
    [b"SYMBOL(a)", b"SIZE(a)", b"NUMBER(a)", b"OFFSET(a)", b"PAGESIZE", b"CRASHTIME", b"KERNELOFFSET"]
)
LINES = st.lists(st.tuples(KINDS, st.one_of(st.binary(max_size=30), st.integers().map(lambda n: str(n).encode()))))


@given(st.binary())
@example(b"NUMBER(a)=" + b"9" * 100_000)
@example("SIZE(a)=٣\nNUMBER(a)=1_000\n".encode())
def test_no_bytes_are_too_strange(text: bytes) -> None:
    everything(parse(text))


@given(LINES)
def test_no_values_are_too_strange(lines: list[tuple[bytes, bytes]]) -> None:
    everything(parse(b"".join(key + b"=" + value + b"\n" for key, value in lines)))


@given(st.integers(-(1 << 63), (1 << 64) - 1))
def test_every_64_bit_number_comes_back_in_decimal_and_hexadecimal(number: int) -> None:
    info = parse(f"NUMBER(d)={number}\nNUMBER(x)={number:#x}\nSYMBOL(s)={abs(number):x}\n".encode())
    assert info.number("d") == info.number("x") == number
    assert info.symbol("s") == abs(number)


@pytest.mark.parametrize("name", ["prb", "init_uts_ns", "_stext", "swapper_pg_dir"])
def test_symbols_of_a_real_vmcore_are_in_the_kernel(corpus_vmcore: Path, name: str) -> None:
    with open_vmcore(str(corpus_vmcore)) as vmcore:
        address = vmcore.info.symbol(name)
    assert address is not None
    assert address >= 0xFFFF_FFFF_8000_0000
