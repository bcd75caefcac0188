"""The dead kernel's names: from its memory, else from VMCOREINFO."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.kernel.address import KernelMemory
from capture.kernel.utsname import FIELDS, Utsname, read_utsname
from capture.selftest import elf_core
from capture.vmcore import open_vmcore
from tests.builders import DIRECT_MAP, PAGE, U64, as_file, new_utsname, vmcoreinfo_note

BASE = 0x30_0000
UTS_AT = 0x100
"""Where init_uts_ns lies in the page; its name follows 8 bytes further on, as OFFSET(uts_namespace.name) says."""

NAMES = ("Linux", "db7.example", "6.12.117+deb12-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.12.117-1", "x86_64", "(none)")
KEYS: dict[str, str | int] = {
    "OSRELEASE": "6.12.117+deb12-amd64",
    "SYMBOL(init_uts_ns)": f"{DIRECT_MAP + BASE + UTS_AT:x}",
    "OFFSET(uts_namespace.name)": 8,
}


def names_in(
    structure: bytes, keys: Mapping[str, str | int] = KEYS, *, machine: int = 62, page: int = UTS_AT + 8
) -> Utsname:
    """What is read from a vmcore with ``structure`` in its memory."""
    memory = (bytes(page) + structure).ljust(PAGE, b"\0")[:PAGE]
    core = elf_core([vmcoreinfo_note(keys)], [(DIRECT_MAP + BASE, BASE, memory)], machine=machine)
    with as_file(core) as name, open_vmcore(name) as vmcore:
        image = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
        return read_utsname(image, vmcore.info, vmcore.core.machine)


def texts(names: Utsname) -> tuple[str, ...]:
    return tuple(names.text(field) for field in FIELDS)


def test_all_six_names_are_read_as_the_kernel_keeps_them() -> None:
    structure = new_utsname(*NAMES)
    found = names_in(structure)
    assert texts(found) == NAMES
    assert found.raw == structure
    assert found.text("nodename") == "db7.example"


@pytest.mark.parametrize("missing", ["SYMBOL(init_uts_ns)", "OFFSET(uts_namespace.name)"])
def test_without_a_key_the_release_comes_from_vmcoreinfo(missing: str) -> None:
    keys = {key: value for key, value in KEYS.items() if key != missing}
    found = names_in(new_utsname(*NAMES), keys)
    assert texts(found) == ("Linux", "", "6.12.117+deb12-amd64", "unknown", "x86_64", "")
    assert len(found.raw) == 390


@pytest.mark.parametrize("address", ["0", "1000", f"{DIRECT_MAP + BASE + PAGE - 100:x}", f"{U64:x}"])
def test_where_memory_cannot_be_read_the_release_comes_from_vmcoreinfo(address: str) -> None:
    found = names_in(new_utsname(*NAMES), {**KEYS, "SYMBOL(init_uts_ns)": address})
    assert texts(found) == ("Linux", "", "6.12.117+deb12-amd64", "unknown", "x86_64", "")


@pytest.mark.parametrize(
    "structure",
    [bytes(390), b"\xff" * 390, new_utsname("Linus", *NAMES[1:]), new_utsname("LINUX"), b"Linux " + b"x" * 384],
    ids=["zeros", "ones", "another system", "capitals", "no end"],
)
def test_memory_that_does_not_say_linux_is_not_believed(structure: bytes) -> None:
    assert names_in(structure).text("release") == "6.12.117+deb12-amd64"
    assert names_in(structure).text("nodename") == ""


def test_with_nothing_known_at_all_nothing_that_drgn_insists_on_is_empty() -> None:
    assert texts(names_in(b"", {})) == ("Linux", "", "unknown", "unknown", "x86_64", "")


def test_the_machine_of_an_arm_vmcore_is_aarch64() -> None:
    assert names_in(b"", {"OSRELEASE": "6.1.0"}, machine=183).text("machine") == "aarch64"


def test_names_without_an_end_stop_at_their_field() -> None:
    found = names_in(new_utsname("Linux", "h" * 65, "r" * 65, "v" * 65, "m" * 65, "d" * 65))
    assert texts(found) == ("Linux", "h" * 65, "r" * 65, "v" * 65, "m" * 65, "d" * 65)


def test_what_follows_a_nul_is_no_part_of_a_name() -> None:
    assert names_in(new_utsname("Linux", b"new\0longer-old-name")).text("nodename") == "new"


def test_bytes_that_are_no_text_are_replaced() -> None:
    assert names_in(new_utsname("Linux", b"h\xff\xfest")).text("nodename") == "h\ufffd\ufffdst"


@pytest.mark.parametrize("release", ["r" * 300, "ü" * 64, "\x1b[2J"])
def test_any_osrelease_fits_the_structure(release: str) -> None:
    found = names_in(b"", {"OSRELEASE": release})
    assert len(found.raw) == 390
    assert found.text("version") == "unknown"
    assert found.text("machine") == "x86_64"


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=390))
def test_no_memory_is_too_strange_for_names(structure: bytes) -> None:
    found = names_in(structure)
    assert len(found.raw) == 390
    assert all(isinstance(text, str) for text in texts(found))


def test_a_real_kernel_names_itself_as_its_vmcoreinfo_and_its_log_do(corpus_vmcore: Path) -> None:
    banner = re.compile(rb"Linux version (\S+) \([^\n]*?\) (#1 SMP[ -~]+)\n")
    with corpus_vmcore.open("rb") as file:
        notes = file.read(1 << 16)
    release = re.search(rb"OSRELEASE=(\S+)\n", notes)
    assert release is not None
    with open_vmcore(str(corpus_vmcore)) as vmcore:
        memory = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
        found = read_utsname(memory, vmcore.info, vmcore.core.machine)
        # linux_banner lies in the image's read-only data; it is printed as the first line of the log.
        line = _first_banner(corpus_vmcore, banner)
    assert found.text("sysname") == "Linux"
    assert found.text("release") == release[1].decode() == line[1].decode()
    assert found.text("machine") == "x86_64"
    assert found.text("nodename") == "(none)"  # the guest had no host name yet
    assert line[2].decode().endswith(found.text("version"))


def _first_banner(path: Path, banner: re.Pattern[bytes]) -> re.Match[bytes]:
    with path.open("rb") as file:
        tail = b""
        while block := file.read(8 << 20):
            if match := banner.search(tail + block):
                return match
            tail = block[-512:]
    raise AssertionError("no banner in this vmcore")
