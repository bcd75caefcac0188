"""The kept corpus: for each target the few inputs that reach all that the long runs have reached.

A file a target in tests/fuzz/corpus: inputs one behind the other, compressed with zstd. Inputs are much alike, so that
a hundred of them take a few KiB. ``make test`` runs them all again; a run of the fuzzer mutates them further.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zstandard
from numpy.typing import NDArray

from tests.fuzz.bounds import Target
from tests.fuzz.mutation import Seed

FOLDER = Path(__file__).with_name("corpus")
_HEAD = struct.Struct("<II")
"""Before each input: the number of the seed that it was made of, and its length in bytes."""
_MOST = 64 << 20
_LEVEL = 19


def load(target: Target, folder: Path = FOLDER) -> list[Seed]:
    """Return the kept inputs of a target, none where there is no file.

    An input has the fields of the seed that it was made of.
    """
    file = _file(target, folder)
    if not file.exists():
        return []
    data = zstandard.ZstdDecompressor().decompress(file.read_bytes(), max_output_size=_MOST)
    seeds = target.seeds()
    found = []
    position = 0
    while position < len(data):
        origin, length = _HEAD.unpack_from(data, position)
        position += _HEAD.size
        fields = seeds[origin].fields if origin < len(seeds) else ()
        found.append(Seed(data[position : position + length], fields, origin))
        position += length
    return found


def save(target: Target, inputs: Sequence[Seed], folder: Path = FOLDER, *, level: int = _LEVEL) -> int:
    """Write the inputs of a target, those that are alike side by side; return the size of the file in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    ordered = sorted(inputs, key=lambda entry: (entry.origin, len(entry.data)))
    data = b"".join(_HEAD.pack(entry.origin, len(entry.data)) + entry.data for entry in ordered)
    parameters = zstandard.ZstdCompressionParameters.from_level(level, window_log=24, enable_ldm=True)
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(data)
    _file(target, folder).write_bytes(packed)
    return len(packed)


def fewest(
    inputs: Sequence[tuple[Seed, NDArray[np.bool_]]], covered: NDArray[np.bool_]
) -> tuple[list[Seed], NDArray[np.bool_]]:
    """Return inputs that together reach all that ``inputs`` reach beyond what is ``covered``, and all that is then.

    It is the greedy choice; of two that reach as much, the shorter one.
    """
    left = sorted(inputs, key=lambda pair: len(pair[0].data))
    covered = covered.copy()
    chosen: list[Seed] = []
    while left:
        gains = [int(np.count_nonzero(reached & ~covered)) for _, reached in left]
        best = max(range(len(left)), key=gains.__getitem__)
        if not gains[best]:
            break
        seed, reached = left.pop(best)
        covered |= reached
        chosen.append(seed)
    return chosen, covered


def _file(target: Target, folder: Path) -> Path:
    return folder / f"{target.name.replace(' ', '-')}.zst"
