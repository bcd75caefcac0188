"""printk ring buffer → log records and lines (the lockless ring of 5.10 and later).

Three arrays (kernel/printk/printk_ringbuffer.h): descriptors, their infos, and a text ring. Ids run from tail_id to
head_id and wrap at 62 bits; the two bits above are the state. A text block begins with the id of its record (one
``unsigned long``), the text follows. A block that would run over the end of the ring lies whole at its start
instead. It does so iff ``begin`` and ``next - 1`` lie in different turns of the ring (is_blk_wrapped,
printk_ringbuffer.c): right both for kernels that never let a block end exactly at the end of the ring, and for those
since late 2025 that do (commit 67e1b0052f6b).

Every layout key comes from VMCOREINFO. A record that cannot be decoded is skipped and counted; memory does not grow
with the ring.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from capture.errors import SourceError
from capture.kernel.address import KernelMemory
from capture.memory.image import UnreadableMemory
from capture.notes.vmcoreinfo import VmcoreInfo

DESC_ID_MASK = (1 << 62) - 1
STATE_SHIFT = 62
STATE_COMMITTED, STATE_FINALIZED = 1, 2
"""enum desc_state, kernel/printk/printk_ringbuffer.h."""
CALLER_CPU = 0x8000_0000
"""printk_caller_id(): this bit set means a CPU number, clear a task's PID."""
LOG_CONT = 8
"""enum printk_info_flags, kernel/printk/printk_ringbuffer.h."""

EMPTY_LINE_LPOS = 3
"""A record without text that is an empty line; other odd positions mean that its text did not fit the ring."""
_DATALESS = 1
_MAX_SIZE_BITS = 31
"""LOG_BUF_LEN_MAX is 2 GiB (kernel/printk/printk.c)."""
_MAX_COUNT_BITS = 26
"""setup_log_buf() makes a descriptor for each 32 bytes (PRB_AVGBITS) of it."""
_BATCH = 512
"""Descriptors and infos read at once."""
_MAX_PROBES = 4096
"""Failed reads after which an unreadable batch is given up whole: a damaged ring may announce millions of records."""


class Record(NamedTuple):
    """One record of the log. ``timestamp`` in nanoseconds; ``text`` is as the kernel stored it, bytes and newlines."""

    sequence: int
    timestamp: int
    text: bytes
    caller_id: int | None
    facility: int | None
    level: int | None
    continuation: bool

    @property
    def caller(self) -> str | None:
        """``T<pid>`` or ``C<cpu>``, as CONFIG_PRINTK_CALLER prints it."""
        if self.caller_id is None:
            return None
        return f"C{self.caller_id & ~CALLER_CPU}" if self.caller_id & CALLER_CPU else f"T{self.caller_id}"


@dataclass(slots=True)
class LogStatistics:
    """What became of the descriptors between tail and head."""

    records: int = 0
    dataless: int = 0
    undecodable: int = 0


class LogUnavailable(SourceError):  # noqa: N818
    """The log cannot be found at all; the message says what is missing."""


class _Layout(NamedTuple):
    """Addresses, sizes and offsets in bytes of one ring."""

    records: int
    descs: int
    infos: int
    desc_size: int
    info_size: int
    state_var: int
    begin: int
    next: int
    seq: int
    ts_nsec: int
    text_len: int
    caller_id: int | None
    tail_id: int
    head_id: int
    text_size: int
    text_data: int


