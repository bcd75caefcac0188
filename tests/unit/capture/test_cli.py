"""The command line from the outside: what it prints, where, and the status it ends with."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture import __version__, report
from capture.selftest import elf_core, note
from tests import builders
from tests.builders import (
    CPU,
    E_CLASS,
    E_DATA,
    E_MACHINE,
    E_PHENTSIZE,
    E_PHNUM,
    E_PHOFF,
    E_TYPE,
    P_FILESZ,
    P_OFFSET,
    P_PADDR,
    PAGE,
    U64,
    PrintkRing,
    crashed_core,
    filled,
    patched,
    program_header,
    prstatus_note,
    simple_core,
    vmcoreinfo_note,
)
from tests.faults import address_space_limit, raising
from tests.outcome import Ran, Run

WriteFile = Callable[[bytes], str]

REPOSITORY = Path(__file__).resolve().parents[3]
GIB = 1 << 30

CORE = simple_core("a", ".", "b")
HEADERS = 64 + 2 * 56
"""Where the program headers of CORE end."""


def process_of(package: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a package without arguments as a real process, which asks for one."""
    command = [sys.executable, "-m", package]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60, **options)


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a real process."""
    command = [sys.executable, "-m", "capture", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60, **options)


def one_line(ran: Ran, status: int, start: str = "vmcapture: ") -> str:
    """Hold a failed command against the contract; return its line."""
    assert ran.status == status, ran.err
    assert ran.out == ""
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1, ran.err
    assert ran.err.startswith(start)
    assert ran.err.removesuffix("\n").isprintable()
    return ran.err.removeprefix(start).removesuffix("\n")


@pytest.fixture
def dump_file(vmcore_file: WriteFile, tmp_path: Path, run: Run) -> Path:
    """A good dump of CORE."""
    assert run("dump", "-q", vmcore_file(CORE), tmp_path / "good.kdump").status == 0
    return tmp_path / "good.kdump"


@pytest.fixture
def read_by_every_command(run: Run, dump_file: Path, tmp_path: Path) -> Callable[[str | Path], dict[str, Ran]]:
    """Give SOURCE to every command that reads one; nothing may be left behind."""

    def commands(source: str | Path) -> dict[str, Ran]:
        before = set(tmp_path.rglob("*"))
        ran = {
            "dump": run("dump", source, tmp_path / "out"),
            "dmesg": run("dmesg", source),
            "registers": run("registers", source),
            "info": run("info", source),
            "verify": run("verify", dump_file, "--against", source),
            "save": run("save", "--source", source, tmp_path / "saved"),
        }
        assert set(tmp_path.rglob("*")) == before
        return ran

    return commands


Everything = Callable[[str | Path], dict[str, Ran]]


def all_refused(ran: dict[str, Ran], name: str) -> None:
    for command, answer in ran.items():
        line = one_line(answer, 4)
        assert line.startswith(name), command


# --- sources that are no vmcore


def test_a_missing_file_is_refused(read_by_every_command: Everything, tmp_path: Path) -> None:
    all_refused(read_by_every_command(tmp_path / "none"), str(tmp_path / "none"))


def test_a_directory_is_refused(read_by_every_command: Everything, tmp_path: Path) -> None:
    all_refused(read_by_every_command(tmp_path), str(tmp_path))


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero", "/dev/full", "/dev/tty"])
def test_a_device_without_a_vmcore_is_refused(read_by_every_command: Everything, device: str) -> None:
    all_refused(read_by_every_command(device), device)


def test_a_pipe_is_refused(read_by_every_command: Everything) -> None:
    """``vmcapture info <(zstd -dc vmcore.zst)``."""
    reader, writer = os.pipe()
    os.write(writer, CORE)
    try:
        all_refused(read_by_every_command(f"/dev/fd/{reader}"), f"/dev/fd/{reader}")
    finally:
        os.close(reader)
        os.close(writer)


def test_oldmem_without_a_crash_boot_is_refused(read_by_every_command: Everything) -> None:
    if "elfcorehdr=" in Path("/proc/cmdline").read_text():
        pytest.skip("this is a crash boot")
    all_refused(read_by_every_command("oldmem:"), "oldmem:")


def test_the_default_is_proc_vmcore_and_it_says_that_there_was_no_crash(run: Run) -> None:
    if Path("/proc/vmcore").exists():
        pytest.skip("this is a crash boot")
    for command in ("dmesg", "registers", "info"):
        assert one_line(run(command), 4).startswith("/proc/vmcore: no such file; this is not a crash boot")


DAMAGED = {
    "empty": b"",
    "a text file": b"Not a vmcore, but a letter.\n" * 300,
    "zeros": bytes(8192),
    "a dump already": b"KDUMP   " + bytes(8192),
    "flattened": b"makedumpfile".ljust(4096, b"\0") + bytes(8192),
    "ELF32": patched(CORE, E_CLASS, "B", 1),
    "no such class": patched(CORE, E_CLASS, "B", 3),
    "big endian": patched(CORE, E_DATA, "B", 2),
    "no such encoding": patched(CORE, E_DATA, "B", 0),
    "an executable": patched(CORE, E_TYPE, "H", 2),
    "a shared object": patched(CORE, E_TYPE, "H", 3),
    "no such type": patched(CORE, E_TYPE, "H", 0xFFFF),
    "i386": patched(CORE, E_MACHINE, "H", 3),
    "no such machine": patched(CORE, E_MACHINE, "H", 0xFFFF),
    "e_phentsize 0": patched(CORE, E_PHENTSIZE, "H", 0),
    "e_phentsize 32": patched(CORE, E_PHENTSIZE, "H", 32),
    "e_phentsize 65535": patched(CORE, E_PHENTSIZE, "H", 0xFFFF),
    "no segments": patched(CORE, E_PHNUM, "H", 0),
    "more segments than bytes": patched(CORE, E_PHNUM, "H", 0xFFFE),
    "PN_XNUM without section 0": patched(CORE, E_PHNUM, "H", 0xFFFF),
    "2^32-1 segments in section 0": patched(builders.pn_xnum_core(4), 64 + 44, "I", 0xFFFF_FFFF),
    "e_shoff beyond": patched(builders.pn_xnum_core(4), builders.E_SHOFF, "Q", U64 - 10),
    "e_phoff beyond": patched(CORE, E_PHOFF, "Q", 1 << 40),
    "e_phoff 2^63": patched(CORE, E_PHOFF, "Q", 1 << 63),
    "e_phoff 2^64-1": patched(CORE, E_PHOFF, "Q", U64),
    "p_offset beyond": patched(CORE, program_header(1, P_OFFSET), "Q", 1 << 50),
    "p_offset 2^64-1": patched(CORE, program_header(1, P_OFFSET), "Q", U64),
    "p_paddr 2^64-1": patched(CORE, program_header(1, P_PADDR), "Q", U64),
    "p_paddr 2^63": patched(CORE, program_header(1, P_PADDR), "Q", 1 << 63),
    "p_filesz 0": patched(CORE, program_header(1, P_FILESZ), "Q", 0),
    "p_filesz 2^64-1": patched(CORE, program_header(1, P_FILESZ), "Q", U64),
    "only notes": patched(CORE, program_header(1, 0), "I", 4),
    "no known segment": patched(patched(CORE, program_header(1, 0), "I", 0x6000_0000), program_header(0, 0), "I", 0),
    "a library of this machine": Path(sys.executable).resolve().read_bytes()[:100_000],
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_vmcore_is_refused_by_every_command(
    data: bytes, read_by_every_command: Everything, vmcore_file: WriteFile
) -> None:
    name = vmcore_file(data)
    all_refused(read_by_every_command(name), name)


def test_a_cut_at_every_byte_of_the_headers_is_refused_by_every_command(
    read_by_every_command: Everything, vmcore_file: WriteFile
) -> None:
    for length in range(HEADERS + 1):
        name = vmcore_file(CORE[:length])
        all_refused(read_by_every_command(name), name)


def test_a_name_that_would_drive_the_terminal_is_spelt_out(run: Run, tmp_path: Path) -> None:
    line = one_line(run("info", f"{tmp_path}/\x1b[2J\nnone"), 4)
    assert r"\x1b[2J\x0anone" in line


# --- sources that are damaged, but still worth something


def test_endless_notes_cost_neither_the_memory_nor_the_console(
    run: Run, vmcore_file: WriteFile, tmp_path: Path
) -> None:
    notes = prstatus_note(1, 1) + vmcoreinfo_note() + note(b"E", 1, b"") * 200_000
    source = vmcore_file(elf_core([notes], [(0, 0x1000, filled("a"))]))
    ran = run("dump", "--no-progress", source, tmp_path / "out")
    assert ran.status == 0
    assert len(ran.err.splitlines()) < 10
    assert all(line.startswith("vmcapture: ") for line in ran.err.splitlines())
    assert json.loads(run("info", "--json", source).out)["problems"]


def test_a_vmcore_cut_short_is_dumped_and_the_status_says_that_it_is_not_whole(
    run: Run, vmcore_file: WriteFile, tmp_path: Path
) -> None:
    ran = run("dump", "-q", vmcore_file(CORE[: -PAGE - 1]), tmp_path / "out")
    assert (ran.status, ran.out) == (3, "")
    (line,) = ran.err.splitlines()
    assert f"{PAGE + 1} bytes missing" in line
    assert "incomplete" in line
    assert run("verify", tmp_path / "out").status == 3


def test_without_a_log_dmesg_alone_is_refused(run: Run, vmcore_file: WriteFile) -> None:
    source = vmcore_file(CORE)
    assert "SYMBOL(prb)" in one_line(run("dmesg", source), 4)
    assert run("registers", source).status == 0
    assert run("info", source).status == 0


def test_without_registers_it_says_so(run: Run, vmcore_file: WriteFile) -> None:
    source = vmcore_file(elf_core([vmcoreinfo_note()], [(0, 0x1000, filled("a"))]))
    ran = run("registers", source)
    assert (ran.status, ran.err) == (0, "")
    assert "no CPU" in ran.out
    assert json.loads(run("registers", "--json", source).out)["cpus"] == []


# --- dumps that are none


def test_verify_refuses_what_is_no_dump(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Not a dump.\n" * 1000)
    (tmp_path / "empty").touch()
    for name in (tmp_path / "none", tmp_path / "text", tmp_path / "empty", Path("/dev/null")):
        assert one_line(run("verify", name), 4).startswith(str(name))


def test_verify_refuses_a_directory(run: Run, tmp_path: Path) -> None:
    assert one_line(run("verify", tmp_path), 4).startswith(str(tmp_path))


def test_verify_refuses_a_pipe(run: Run, dump_file: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, dump_file.read_bytes()[:4096])
    try:
        assert one_line(run("verify", f"/dev/fd/{reader}"), 4).startswith("/dev/fd/")
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("offset", "layout", "value"),
    [
        pytest.param(0, "B", ord("k"), id="signature"),
        pytest.param(8, "i", 0, id="version 0"),
        pytest.param(8, "i", -1, id="version -1"),
        pytest.param(428, "i", 0, id="block_size 0"),
        pytest.param(428, "i", -4096, id="block_size negative"),
        pytest.param(428, "i", 4095, id="block_size odd"),
        pytest.param(428, "i", 0x7FFF_FFFF, id="block_size 2^31-1"),
        pytest.param(432, "i", 0x7FFF_FFFF, id="sub_hdr_size 2^31-1"),
        pytest.param(432, "i", -1, id="sub_hdr_size -1"),
        pytest.param(432, "i", -100, id="sub_hdr_size -100"),
        pytest.param(436, "I", 0xFFFF_FFFF, id="bitmap_blocks 2^32-1"),
    ],
)  # fmt: skip
def test_verify_refuses_a_dump_whose_header_is_damaged(
    offset: int, layout: str, value: int, run: Run, dump_file: Path
) -> None:
    dump_file.write_bytes(patched(dump_file.read_bytes(), offset, layout, value))
    assert one_line(run("verify", dump_file), 4).startswith(str(dump_file))


def test_a_dump_cut_at_any_block_never_ends_in_an_internal_error(run: Run, dump_file: Path) -> None:
    whole = dump_file.read_bytes()
    descriptors = 1 + struct.unpack_from("<i", whole, 432)[0] + struct.unpack_from("<I", whole, 436)[0]
    for length in range(0, len(whole), 512):
        dump_file.write_bytes(whole[:length])
        ran = run("verify", dump_file)
        if length < descriptors * PAGE:
            one_line(ran, 4)
        else:
            assert (ran.status, ran.err) == (1, "")


# --- usage


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("explode",),
        ("--explode",),
        ("dump",),
        ("dump", "in"),
        ("dump", "in", "out", "more"),
        ("dump", "--explode", "in", "out"),
        ("dump", "-d"),
        ("dump", "-d", "x", "in", "out"),
        ("dump", "-d", "", "in", "out"),
        ("dump", "-d", "-1", "in", "out"),
        ("dump", "-d", "1.0", "in", "out"),
        ("dump", "-d", "1,32", "in", "out"),
        ("dump", "-d", "9" * 5000, "in", "out"),
        ("dump", "-d", "0x1", "in", "out"),
        ("dump", "-d", "1\n2", "in", "out"),
        ("dump", "--threads", "0", "in", "out"),
        ("dump", "--threads", "-1", "in", "out"),
        ("dump", "--threads", "1025", "in", "out"),
        ("dump", "--threads", "two", "in", "out"),
        ("dmesg", "in", "more"),
        ("verify",),
        ("info", "--caller", "in"),
        ("save", "--source"),
        ("save", "-d", "x"),
        ("save", "--force"),
    ],
    ids=lambda arguments: " ".join(arguments)[:40] or "nothing",
)
def test_a_usage_error_is_one_line_and_status_2(arguments: tuple[str, ...], run: Run) -> None:
    line = one_line(run(*arguments), 2, start="vmcapture")
    assert "--help" in line


@pytest.mark.parametrize("arguments", [("dmesg", "--explode"), ("info", "in", "more")], ids=" ".join)
def test_what_a_command_does_not_know_leads_to_its_own_help(arguments: tuple[str, ...], run: Run) -> None:
    line = one_line(run(*arguments), 2, start=f"vmcapture {arguments[0]}: ")
    assert line.endswith(f"unrecognized arguments: {arguments[-1]}; see vmcapture {arguments[0]} --help")


@pytest.mark.parametrize(
    "level", ["32", "255", "4294967296", "1,32", "1,,2", ",", "31,", "0x1f", "+1", "\u0663", "1 2"]
)
def test_levels_that_do_not_exist_are_refused(level: str, run: Run, vmcore_file: WriteFile, tmp_path: Path) -> None:
    line = one_line(run("dump", "-d", level, vmcore_file(CORE), tmp_path / "out"), 2, start="vmcapture dump")
    assert "0 to 31" in line
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "codec", ["lzo", "snappy", "zstd:0", "zstd:99", "zlib:0", "zlib:10", "none:1", "ZSTD", "zstd:"]
)
def test_a_compression_that_is_not_known_is_refused(
    codec: str, run: Run, vmcore_file: WriteFile, tmp_path: Path
) -> None:
    line = one_line(run("dump", "-c", codec, vmcore_file(CORE), tmp_path / "out"), 2)
    assert codec in line
    assert not list(tmp_path.glob("out*"))


def test_a_wrong_request_is_told_before_the_source_is_looked_at(run: Run, tmp_path: Path) -> None:
    """The person mends the command; "no such file" would only be the second thing to learn."""
    one_line(run("dump", "-d", "32", tmp_path / "none", tmp_path / "out"), 2, start="vmcapture dump")
    one_line(run("dump", "-c", "lzo", tmp_path / "none", tmp_path / "out"), 2)


def test_help_and_version_go_to_standard_output(run: Run) -> None:
    assert run("--version") == Ran(0, f"vmcapture {__version__}\n", "")
    for command in ("dump", "dmesg", "registers", "info", "verify", "save"):
        ran = run(command, "--help")
        assert (ran.status, ran.err) == (0, "")
        assert "exit status: 0 done" in " ".join(ran.out.split())


# --- targets


def test_an_existing_file_is_left_alone(run: Run, vmcore_file: WriteFile, tmp_path: Path) -> None:
    source = vmcore_file(CORE)
    (tmp_path / "out").write_text("mine")
    line = one_line(run("dump", source, tmp_path / "out"), 5)
    assert "--force" in line
    assert (tmp_path / "out").read_text() == "mine"
    assert not (tmp_path / "out.incomplete").exists()


def test_force_replaces_a_file_only_by_a_finished_dump(run: Run, vmcore_file: WriteFile, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert one_line(run("dump", "--force", tmp_path / "none", tmp_path / "out"), 4)
    assert (tmp_path / "out").read_text() == "mine"
    assert run("dump", "--force", vmcore_file(CORE), tmp_path / "out").status == 0
    assert run("verify", tmp_path / "out").status == 0


def test_what_an_interrupted_dump_left_is_not_written_over(run: Run, vmcore_file: WriteFile, tmp_path: Path) -> None:
    (tmp_path / "out.incomplete").write_text("precious")
    line = one_line(run("dump", "--no-progress", vmcore_file(CORE), tmp_path / "out"), 5)
    assert "out.incomplete" in line
    assert (tmp_path / "out.incomplete").read_text() == "precious"


def test_a_link_is_not_followed(run: Run, vmcore_file: WriteFile, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    one_line(run("dump", vmcore_file(CORE), tmp_path / "out"), 5)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("out", ["none/out", "vmcore.elf/out", "n" * 250, "n" * 300])
def test_a_place_where_nothing_can_be_made_is_refused(
    out: str, run: Run, vmcore_file: WriteFile, tmp_path: Path
) -> None:
    one_line(run("dump", vmcore_file(CORE), tmp_path / out), 5)


@pytest.mark.parametrize(
    ("force", "out"),
    [
        *(((), out) for out in ("/", ".", "..", "", "/dev/null")),
        *((("--force",), out) for out in ("/", ".", "..", "")),  # (not the device: it is this machine's)
    ],
)
def test_a_directory_or_device_is_not_a_dump(
    out: str, force: tuple[str, ...], run: Run, vmcore_file: WriteFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = vmcore_file(CORE)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = set(tmp_path.iterdir())
    one_line(run("dump", *force, source, out), 5)
    assert set(tmp_path.iterdir()) == before
    assert list((tmp_path / "here").iterdir()) == []


def test_force_replaces_no_device_or_pipe(run: Run, vmcore_file: WriteFile, tmp_path: Path) -> None:
    """As ``--force SOURCE /dev/null`` would, for the whole machine."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    for name in ("pipe", "link"):
        assert "name the file to write" in one_line(run("dump", "--force", vmcore_file(CORE), tmp_path / name), 5)
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()
    assert "name the file to write" in one_line(run("dump", vmcore_file(CORE), "/dev/no-such-device"), 5)
    assert not Path("/dev/no-such-device.incomplete").exists()


