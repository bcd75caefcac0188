"""printk ring → records and lines, held against the builder's model of the kernel and against makedumpfile."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.kernel.printk import LogUnavailable, PrintkLog, Record, format_record
from capture.report import log_lines, open_log
from capture.selftest import elf_core
from capture.vmcore import open_vmcore
from tests.builders import (
    COMMITTED,
    CPU,
    DIRECT_MAP,
    FINALIZED,
    PAGE,
    RESERVED,
    REUSABLE,
    RING_LAYOUT,
    SHUFFLED_LAYOUT,
    U64,
    PrintkRing,
    as_file,
    patched,
    vmcoreinfo_note,
)

BASE = 0x20_0000
"""Where the rings lie in physical memory."""

# Where PrintkRing.memory() puts things: the pointer at 0, the ring at 64, the descriptors at 512, then infos and text.
RING, DESCS = 64, 512
DESC_SIZE, INFO_SIZE = RING_LAYOUT["SIZE(prb_desc)"], RING_LAYOUT["SIZE(printk_info)"]
COUNT_BITS = RING + RING_LAYOUT["OFFSET(prb_desc_ring.count_bits)"]
DESCS_POINTER = RING + RING_LAYOUT["OFFSET(prb_desc_ring.descs)"]
INFOS_POINTER = RING + RING_LAYOUT["OFFSET(prb_desc_ring.infos)"]
HEAD_ID = RING + RING_LAYOUT["OFFSET(prb_desc_ring.head_id)"]
TAIL_ID = RING + RING_LAYOUT["OFFSET(prb_desc_ring.tail_id)"]
TEXT_RING = RING + RING_LAYOUT["OFFSET(printk_ringbuffer.text_data_ring)"]
SIZE_BITS = TEXT_RING + RING_LAYOUT["OFFSET(prb_data_ring.size_bits)"]
TEXT_POINTER = TEXT_RING + RING_LAYOUT["OFFSET(prb_data_ring.data)"]

both_wrap_rules = pytest.mark.parametrize(
    "fits_end", [pytest.param(False, id="before late 2025"), pytest.param(True, id="since late 2025")]
)


@contextmanager
def log_of(core: bytes) -> Iterator[PrintkLog]:
    """The log of a vmcore given as bytes."""
    with as_file(core) as name, open_vmcore(name) as vmcore:
        yield open_log(vmcore)


def decoded(core: bytes) -> list[tuple[int, bytes]]:
    """Sequence number and text of every record, as ``PrintkRing.survivors`` says them."""
    with log_of(core) as log:
        return [(record.sequence, record.text) for record in log.records()]


def records_of(ring: PrintkRing) -> list[Record]:
    with log_of(ring.core()) as log:
        return list(log.records())


def core_with(ring: PrintkRing, memory: bytes, keys: Mapping[str, str | int] | None = None, hole: int = -1) -> bytes:
    """A vmcore of ``ring`` whose memory is ``memory`` instead, with page number ``hole`` of it missing."""
    memory += bytes(-len(memory) % PAGE)
    pages = [
        (DIRECT_MAP + BASE + at, BASE + at, memory[at : at + PAGE])
        for at in range(0, len(memory), PAGE)
        if at // PAGE != hole
    ]
    return elf_core([vmcoreinfo_note({**ring.keys(BASE), **(keys or {})})], pages)


def filled_ring(records: int, *, desc_bits: int = 4, text_bits: int = 10, fits_end: bool = False) -> PrintkRing:
    ring = PrintkRing(desc_bits, text_bits, fits_end)
    for number in range(records):
        ring.add(b"record %d " % number + b"." * (number * 7 % 60))
    return ring


# --- What the kernel wrote comes out --------------------------------------------------------------------------------


def test_records_come_out_oldest_first_with_all_that_the_kernel_stored() -> None:
    ring = PrintkRing()
    ring.add(b"Linux version 6.1", caller=0, timestamp=0, level=5)
    ring.add(b"a task says", caller=4711, timestamp=12_345_678_901, level=3)
    ring.add(b"an interrupt says", caller=CPU | 3, timestamp=99, level=7)
    assert [
        (record.sequence, record.timestamp, record.text, record.caller, record.level) for record in records_of(ring)
    ] == [
        (0, 0, b"Linux version 6.1", "T0", 5),
        (1, 12_345_678_901, b"a task says", "T4711", 3),
        (2, 99, b"an interrupt says", "C3", 7),
    ]


def test_an_empty_ring_has_no_records() -> None:
    with log_of(PrintkRing().core()) as log:
        assert list(log.records()) == []
        assert log.statistics.undecodable == 0


@both_wrap_rules
@pytest.mark.parametrize("records", [1, 15, 16, 17, 31, 32, 33, 500])
def test_a_ring_that_was_filled_many_times_keeps_what_the_kernel_kept(records: int, fits_end: bool) -> None:
    ring = filled_ring(records, fits_end=fits_end)
    assert ring.survivors()
    assert decoded(ring.core()) == ring.survivors()


@both_wrap_rules
def test_a_block_that_would_run_over_the_end_lies_whole_at_the_start(fits_end: bool) -> None:
    ring = PrintkRing(text_bits=8, fits_end=fits_end)
    ring.add(b"a" * 100).add(b"b" * 99)  # blocks of 112 bytes each: 32 of the 256 are left
    ring.add(b"c" * 50)
    assert ring.survivors()[-1] == (2, b"c" * 50)
    assert decoded(ring.core()) == ring.survivors()


@both_wrap_rules
def test_a_block_that_fits_the_end_exactly_lies_where_its_kernel_puts_it(fits_end: bool) -> None:
    ring = PrintkRing(text_bits=8, fits_end=fits_end)
    for letter in (b"a", b"b", b"c", b"d"):
        ring.add(letter * 55)  # an id, the text and its NUL: 64 bytes, a quarter of the ring
    # The old rule moves the fourth block to the start, over the first one.
    assert [sequence for sequence, _ in ring.survivors()] == ([0, 1, 2, 3] if fits_end else [1, 2, 3])
    assert decoded(ring.core()) == ring.survivors()
    ring.add(b"e" * 55).add(b"f" * 20)
    assert decoded(ring.core()) == ring.survivors()


def test_a_record_that_was_given_more_room_than_it_used_has_its_own_text_only() -> None:
    ring = PrintkRing().add(b"x" * 90).add(b"short", reserve=200).add(b"next")
    assert decoded(ring.core()) == ring.survivors() == [(0, b"x" * 90), (1, b"short"), (2, b"next")]


def test_an_empty_line_is_a_record_and_a_text_that_found_no_room_is_counted() -> None:
    ring = PrintkRing().add(b"first").add(b"").add_without_room().add(b"last")
    with log_of(ring.core()) as log:
        assert [(record.sequence, record.text) for record in log.records()] == [(0, b"first"), (1, b""), (3, b"last")]
        assert (log.statistics.records, log.statistics.dataless, log.statistics.undecodable) == (3, 1, 0)


def test_records_that_were_never_committed_or_were_given_up_are_left_out_without_complaint() -> None:
    ring = PrintkRing()
    for state in (FINALIZED, RESERVED, COMMITTED, REUSABLE, FINALIZED):
        ring.add(b"state %d" % state, state=state)
    with log_of(ring.core()) as log:
        assert [record.text for record in log.records()] == [b"state 2", b"state 1", b"state 2"]
        assert log.statistics.undecodable == 0


def test_a_continuation_is_marked() -> None:
    log_cont, log_newline = 8, 2
    ring = PrintkRing().add(b"begun ", flags=log_cont, level=4).add(b"whole", flags=log_newline, level=4)
    assert [(record.continuation, record.level) for record in records_of(ring)] == [(True, 4), (False, 4)]


def test_ids_wrap_at_62_bits_and_the_ring_goes_on() -> None:
    ring = PrintkRing(desc_bits=3, text_bits=10)
    for number in range(12):
        ring.add(b"%d" % number)
    # The first id is 2^62 - 8: of the 8 records that are left, ids ran over after the fourth.
    assert decoded(ring.core()) == [(number, b"%d" % number) for number in range(4, 12)]


def test_a_kernel_that_moved_every_member_is_read_by_its_own_word() -> None:
    ring = PrintkRing(layout=SHUFFLED_LAYOUT)
    for number in range(40):
        ring.add(b"moved %d" % number, caller=number)
    assert decoded(ring.core()) == ring.survivors()
    with log_of(ring.core()) as log:
        assert [record.caller for record in log.records()] == [f"T{number}" for number, _ in ring.survivors()]


def test_records_can_be_read_twice() -> None:
    with log_of(filled_ring(40).core()) as log:
        assert list(log.records()) == list(log.records())


texts = st.one_of(st.binary(max_size=110), st.sampled_from([b"x" * 55, b"x" * 56, b"x" * 111, b"\n", b"a\nb", b"\0"]))
additions = st.lists(
    st.one_of(
        st.tuples(texts, st.sampled_from([FINALIZED, FINALIZED, FINALIZED, COMMITTED, RESERVED]), st.integers(0, 8)),
        st.none(),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(
    additions=additions,
    desc_bits=st.integers(1, 5),
    text_bits=st.integers(8, 10),
    fits_end=st.booleans(),
    layout=st.sampled_from([RING_LAYOUT, SHUFFLED_LAYOUT]),
)
def test_whatever_was_logged_the_records_are_those_that_survived_in_the_ring(
    additions: list[tuple[bytes, int, int] | None],
    desc_bits: int,
    text_bits: int,
    fits_end: bool,
    layout: Mapping[str, int],
) -> None:
    ring = PrintkRing(desc_bits, text_bits, fits_end, layout)
    for addition in additions:
        if addition is None:
            ring.add_without_room()
        else:
            text, state, more_room = addition
            ring.add(text, state=state, reserve=len(text) + 1 + more_room)
    with log_of(ring.core()) as log:
        assert [(record.sequence, record.text) for record in log.records()] == ring.survivors()
        assert log.statistics.records == len(ring.survivors())
        assert log.statistics.undecodable == 0


@settings(deadline=None)
@given(timestamp=st.integers(0, U64), caller=st.integers(0, 0xFFFF_FFFF), level=st.integers(0, 7))
def test_time_caller_and_level_come_back_as_they_were(timestamp: int, caller: int, level: int) -> None:
    (record,) = records_of(PrintkRing(desc_bits=1).add(b"x", timestamp=timestamp, caller=caller, level=level))
    assert (record.timestamp, record.caller_id, record.level) == (timestamp, caller, level)


# --- VMCOREINFO that says less, or nonsense -------------------------------------------------------------------------

NEEDED = sorted(
    {"SYMBOL(prb)", *RING_LAYOUT}
    - {
        "SIZE(printk_ringbuffer)",
        "SIZE(prb_desc_ring)",
        "SIZE(prb_data_ring)",
        "OFFSET(printk_ringbuffer.fail)",
        "OFFSET(printk_info.caller_id)",
        "OFFSET(printk_info.dev_info)",
        "OFFSET(prb_data_ring.head_lpos)",
        "OFFSET(prb_data_ring.tail_lpos)",
        "OFFSET(atomic_long_t.counter)",
    }
)


@pytest.mark.parametrize("key", NEEDED)
def test_without_a_key_that_is_needed_the_log_is_refused_by_its_name(key: str) -> None:
    with (
        pytest.raises(LogUnavailable, match="VMCOREINFO lacks") as refused,
        log_of(PrintkRing().add(b"x").core(drop=[key])),
    ):
        pass
    assert key in str(refused.value)
    assert str(refused.value).isprintable()
    assert refused.value.exit_status == 4


@pytest.mark.parametrize("key", sorted(set(RING_LAYOUT) - set(NEEDED)))
def test_every_other_key_may_be_missing(key: str) -> None:
    ring = filled_ring(20)
    assert decoded(ring.core(drop=[key])) == ring.survivors()


def test_without_the_offset_of_the_caller_nobody_is_named() -> None:
    ring = PrintkRing().add(b"x", caller=CPU | 3)
    with log_of(ring.core(drop=["OFFSET(printk_info.caller_id)"])) as log:
        (record,) = log.records()
    assert record.caller is None
    assert record.caller_id is None
    assert format_record(record, caller=True) == b"[    0.000000] x"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SIZE(prb_desc)", 0),
        ("SIZE(prb_desc)", 23),
        ("SIZE(prb_desc)", 1 << 40),
        ("SIZE(printk_info)", 17),
        ("SIZE(printk_info)", U64),
        ("OFFSET(prb_desc.state_var)", 17),
        ("OFFSET(printk_info.seq)", 1 << 60),
        ("OFFSET(printk_info.text_len)", 87),
        ("OFFSET(printk_ringbuffer.desc_ring)", 1 << 63),
        ("OFFSET(prb_data_ring.data)", U64),
        ("SYMBOL(prb)", "0"),
        ("SYMBOL(prb)", "ffffffffffffffff"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(key: str, value: int | str) -> None:
    ring = PrintkRing().add(b"x")
    with pytest.raises(LogUnavailable) as refused, log_of(core_with(ring, ring.memory(BASE), {key: value})):
        pass
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("offset", [85, 1 << 32, U64])
def test_a_caller_beyond_its_structure_is_not_known_and_the_log_is_read(offset: int) -> None:
    ring = filled_ring(5)
    core = core_with(ring, ring.memory(BASE), {"OFFSET(printk_info.caller_id)": offset})
    assert decoded(core) == ring.survivors()


# --- Damaged rings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 27, 32, 63, 64, 0xFFFF_FFFF])
def test_a_ring_of_absurd_many_records_is_refused(bits: int) -> None:
    ring = PrintkRing().add(b"x")
    with (
        pytest.raises(LogUnavailable, match="damaged"),
        log_of(core_with(ring, patched(ring.memory(BASE), COUNT_BITS, "I", bits))),
    ):
        pass


@pytest.mark.parametrize("bits", [0, 32, 63, 64, 0xFFFF_FFFF])
def test_a_text_ring_of_absurd_size_is_refused(bits: int) -> None:
    ring = PrintkRing().add(b"x")
    with (
        pytest.raises(LogUnavailable, match="damaged"),
        log_of(core_with(ring, patched(ring.memory(BASE), SIZE_BITS, "I", bits))),
    ):
        pass


def test_the_largest_ring_that_log_buf_len_can_ask_for_is_read() -> None:
    """log_buf_len=2G: LOG_BUF_LEN_MAX is 2^31 bytes, and setup_log_buf() makes a descriptor for each 2^5 of them."""
    ring = filled_ring(32)  # ids 0 to 15 are left, which have the same place in a ring of any size
    assert decoded(core_with(ring, patched(ring.memory(BASE), COUNT_BITS, "I", 31 - 5))) == ring.survivors()


def test_a_damaged_tail_is_counted_and_costs_no_record_of_a_full_ring() -> None:
    ring = filled_ring(40)
    with log_of(core_with(ring, patched(ring.memory(BASE), TAIL_ID, "Q", 0x1234_5678_9ABC))) as log:
        assert [(record.sequence, record.text) for record in log.records()] == ring.survivors()
        assert log.statistics.undecodable > 0


@pytest.mark.parametrize("head", [0, 1 << 40, U64, 0xDEAD_BEEF_DEAD_BEEF])
def test_a_damaged_head_gives_no_wrong_record_and_is_counted(head: int) -> None:
    ring = filled_ring(43)
    with log_of(core_with(ring, patched(ring.memory(BASE), HEAD_ID, "Q", head))) as log:
        assert {(record.sequence, record.text) for record in log.records()} <= set(ring.survivors())
        assert log.statistics.undecodable > 0


def test_a_text_that_another_record_lies_over_is_left_out_and_counted() -> None:
    ring = PrintkRing().add(b"first").add(b"second").add(b"third")
    memory = ring.memory(BASE)
    second_id = memory.index(b"second") - 8
    with log_of(core_with(ring, patched(memory, second_id, "Q", 99))) as log:
        assert [record.text for record in log.records()] == [b"first", b"third"]
        assert log.statistics.undecodable == 1


@pytest.mark.parametrize("begin_and_next", [(0, U64 - 7), (0, 8 << 10), (8, 0), (0, 7), (U64, U64 - 1), (16, 16)])
def test_a_text_at_an_impossible_place_is_left_out_and_the_others_are_kept(begin_and_next: tuple[int, int]) -> None:
    ring = filled_ring(16)
    third = DESCS + 2 * DESC_SIZE + RING_LAYOUT["OFFSET(prb_desc.text_blk_lpos)"]
    with log_of(core_with(ring, patched(ring.memory(BASE), third, "QQ", *begin_and_next))) as log:
        found = [(record.sequence, record.text) for record in log.records()]
    assert [entry for entry in found if entry[0] != 2] == [entry for entry in ring.survivors() if entry[0] != 2]


def test_a_text_length_beyond_its_block_is_cut_to_the_block() -> None:
    ring = PrintkRing().add(b"abc").add(b"def")
    infos = DESCS + 16 * DESC_SIZE
    memory = patched(ring.memory(BASE), infos + RING_LAYOUT["OFFSET(printk_info.text_len)"], "H", 0xFFFF)
    first, second = decoded(core_with(ring, memory))
    assert first == (0, b"abc\0\0\0\0\0")  # a block of 16 bytes, 8 of them the id
    assert second == (1, b"def")


def test_descriptors_that_cannot_be_read_cost_their_own_records_only() -> None:
    ring = filled_ring(256, desc_bits=8, text_bits=15)
    infos = DESCS + 256 * DESC_SIZE
    hole = range(PAGE, 2 * PAGE)

    def in_hole(at: int, size: int) -> bool:
        return at < hole.stop and at + size > hole.start

    # The first id is a multiple of 256: record N has descriptor and info N.
    lost = {
        n for n in range(256) if in_hole(DESCS + n * DESC_SIZE, DESC_SIZE) or in_hole(infos + n * INFO_SIZE, INFO_SIZE)
    }
    assert 0 < len(lost) < 256
    with log_of(core_with(ring, ring.memory(BASE), hole=1)) as log:
        found = [(record.sequence, record.text) for record in log.records()]
    assert found == [entry for entry in ring.survivors() if entry[0] not in lost]
    assert log.statistics.undecodable == len(lost)


def test_texts_that_cannot_be_read_cost_their_own_records_only() -> None:
    ring = PrintkRing(desc_bits=9, text_bits=15)
    for number in range(400):
        ring.add(b"%047d" % number)  # blocks of 56 bytes, the first at the start of the text
    memory = ring.memory(BASE)
    text = memory.index(b"%047d" % 0) - 8
    hole = text // PAGE + 2
    lost = {n for n in range(400) if text + n * 56 < (hole + 1) * PAGE and text + n * 56 + 8 + 47 > hole * PAGE}
    with log_of(core_with(ring, memory, hole=hole)) as log:
        found = [record.sequence for record in log.records()]
    assert found == [number for number in range(400) if number not in lost]
    assert log.statistics.undecodable == len(lost) > 70


@pytest.mark.parametrize("pointer", [DESCS_POINTER, INFOS_POINTER, TEXT_POINTER])
@pytest.mark.parametrize("value", [0, 0x1000, DIRECT_MAP, U64, U64 - 4095])
def test_a_pointer_to_nowhere_gives_an_empty_log_and_a_count(pointer: int, value: int) -> None:
    ring = filled_ring(16)
    with log_of(core_with(ring, patched(ring.memory(BASE), pointer, "Q", value))) as log:
        assert list(log.records()) == []
        assert log.statistics.undecodable >= 16


def test_a_ring_of_which_memory_has_next_to_nothing_is_given_up_in_bounded_time() -> None:
    """Half a million descriptors are announced, a page of them is there; nobody must wait for the others."""
    ring = filled_ring(40)
    count_bits = 19
    memory = patched(ring.memory(BASE), COUNT_BITS, "I", count_bits)
    memory = patched(patched(memory, HEAD_ID, "Q", (1 << count_bits) - 1), TAIL_ID, "Q", 0)
    started = time.process_time()
    with log_of(core_with(ring, memory)) as log:
        for _ in log.records():
            pass
    assert log.statistics.undecodable > 0
    assert time.process_time() - started < 2


def test_memory_does_not_grow_with_the_ring() -> None:
    ring = PrintkRing(desc_bits=13, text_bits=20)
    for number in range(1 << 13):
        ring.add(b"%0100d" % number)
    core = ring.core()
    with log_of(core) as log:
        tracemalloc.start()
        count = sum(1 for _ in log.records())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert count == len(ring.survivors()) > 8000
    assert peak < 1 << 20


# --- Lines ----------------------------------------------------------------------------------------------------------


def record(text: bytes, timestamp: int = 0, caller_id: int | None = None) -> Record:
    return Record(0, timestamp, text, caller_id, 0, 6, False)


@pytest.mark.parametrize(
    ("given_record", "line"),
    [
        pytest.param(record(b"Linux version"), b"[    0.000000] Linux version", id="the first line"),
        pytest.param(record(b"x", 1_234_567_999), b"[    1.234567] x", id="nanoseconds are cut"),
        pytest.param(record(b"x", 99_999_999_999_999), b"[99999.999999] x", id="a day"),
        pytest.param(record(b"x", 1_234_567_000_000_000), b"[1234567.000000] x", id="two weeks"),
        pytest.param(record(b""), b"[    0.000000] ", id="an empty line"),
        pytest.param(record(b"a\nb\n\nc"), b"\n               ".join([b"[    0.000000] a", b"b", b"", b"c"]),
                     id="further lines stand under the first"),
        pytest.param(record(b"\x1b[2J\r\0\x7f\x80\xff"), rb"[    0.000000] \x1b[2J\x0d\x00\x7f\x80\xff",
                     id="a terminal is told nothing"),
        pytest.param(record("ü".encode()), rb"[    0.000000] \xc3\xbc", id="beyond ASCII"),
        pytest.param(record(b"a\tb\\"), b"[    0.000000] a\tb\\", id="tabs stay"),
    ],
)  # fmt: skip
def test_a_line_is_as_dmesg_prints_it(given_record: Record, line: bytes) -> None:
    assert format_record(given_record) == line


@pytest.mark.parametrize(
    ("caller_id", "prefix"),
    [
        (0, b"[    0.000000] [    T0] "),
        (12345, b"[    0.000000] [T12345] "),
        (4194304, b"[    0.000000] [T4194304] "),
        (CPU, b"[    0.000000] [    C0] "),
        (CPU | 511, b"[    0.000000] [  C511] "),
    ],
)
def test_callers_stand_behind_the_time_when_asked_for(caller_id: int, prefix: bytes) -> None:
    assert format_record(record(b"x\ny", 0, caller_id), caller=True) == prefix + b"x\n" + b" " * len(prefix) + b"y"
    assert format_record(record(b"x", 0, caller_id)) == b"[    0.000000] x"


@given(st.binary(), st.integers(0, U64), st.one_of(st.none(), st.integers(0, 0xFFFF_FFFF)), st.booleans())
def test_whatever_a_record_holds_its_lines_are_printable_ascii(
    text: bytes, timestamp: int, caller_id: int | None, caller: bool
) -> None:
    lines = format_record(record(text, timestamp, caller_id), caller=caller).split(b"\n")
    assert len(lines) == text.count(b"\n") + 1
    assert all(0x20 <= code < 0x7F or code == 0x09 for line in lines for code in line)


# --- Real kernels ---------------------------------------------------------------------------------------------------


def test_the_log_of_a_real_vmcore_is_what_makedumpfile_extracts(corpus_vmcore: Path, tmp_path: Path) -> None:
    program = shutil.which("makedumpfile", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if program is None:
        pytest.skip("makedumpfile is not installed; as root: apt-get install makedumpfile")
    theirs = tmp_path / "dmesg"
    done = subprocess.run(
        [program, "--dump-dmesg", str(corpus_vmcore), str(theirs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with open_vmcore(str(corpus_vmcore)) as vmcore:
        ours = b"".join(log_lines(open_log(vmcore).records()))
    assert ours.splitlines() == theirs.read_bytes().splitlines()
    assert ours == theirs.read_bytes()


@pytest.mark.parametrize(("name", "release"), [("linux-6.1-la57", b"6.1.0-56"), ("linux-6.12", b"6.12.117+deb12")])
def test_a_real_log_is_whole(name: str, release: bytes, corpus_file: Callable[[str], Path]) -> None:
    with open_vmcore(str(corpus_file(name))) as vmcore:
        log = open_log(vmcore)
        records = list(log.records())
    assert records[0].text.startswith(b"Linux version " + release)
    assert [found.sequence for found in records] == list(range(len(records)))
    assert records[0].timestamp == 0 < records[-1].timestamp < 60 * 10**9
    assert log.statistics.undecodable == 0
    assert all(found.level in range(8) and found.facility == 0 for found in records if found.caller_id != 1)


def test_a_real_vmcore_cut_short_still_gives_what_is_there_or_says_why_not(
    corpus_file: Callable[[str], Path], tmp_path: Path
) -> None:
    whole = corpus_file("linux-6.1-la57")
    with open_vmcore(str(whole)) as vmcore:
        everything = {(found.sequence, found.text) for found in open_log(vmcore).records()}
    cut = tmp_path / "cut"
    shutil.copyfile(whole, cut)
    for part in range(7, 0, -1):
        os.truncate(cut, whole.stat().st_size * part // 8)
        with open_vmcore(str(cut)) as vmcore:
            try:
                found = {(entry.sequence, entry.text) for entry in open_log(vmcore).records()}
            except LogUnavailable:
                continue
        assert found <= everything


def test_the_builder_lays_a_descriptor_out_as_the_kernel_does() -> None:
    """The offsets that these tests patch are where the builder puts things."""
    memory = PrintkRing().add(b"x").memory(BASE)
    assert struct.unpack_from("<I", memory, COUNT_BITS)[0] == 4
    assert struct.unpack_from("<I", memory, SIZE_BITS)[0] == 10
    assert struct.unpack_from("<Q", memory, DESCS_POINTER)[0] == DIRECT_MAP + BASE + DESCS
    assert struct.unpack_from("<Q", memory, HEAD_ID)[0] == (1 << 62) - 16