@dataclass(slots=True)
class PrintkLog:
    """The ring at SYMBOL(prb). Iterate ``records()`` once or more; ``statistics`` describes the last iteration.

    Raises:
        LogUnavailable: from the constructor, when VMCOREINFO lacks a key or the ring itself cannot be read.
    """

    memory: KernelMemory
    info: VmcoreInfo
    statistics: LogStatistics = field(default_factory=LogStatistics)
    _layout: _Layout = field(init=False)
    _probes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._layout = _read_layout(self.memory, self.info)

    def records(self) -> Iterator[Record]:
        """Yield the records that are committed or finalized, oldest first."""
        self.statistics = LogStatistics()
        self._probes = 0
        layout = self._layout
        remaining = ((layout.head_id - layout.tail_id) & DESC_ID_MASK) + 1
        if remaining > layout.records:  # damaged ids: what can be there is one turn of the ring, up to head
            self.statistics.undecodable += 1
            remaining = layout.records
        first = (layout.head_id - remaining + 1) & DESC_ID_MASK
        while remaining:
            index = first % layout.records
            batch = min(remaining, layout.records - index, _BATCH)
            yield from self._batch(first, index, batch)
            first = (first + batch) & DESC_ID_MASK
            remaining -= batch

    def _batch(self, first: int, index: int, batch: int) -> Iterator[Record]:
        layout = self._layout
        try:
            descs = self.memory.read(layout.descs + index * layout.desc_size, batch * layout.desc_size)
            infos = self.memory.read(layout.infos + index * layout.info_size, batch * layout.info_size)
        except UnreadableMemory:
            self._probes += 1
            if batch == 1 or self._probes > _MAX_PROBES:
                self.statistics.undecodable += batch
                return
            half = batch // 2
            yield from self._batch(first, index, half)
            yield from self._batch((first + half) & DESC_ID_MASK, index + half, batch - half)
            return
        for number in range(batch):
            record = self._record(
                (first + number) & DESC_ID_MASK,
                descs[number * layout.desc_size : (number + 1) * layout.desc_size],
                infos[number * layout.info_size : (number + 1) * layout.info_size],
            )
            if record is not None:
                yield record

    def _record(self, ident: int, desc: bytes, info: bytes) -> Record | None:
        layout = self._layout
        state_var, begin, following = (_u64(desc, at) for at in (layout.state_var, layout.begin, layout.next))
        if state_var & DESC_ID_MASK != ident or state_var >> STATE_SHIFT not in (STATE_COMMITTED, STATE_FINALIZED):
            # Reserved but never committed, or reused: there is no record to have. That is not damage.
            return None
        if begin == following == EMPTY_LINE_LPOS:
            text: bytes | None = b""
        elif begin & _DATALESS and following & _DATALESS:
            self.statistics.dataless += 1
            return None
        else:
            text = self._text(ident, begin, following, struct.unpack_from("<H", info, layout.text_len)[0])
        if text is None:
            self.statistics.undecodable += 1
            return None
        self.statistics.records += 1
        caller = struct.unpack_from("<I", info, layout.caller_id)[0] if layout.caller_id is not None else None
        facility = level = None
        continuation = False
        if layout.text_len + 4 <= len(info):
            # u8 facility, then flags:5 and level:3 follow text_len in struct printk_info; no key exports them.
            facility, bits = info[layout.text_len + 2], info[layout.text_len + 3]
            level, continuation = bits >> 5, bool(bits & LOG_CONT)
        return Record(_u64(info, layout.seq), _u64(info, layout.ts_nsec), text, caller, facility, level, continuation)

    def _text(self, ident: int, begin: int, following: int, text_len: int) -> bytes | None:
        size = self._layout.text_size
        id_bytes = 8  # struct prb_data_block starts with unsigned long id
        start, length = begin % size, (following - begin) % (1 << 64)  # positions start just below 2^64 and wrap
        if start + length > size:
            start, length = 0, following % size  # wrapped: the whole block is at the start of the ring
        if not id_bytes <= length <= size:
            return None
        try:
            block = self.memory.read(self._layout.text_data + start, id_bytes + min(text_len, length - id_bytes))
        except UnreadableMemory:
            return None
        if _u64(block, 0) != ident:  # another record's text lies here by now
            return None
        return block[id_bytes:]