# --- output


@pytest.fixture
def crashed(vmcore_file: WriteFile) -> str:
    return vmcore_file(crashed_core())


def test_json_output_parses_and_is_all_there_is(run: Run, crashed: str, tmp_path: Path) -> None:
    info = json.loads(run("info", "--json", crashed).out)
    assert (info["host"], info["cpus"], info["panicked_cpu"], info["page_size"]) == ("db7", 2, 1, PAGE)
    registers = json.loads(run("registers", "--json", crashed).out)
    assert [cpu["pid"] for cpu in registers["cpus"]] == [7, 0]
    records = [json.loads(line) for line in run("dmesg", "--json", crashed).out.splitlines()]
    assert [record["sequence"] for record in records] == [0, 1, 2]
    assert records[1]["caller"] == "C1"
    run("dump", "-q", crashed, tmp_path / "out")
    for arguments in (("verify", tmp_path / "out"), ("verify", tmp_path / "out", "--against", crashed)):
        verified = json.loads(run(*arguments, "--json").out)
        assert verified["good"] is True
        assert verified["pages"] == info["pages"]


def test_info_is_a_few_lines_for_a_person(run: Run, crashed: str) -> None:
    ran = run("info", crashed)
    assert (ran.status, ran.err) == (0, "")
    description, classes, sizes = ran.out.split("\n\n")
    lines = dict(re.split(r":\s+", line, maxsplit=1) for line in description.splitlines())
    assert lines["kernel"].startswith("6.1.0-test")
    assert lines["host"] == "db7"
    assert lines["panic"] == "Kernel panic - not syncing: sysrq triggered crash"
    assert "CPU 1 panicked" in lines["CPUs"]
    assert classes.splitlines()[0].split()[:4] == ["class", "pages", "MiB", "share"]
    assert "pages cannot be told apart: VMCOREINFO has no SIZE(page)" in classes
    assert [line.split()[0] for line in sizes.splitlines()[:6]] == ["level", "0", "1", "16", "17", "31"]


