"""Sources: mapped where possible, read where not, and elfcorehdr=."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.errors import SourceError
from capture.memory import source as source_module
from capture.memory.source import Source, elfcorehdr, memparse, open_old_memory, open_source
from tests.builders import PAGE, filled
from tests.faults import refused_to_others

WriteFile = Callable[[bytes], str]


def test_a_mapped_view_and_a_read_give_the_same_bytes_at_any_offset(vmcore_file: WriteFile) -> None:
    data = os.urandom(5 * PAGE + 123)
    with Source(vmcore_file(data)) as source:
        for offset, length in ((0, 1), (0, len(data)), (PAGE - 1, 2), (PAGE, PAGE), (3 * PAGE + 7, 2 * PAGE)):
            view = source.map(offset, length)
            assert view is not None
            assert bytes(view[:length]) == data[offset : offset + length] == source.read(offset, length)


def test_a_read_at_the_end_gives_what_is_there(vmcore_file: WriteFile) -> None:
    with Source(vmcore_file(b"0123456789")) as source:
        assert source.read(6, 100) == b"6789"
        assert source.read(10, 5) == b""


def test_a_view_stays_valid_after_close(vmcore_file: WriteFile) -> None:
    source = Source(vmcore_file(filled("a")))
    view = source.map(0, PAGE)
    source.close()
    assert view is not None
    assert bytes(view[:PAGE]) == filled("a")


def test_a_file_that_became_shorter_is_an_error_not_a_signal(vmcore_file: WriteFile) -> None:
    name = vmcore_file(filled("a", "b", "c", "d"))
    with Source(name) as source:
        os.truncate(name, PAGE)
        with pytest.raises(OSError) as failed:
            source.map(0, 4 * PAGE)
        assert failed.value.errno in (errno.ENXIO, errno.EFAULT)
        assert source.read(0, 4 * PAGE) == filled("a")


def test_beyond_the_end_is_an_error(vmcore_file: WriteFile) -> None:
    with Source(vmcore_file(filled("a"))) as source, pytest.raises(OSError, match="beyond the end"):
        source.map(0, PAGE + 1)


def test_where_mmap_is_refused_it_reads_and_says_so() -> None:
    """The kernel refuses mmap of a sysfs attribute (ENODEV); its bytes can be read."""
    name = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not Path(name).exists():
        pytest.skip(f"{name} is not there")
    with Source(name) as source:
        assert source.map_refused is None
        assert source.map(0, PAGE) is None
        assert source.map_refused is not None
        assert name in source.map_refused
        assert source.read(0, PAGE) == Path(name).read_bytes()


def test_the_memory_of_a_process_is_read_at_its_addresses() -> None:
    buffer = ctypes.create_string_buffer(b"the dead kernel's memory", 64)
    with Source("/proc/self/mem", size=1 << 47) as source:
        assert source.read(ctypes.addressof(buffer), 24) == b"the dead kernel's memory"


def test_an_unmapped_address_of_a_process_is_eio() -> None:
    with Source("/proc/self/mem", size=1 << 47) as source, pytest.raises(OSError) as failed:
        source.read(PAGE, PAGE)  # below vm.mmap_min_addr: nothing is ever mapped there
    assert failed.value.errno == errno.EIO


def test_a_source_may_be_read_only(vmcore_file: WriteFile) -> None:
    with Source(vmcore_file(filled("a")), can_map=False) as source:
        assert source.map(0, PAGE) is None
        assert source.map_refused is None


def test_an_unreadable_file_is_refused(vmcore_file: WriteFile) -> None:
    name = vmcore_file(b"x")
    Path(name).chmod(0)
    refused_to_others(lambda: Source(name), SourceError, "Permission denied")


@pytest.mark.parametrize(
    ("line", "address"),
    [
        ("elfcorehdr=0x2ff60000", 0x2FF60000),
        ("quiet elfcorehdr=64K@0x2ff60000 ro", 0x2FF60000),
        ("elfcorehdr=785M", 785 << 20),
        ("elfcorehdr=1024K@785m", 785 << 20),
        ("elfcorehdr=4G", 4 << 30),
        ("elfcorehdr=12345", 12345),
        ("elfcorehdr=0X1000k", 0x1000 << 10),
        ("elfcorehdr=010", 8),
        ("elfcorehdr=1M elfcorehdr=2M", 2 << 20),
        ("elfcorehdr=0", 0),
        ("noelfcorehdr=1M", None),
        ("", None),
        ("elfcorehdr=", None),
        ("elfcorehdr", None),
        ("elfcorehdr=@", None),
        ("elfcorehdr=64K@", None),
        ("elfcorehdr=garbage", None),
        ("elfcorehdr=0x", None),
        ("elfcorehdr=-1M", None),
        ("elfcorehdr=1M elfcorehdr=garbage", None),
    ],
)
def test_elfcorehdr_is_found_as_the_kernel_finds_it(line: str, address: int | None) -> None:
    assert elfcorehdr(line) == address


@given(st.integers(0, (1 << 40) - 1), st.sampled_from([("", 0), ("K", 10), ("m", 20), ("G", 30)]), st.booleans())
def test_memparse_reads_every_number_that_can_be_written(number: int, suffix: tuple[str, int], hexa: bool) -> None:
    text = f"{number:#x}" if hexa else str(number)
    assert memparse(text + suffix[0]) == number << suffix[1]


@given(st.text())
def test_no_command_line_is_too_strange(line: str) -> None:
    for text in (line, f"elfcorehdr={line}"):
        found = elfcorehdr(text)
        assert found is None or found >= 0


@pytest.fixture
def handed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | None]:
    """``handed("quiet", device_tree=b"...")``: where the header is for a kernel that was given these."""

    def address(line: str, *, device_tree: bytes | None = None) -> int | None:
        (tmp_path / "cmdline").write_text(line)
        monkeypatch.setattr(source_module, "COMMAND_LINE", tmp_path / "cmdline")
        monkeypatch.setattr(source_module, "DEVICE_TREE_HEADER", tmp_path / "linux,elfcorehdr")
        if device_tree is not None:
            (tmp_path / "linux,elfcorehdr").write_bytes(device_tree)
        return source_module.core_header_address()

    return address


def test_old_memory_outside_a_crash_boot_is_refused(handed: Callable[..., int | None]) -> None:
    assert handed("quiet ro") is None
    with pytest.raises(SourceError, match="elfcorehdr"):
        open_old_memory()


def test_arm64_hands_the_header_over_in_the_device_tree(handed: Callable[..., int | None]) -> None:
    """Documentation/devicetree/bindings/chosen.txt: linux,elfcorehdr = <address size>, 64 bits each, big endian."""
    assert handed("quiet ro", device_tree=bytes.fromhex("000000009fe00000 0000000000000400")) == 0x9FE0_0000
    assert source_module.is_crash_boot()
    assert handed("elfcorehdr=1M") == 1 << 20


def test_proc_vmcore_outside_a_crash_boot_says_why() -> None:
    if Path("/proc/vmcore").exists():
        pytest.skip("this is a crash boot: /proc/vmcore is there")
    with pytest.raises(SourceError, match="not a crash boot"):
        open_source("/proc/vmcore")


def test_many_windows_leave_no_mapping_behind(vmcore_file: WriteFile) -> None:
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    with Source(vmcore_file(bytes(64 * PAGE))) as source:
        before = mappings()
        for _ in range(500):
            view = source.map(PAGE, 8 * PAGE)
            assert view is not None
            del view
        assert mappings() - before < 20
