"""How inputs are made of seeds, and of what earlier inputs reached: fields of a structure, numbers of a text, bytes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tests.builders import DIRECT_MAP, PAGE

Field = tuple[int, int]
"""Offset and width in bytes of an integer that steers a parser."""


@dataclass(frozen=True, slots=True)
class Seed:
    """An input and where the integers in it are. ``origin`` is the number of the seed that it was made of."""

    data: bytes
    fields: tuple[Field, ...] = ()
    origin: int = 0


_EXTREMES = (
    0, 1, 2, 3, 7, 8, 63, 64, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 4095, 4096, 4097, 1 << 20, (1 << 31) - 1,
    1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, (1 << 52) - 1, 1 << 52, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE,
    (1 << 64) - 1, DIRECT_MAP,
)  # fmt: skip
_TEXT_LINE = re.compile(rb"(?<![A-Z])[A-Z]{1,16}(?:\([^()=\n]{0,80}\))?=[^\n]*")
_TEXT_NUMBER = re.compile(rb"(?<==)-?(?:0x)?[0-9a-f]+(?=\n)")
MAX_INPUT = 1 << 20


_TEXT_BYTES = 1 << 14
"""Where a VMCOREINFO text is looked for: from the first note of that name on."""


def mutated(seed: Seed, others: Sequence[Seed], rng: random.Random) -> bytes:
    """Return ``seed`` damaged in one to five ways."""
    data = bytearray(seed.data)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        rng.choice(_MUTATIONS)(data, seed, others, rng)
    del data[MAX_INPUT:]
    return bytes(data)


def _flip_bits(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    for _ in range(rng.randint(1, 16)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _extreme_field(data: bytearray, seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        if seed.fields:
            _put(data, *rng.choice(seed.fields), _extreme(len(data), rng))


def _extreme_anywhere(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    width = rng.choice((1, 2, 4, 8))
    _put(data, rng.randrange(len(data) + 1) // width * width, width, _extreme(len(data), rng))


def _swap_fields(data: bytearray, seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    if seed.fields:
        (one, width), (other, other_width) = rng.choice(seed.fields), rng.choice(seed.fields)
        value = bytes(data[one : one + width])
        _put(data, one, width, int.from_bytes(data[other : other + other_width], "little"))
        _put(data, other, other_width, int.from_bytes(value, "little"))


def _extreme_text(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    """Replace a number of VMCOREINFO by another text of the same length where there is room, else move the rest."""
    found = list(_TEXT_NUMBER.finditer(data, *_text(data)))
    if found:
        match = rng.choice(found)
        value = _extreme(len(data), rng)
        text = rng.choice((b"%d" % value, b"%x" % value, b"-%d" % value, b"", b"9" * 30, b"\x1b[2J", b"\xff\n"))
        end = match.end()
        if rng.random() < 0.8:  # the note's size stays right
            text = text[: end - match.start()].rjust(end - match.start(), b"0")
        data[match.start() : end] = text


def _hide_key(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    """Take keys out of VMCOREINFO, the size of the text unchanged."""
    found = list(_TEXT_LINE.finditer(data, *_text(data)))
    for match in rng.sample(found, min(len(found), rng.choice((1, 1, 2, 8)))):
        data[match.start()] = ord("#")


def _lend_line(data: bytearray, _seed: Seed, others: Sequence[Seed], rng: random.Random) -> None:
    """Put a line of another text over one of this, the size of the text unchanged."""
    other = rng.choice(others).data
    found = list(_TEXT_LINE.finditer(data, *_text(data)))
    lent = list(_TEXT_LINE.finditer(other, *_text(other)))
    if found and lent:
        match = rng.choice(found)
        length = match.end() - match.start()
        data[match.start() : match.end()] = rng.choice(lent)[0][:length].ljust(length, b"\n")


def _text(data: bytes | bytearray) -> tuple[int, int]:
    """Return where there may be a text: behind the name of its note, else at the beginning; it has no zeros."""
    start = max(0, data.find(b"VMCOREINFO\0"))
    end = data.find(bytes(4), start)
    return start, min(start + _TEXT_BYTES, end if end >= 0 else len(data))


def _cut(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _lengthen(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    data += rng.choice((bytes(PAGE), b"\xff" * 100, rng.randbytes(64), bytes(data[:PAGE])))


def _splice(data: bytearray, _seed: Seed, others: Sequence[Seed], rng: random.Random) -> None:
    other = rng.choice(others).data
    if other:
        start = rng.randrange(len(other))
        piece = other[start : start + rng.choice((8, 64, 512, PAGE))]
        at = rng.randrange(len(data) + 1)
        data[at : at + len(piece) if rng.random() < 0.8 else at] = piece


def _remove(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 4, 8, 56, 100))]


def _fill(data: bytearray, _seed: Seed, _others: Sequence[Seed], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    length = min(rng.choice((8, 64, 512, PAGE)), len(data) - at)
    data[at : at + length] = bytes([rng.choice((0, 0xFF, 0x41))]) * length


_MUTATIONS = (
    _flip_bits, _extreme_field, _extreme_field, _extreme_field, _extreme_anywhere, _swap_fields, _extreme_text,
    _extreme_text, _hide_key, _lend_line, _cut, _lengthen, _splice, _remove, _fill,
)  # fmt: skip


def _extreme(size: int, rng: random.Random) -> int:
    if rng.random() < 0.2:
        return 1 << rng.randrange(64)
    return rng.choice((*_EXTREMES, size, size - 1, size + 1, size // 2, -size, rng.getrandbits(64)))


def _put(data: bytearray, offset: int, width: int, value: int) -> None:
    data[offset : offset + width] = (value % (1 << 8 * width)).to_bytes(width, "little")


def numbered(seeds: Sequence[Seed]) -> list[Seed]:
    """Return seeds that know which they are: what is made of them will, too."""
    return [replace(seed, origin=number) for number, seed in enumerate(seeds)]


class Inputs(Iterator[Seed]):
    """Inputs without end, the same ones for the same ``name``: first ``seeds`` as they are, then mutations.

    What is given to ``keep`` is mutated further: the newest of it more often, for it is what led to something new, and
    what takes long less often.
    """

    def __init__(self, seeds: Sequence[Seed], name: str) -> None:
        self._pool = list(seeds)
        self._seconds = [0.0] * len(seeds)
        self._seeds = len(seeds)
        self._given = 0
        self._rng = random.Random(name)
        self._bytes = sum(len(seed.data) for seed in seeds)

    def __next__(self) -> Seed:
        self._given += 1
        if self._given <= self._seeds:
            return self._pool[self._given - 1]
        one, other = self._candidate(), self._candidate()
        chosen = self._pool[one if self._seconds[one] <= self._seconds[other] else other]
        return Seed(mutated(chosen, self._pool, self._rng), chosen.fields, chosen.origin)

    def _candidate(self) -> int:
        count, rng = len(self._pool), self._rng
        return count - rng.randint(1, min(count, _NEWEST)) if rng.random() < 0.3 else rng.randrange(count)

    def took(self, seconds: float) -> bool:
        """Tell what the input before took, in seconds of processor time; return whether that is long for its kind."""
        if self._given <= self._seeds:
            self._seconds[self._given - 1] = seconds
        usual = sum(self._seconds[: self._seeds]) / self._seeds
        return seconds > max(_SHORT, _LONG * usual)

    def keep(self, entry: Seed, seconds: float = 0.0) -> None:
        """Mutate ``entry``, which took so long, too; of too many bytes, one that was kept before goes."""
        self._pool.append(entry)
        self._seconds.append(seconds)
        self._bytes += len(entry.data)
        while self._bytes > _POOL_BYTES and len(self._pool) > self._seeds + 1:
            one = self._rng.randrange(self._seeds, len(self._pool) - 1)
            self._bytes -= len(self._pool.pop(one).data)
            del self._seconds[one]


_NEWEST = 16
_POOL_BYTES = 32 << 20
_SHORT, _LONG = 0.003, 3
"""Seconds that are never long; and how many times as long as its seeds take an input may take."""