def test_quiet_says_nothing_where_all_went_well(run: Run, crashed: str, tmp_path: Path) -> None:
    assert run("dump", "-q", crashed, tmp_path / "out") == Ran(0, "", "")
    assert run("save", "-q", "--source", crashed, tmp_path / "saved") == Ran(0, "", "")


HOSTILE = "\x1b]0;owned\x07\x1b[2J\r\x08\x00\x7f\x9b31m\u202e\u2028 end"


def test_nothing_of_a_dead_kernel_drives_the_terminal(run: Run, vmcore_file: WriteFile, tmp_path: Path) -> None:
    text = HOSTILE.encode()
    log = (
        PrintkRing(text_bits=12)
        .add(text)
        .add(b"two\n" + text)
        .add(b"Kernel panic - not syncing: " + text, caller=CPU | 1)
    )
    source = vmcore_file(crashed_core(text.replace(b"\0", b""), log=log, keys={"OSRELEASE": HOSTILE.replace("\0", "")}))
    shown = [
        run("info", source),
        run("registers", source),
        run("dmesg", source),
        run("dmesg", "--caller", source),
        run("save", "--no-progress", "--source", source, tmp_path / "saved"),
        *(run(command, "--json", source) for command in ("info", "registers", "dmesg")),
    ]
    for ran in shown:
        assert ran.status == 0
        for line in (ran.out + ran.err).split("\n"):
            assert line.replace("\x7f" if line.lstrip().startswith(('"', "{")) else "", "").isprintable(), repr(line)
    assert all("end" in ran.out for ran in (shown[0], shown[2]))
    (folder,) = (tmp_path / "saved").iterdir()
    for name in ("vmcore-dmesg.txt", "registers.txt", "capture-log.txt", "registers.json", "manifest.json"):
        assert all(line.isprintable() for line in (folder / name).read_text().split("\n")), name