def format_record(record: Record, *, caller: bool = False) -> bytes:
    """Return the record as ``[seconds.microseconds] text``, one line or several, without the last newline.

    Further lines of a record are indented under the first. Control characters are written as ``\\xNN``: the text
    comes from a dead kernel and ends up on a terminal.
    """
    seconds, rest = divmod(record.timestamp, 1_000_000_000)
    prefix = b"[%5d.%06d] " % (seconds, rest // 1000)
    if caller and record.caller is not None:
        prefix += f"[{record.caller:>6}] ".encode()
    lines = [b"".join(map(_PRINTABLE.__getitem__, line)) for line in record.text.split(b"\n")]
    return prefix + (b"\n" + b" " * len(prefix)).join(lines)


_PRINTABLE = [bytes([code]) if 0x20 <= code < 0x7F or code == 0x09 else b"\\x%02x" % code for code in range(256)]


def _u64(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")


def _read_layout(memory: KernelMemory, info: VmcoreInfo) -> _Layout:
    missing: list[str] = []

    def need(kind: str, value: int | None) -> int:
        if value is None:
            missing.append(kind)
            return 0
        return value

    def offset(name: str) -> int:
        return need(f"OFFSET({name})", info.offset(name))

    def size(name: str) -> int:
        return need(f"SIZE({name})", info.size(name))

    prb = need("SYMBOL(prb)", info.symbol("prb"))
    desc_ring = offset("printk_ringbuffer.desc_ring")
    text_ring = offset("printk_ringbuffer.text_data_ring")
    lpos = offset("prb_desc.text_blk_lpos")
    counter = info.offset("atomic_long_t.counter") or 0
    where = {
        "count_bits": (desc_ring + offset("prb_desc_ring.count_bits"), 4),
        "descs": (desc_ring + offset("prb_desc_ring.descs"), 8),
        "infos": (desc_ring + offset("prb_desc_ring.infos"), 8),
        "head_id": (desc_ring + offset("prb_desc_ring.head_id") + counter, 8),
        "tail_id": (desc_ring + offset("prb_desc_ring.tail_id") + counter, 8),
        "size_bits": (text_ring + offset("prb_data_ring.size_bits"), 4),
        "data": (text_ring + offset("prb_data_ring.data"), 8),
    }
    desc_size, info_size = size("prb_desc"), size("printk_info")
    inside = {
        "state_var": (offset("prb_desc.state_var") + counter, 8, desc_size),
        "begin": (lpos + offset("prb_data_blk_lpos.begin"), 8, desc_size),
        "next": (lpos + offset("prb_data_blk_lpos.next"), 8, desc_size),
        "seq": (offset("printk_info.seq"), 8, info_size),
        "ts_nsec": (offset("printk_info.ts_nsec"), 8, info_size),
        "text_len": (offset("printk_info.text_len"), 2, info_size),
    }
    if missing:
        raise LogUnavailable(
            f"VMCOREINFO lacks {', '.join(missing[:3])}: no lockless printk ring (5.10 or later) known"
        )
    for name, (at, width, room) in inside.items():
        if at + width > room or room > 4096:
            raise LogUnavailable(f"VMCOREINFO's offset {at} of {name} does not fit a structure of {room} bytes")
    caller_id = info.offset("printk_info.caller_id")
    if caller_id is not None and caller_id + 4 > info_size:
        caller_id = None
    try:
        ring = memory.read_unsigned(prb, 8)  # the symbol is a pointer to the ring in use
        found = {name: memory.read_unsigned(ring + at, width) for name, (at, width) in where.items()}
    except UnreadableMemory as error:
        raise LogUnavailable(f"the printk ring (SYMBOL(prb) {prb:#x}) cannot be read: {error}") from None
    count_bits, size_bits = found.pop("count_bits"), found.pop("size_bits")
    if not 1 <= count_bits <= _MAX_COUNT_BITS or not 4 <= size_bits <= _MAX_SIZE_BITS:
        raise LogUnavailable(f"the printk ring at {ring:#x} is damaged: 2^{count_bits} records, 2^{size_bits} bytes")
    return _Layout(
        records=1 << count_bits,
        descs=found["descs"],
        infos=found["infos"],
        desc_size=desc_size,
        info_size=info_size,
        caller_id=caller_id,
        tail_id=found["tail_id"] & DESC_ID_MASK,
        head_id=found["head_id"] & DESC_ID_MASK,
        text_size=1 << size_bits,
        text_data=found["data"],
        **{name: at for name, (at, _, _) in inside.items()},
    )