def test_an_internal_error_is_one_line_and_only_verbose_shows_where(
    run: Run, crashed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "describe", raising(ZeroDivisionError("a bug")))
    line = one_line(run("info", crashed), 1)
    assert line.startswith("internal error: ZeroDivisionError: a bug")
    assert "-v" in line
    with pytest.raises(ZeroDivisionError):
        run("info", "-v", crashed)


def test_verbose_shows_no_traceback_for_what_the_person_can_mend(run: Run, tmp_path: Path, crashed: str) -> None:
    one_line(run("info", "-v", tmp_path / "none"), 4)
    one_line(run("dump", "-v", crashed, tmp_path / "none/out"), 5)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(5, "Input/output error", "/dev/sdb"), "/dev/sdb: Input/output error"),
        (OSError("no number, only words"), "no number, only words"),
        (MemoryError(), "out of memory"),
        (KeyboardInterrupt(), "interrupted"),
    ],
    ids=["with a file name", "without errno", "memory", "Ctrl-C"],
)
def test_what_the_system_does_to_us_is_one_line(
    error: BaseException, said: str, run: Run, crashed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "describe", raising(error))
    assert said in one_line(run("info", crashed), 130 if isinstance(error, KeyboardInterrupt) else 1)


# --- as a process


def test_python_m_capture_tells_its_version() -> None:
    answer = process("--version")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, f"vmcapture {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("info", "/dev/null"), 4),
        (("dump", "-d", "32", "core", "out"), 2),
        (("dump", "core", "none/out"), 5),
        (("dump",), 2),
        (("verify", "none/out"), 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_process_ends_with_the_same_line_and_status(arguments: tuple[str, ...], status: int, tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(CORE)
    places = [str(tmp_path / word) if word in ("core", "out", "none/out") else word for word in arguments]
    answer = process(*places)
    one_line(Ran(answer.returncode, answer.stdout, answer.stderr), status, start="vmcapture")


def test_a_process_dumps_and_says_what_it_did(tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(CORE)
    answer = process("dump", "--threads", "1", tmp_path / "core", tmp_path / "out")
    assert (answer.returncode, answer.stdout) == (0, "")
    assert (
        answer.stderr
        == f"vmcapture: {tmp_path}/out: level 1, 3 of 3 pages, {(tmp_path / 'out').stat().st_size} bytes\n"
    )


@pytest.mark.parametrize("command", [("dmesg",), ("dmesg", "--json"), ("info",)], ids=" ".join)
def test_a_reader_that_has_seen_enough_ends_it_quietly(command: tuple[str, ...], tmp_path: Path) -> None:
    """``vmcapture dmesg | head -1``, with more text than a pipe holds."""
    log = PrintkRing(desc_bits=12, text_bits=20)
    for number in range(4000):
        log.add(b"%d %s" % (number, b"x" * 100))
    (tmp_path / "core").write_bytes(log.core())
    shell = '"$@" | head -n 1; exit "${PIPESTATUS[0]}"'
    answer = subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, "-m", "capture", *command, tmp_path / "core"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("info", "core"), ("dmesg", "core"), ("dmesg", "--help"), ("--version",)], ids=" ".join
)
def test_a_full_disk_behind_standard_output_is_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(crashed_core())
    words = [str(tmp_path / word) if word == "core" else word for word in arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        answer = subprocess.run(
            [sys.executable, "-m", "capture", *words],
            cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60, env=environment,
        )  # fmt: skip
    said = one_line(Ran(answer.returncode, "", answer.stderr), 1)
    assert said == "standard output: No space left on device"


def test_a_dump_to_a_closed_standard_output_is_not_called_saved(tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(CORE)
    answer = subprocess.run(
        ["sh", "-c", 'exec "$0" -m capture dump "$1" - >&-', sys.executable, tmp_path / "core"],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "standard output is closed" in one_line(Ran(answer.returncode, "", answer.stderr), 2)


@pytest.mark.parametrize("package", ["capture", "initramfs"])
def test_ctrl_c_while_the_program_is_read_ends_it_without_a_traceback(package: str, tmp_path: Path) -> None:
    """The first module that the program reads after its own sends it."""
    slow = tmp_path / "argparse.py"
    slow.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    answer = process_of(package, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (answer.returncode, answer.stdout, answer.stderr) == (-signal.SIGINT, "", "")


def test_a_closed_standard_output_is_no_internal_error(tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(CORE)
    command = 'exec "$0" -m capture info "$1" >&-'
    answer = subprocess.run(
        ["sh", "-c", command, sys.executable, tmp_path / "core"],
        cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert "internal error" not in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_terminal_that_knows_ascii_only_gets_the_rest_spelt_out(tmp_path: Path) -> None:
    (tmp_path / "core").write_bytes(crashed_core("größe".encode()))
    answer = process("info", tmp_path / "core", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.isascii()
    assert "host:" in answer.stdout


def test_a_file_name_that_is_not_utf_8_is_no_internal_error(run: Run, vmcore_file: WriteFile, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    assert run("dump", vmcore_file(CORE), name).status == 0
    assert run("info", name).status == 0
    assert run("info", name + "x").status == 4
    answer = process("verify", name, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})  # as in most locales
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout == f"{tmp_path}/\\xff\\xfe: 3 pages read back well\n"


@pytest.mark.parametrize("arguments", [("info",), ("verify",)], ids=" ".join)
def test_a_file_that_is_not_ours_to_read_says_what_to_check(
    arguments: tuple[str, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vmcore").touch()
    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr(os, "open", raising(PermissionError(13, "Permission denied", "vmcore")))
        ran = run(*arguments, tmp_path / "vmcore")
    assert one_line(ran, 4).endswith("Permission denied; check its permissions")


def test_absurd_headers_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    """The counts below ask for up to 240 TB; 1.5 GiB of address space is allowed."""
    room = 20 * GIB
    absurd = {
        "2^32-1 segments": patched(builders.pn_xnum_core(2), 64 + 44, "I", 0xFFFF_FFFF),
        "2^28 segments": patched(builders.pn_xnum_core(2), 64 + 44, "I", 1 << 28),
        "a table far off": patched(patched(CORE, E_PHOFF, "Q", 10 * GIB), E_PHNUM, "H", 0xFFFE),
        "section 0 far off": patched(builders.pn_xnum_core(2), builders.E_SHOFF, "Q", 15 * GIB),
        "memory beyond all address bits": patched(CORE, program_header(1, P_FILESZ), "Q", U64),
    }
    names = []
    for number, data in enumerate(absurd.values()):
        names.append(str(tmp_path / f"{number}.elf"))
        with Path(names[-1]).open("wb") as file:
            file.write(data)
            file.truncate(room)
    program = (
        "import sys; from capture.cli import main\n"
        "for name in sys.argv[1:]:\n"
        "    for arguments in (['info', name], ['dmesg', name], ['dump', name, name + '.out']):\n"
        "        print(arguments[0], name, main(arguments), flush=True)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, *names], cwd=REPOSITORY, capture_output=True, text=True, check=False,
        preexec_fn=address_space_limit(3 * GIB // 2), timeout=60,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    statuses = [line.split() for line in answer.stdout.splitlines()]
    assert len(statuses) == 3 * len(absurd)
    refused = {(command, Path(name).stem) for command, name, status in statuses if status == "4"}
    for number, what in enumerate(absurd):
        for command in ("info", "dmesg", "dump"):
            assert (command, str(number)) in refused, (command, what, answer.stderr)
    assert all(line.startswith("vmcapture: ") for line in answer.stderr.splitlines())
    assert len(answer.stderr.splitlines()) == len(statuses)


def test_a_note_segment_of_all_memory_is_described_in_bounded_memory(tmp_path: Path) -> None:
    source = tmp_path / "notes.elf"
    with source.open("wb") as file:
        file.write(patched(CORE, program_header(0, P_FILESZ), "Q", 1 << 62))
        file.truncate(20 * GIB)
    answer = process("info", "--json", source, preexec_fn=address_space_limit(3 * GIB // 2))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert json.loads(answer.stdout)["pages"] == 3
