"""A short run of the fuzzer, the same inputs each time; and that the fuzzer would notice."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture.errors import SourceError
from tests.builders import patched
from tests.dumps import SUB_HDR_SIZE
from tests.faults import raising
from tests.fuzz import run
from tests.fuzz.targets import MAX_BYTES, TARGETS, FindingError, Seed, Target, check, inputs, kdump_seeds, mutated

INPUTS = 40
"""Of each target; `make fuzz` takes as many as its time allows."""

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


# --- Whatever comes, it is a CaptureError in one line, in bounded memory and time -----------------------------------


@every_target
def test_mutated_inputs_are_read_or_refused(target: Target, tmp_path: Path) -> None:
    for number, data in enumerate(itertools.islice(inputs(target, "tests"), INPUTS + len(target.seeds()))):
        try:
            check(target, data, tmp_path / "input")
        except FindingError as finding:
            kept = tmp_path / f"{target.name}-{number}"
            kept.write_bytes(data)
            pytest.fail(f"{finding}; python -m tests.fuzz.run --target {target.name} --replay {kept}")


@every_target
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_behind_any_beginning_are_read_or_refused(
    target: Target, data: st.DataObject, tmp_path: Path
) -> None:
    seed = data.draw(st.sampled_from(target.seeds()))
    begin = data.draw(st.integers(0, len(seed.data)))
    check(target, seed.data[:begin] + data.draw(st.binary(max_size=300)), tmp_path / "input")


@every_target
def test_the_seeds_are_sound(target: Target, tmp_path: Path) -> None:
    for seed in target.seeds():
        (tmp_path / "input").write_bytes(seed.data)
        if target.name != "vmcoreinfo":
            try:
                target.run(tmp_path / "input")
            except SourceError as error:
                pytest.fail(f"a seed is refused: {error}")
        assert all(offset + width <= len(seed.data) for offset, width in seed.fields)


# --- What fuzzing found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [-1, -2, -3, -100, -(1 << 31)])
def test_a_dump_whose_sub_header_is_of_negative_size_is_refused(blocks: int, tmp_path: Path) -> None:
    for seed in kdump_seeds():
        (tmp_path / "input").write_bytes(patched(seed.data, SUB_HDR_SIZE, "i", blocks))
        with pytest.raises(SourceError):
            TARGETS["kdump"].run(tmp_path / "input")


@pytest.mark.parametrize("size", [1 << 28, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 3])
def test_a_zstd_frame_that_announces_absurd_content_costs_its_page_only(size: int, tmp_path: Path) -> None:
    (seed,) = [seed for seed in kdump_seeds() if seed.fields[-1][0] > len(seed.data) - 100]
    check(TARGETS["kdump"], patched(seed.data, seed.fields[-1][0], "Q", size), tmp_path / "input")
    (bad,) = TARGETS["kdump"].run(tmp_path / "input")
    assert bad.startswith("zstd")


def test_a_dump_that_is_refused_is_closed(tmp_path: Path) -> None:
    check(TARGETS["kdump"], b"KDUMP   " + bytes(10_000), tmp_path / "input")


# --- The fuzzer itself ----------------------------------------------------------------------------------------------


def target_that(run_it: Callable[[Path], Sequence[str]]) -> Target:
    return Target("pretended", run_it, lambda: [Seed(b"seed")])


def _hungry(_path: Path) -> Sequence[str]:
    return [str(len(bytearray(MAX_BYTES + 1)))]


def _hungry_with_numpy(_path: Path) -> Sequence[str]:
    return [str(len(np.zeros(MAX_BYTES + 1, dtype=np.uint8)))]


def _leaky(path: Path) -> Sequence[str]:
    return [str(os.open(path, os.O_RDONLY))]


def _endless(_path: Path) -> Sequence[str]:
    while True:
        with contextlib.suppress(Exception):  # a parser that swallows every error
            time.process_time()


@pytest.mark.parametrize(
    "run_it",
    [
        pytest.param(raising(ValueError("not ours")), id="an exception"),
        pytest.param(raising(OSError(22, "Invalid argument")), id="an OSError"),
        pytest.param(raising(MemoryError()), id="no memory"),
        pytest.param(raising(RecursionError()), id="no stack"),
        pytest.param(raising(SystemExit(2)), id="the end of the process"),
        pytest.param(raising(SourceError("two\nlines")), id="a message of two lines"),
        pytest.param(raising(SourceError("\x1b[2J")), id="a message that clears the screen"),
        pytest.param(lambda _: ["fine", "not\rfine"], id="a line with a control character"),
        pytest.param(_hungry, id="much memory"),
        pytest.param(_hungry_with_numpy, id="much memory of NumPy"),
        pytest.param(_leaky, id="an open file"),
        pytest.param(_endless, id="no end"),
    ],
)
def test_the_fuzzer_notices(run_it: Callable[[Path], Sequence[str]], tmp_path: Path) -> None:
    with pytest.raises(FindingError) as finding:
        check(target_that(run_it), b"input", tmp_path / "input")
    assert str(finding.value).isprintable()


def test_a_refusal_in_one_line_is_no_finding(tmp_path: Path) -> None:
    check(target_that(raising(SourceError("refused"))), b"input", tmp_path / "input")
    check(target_that(lambda path: [path.read_bytes().decode()]), b"input", tmp_path / "input")


@every_target
def test_the_same_seed_gives_the_same_inputs(target: Target) -> None:
    count = len(target.seeds()) + 30
    first, again, other = (list(itertools.islice(inputs(target, seed), count)) for seed in ("a", "a", "b"))
    assert first == again != other
    assert len(set(first)) > 20


def test_mutations_reach_the_integers_that_steer() -> None:
    rng = random.Random(1)
    seed = Seed(bytes(64), ((8, 4), (16, 8)))
    found = {struct.unpack_from("<I", mutated(seed, [seed], rng).ljust(64, b"\0"), 8)[0] for _ in range(500)}
    assert {1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF} <= found


def test_a_run_counts_its_inputs_and_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = run.main(["--seconds", "0.3", "--seed", "s", "--target", "vmcoreinfo", "--keep", str(tmp_path / "kept")])
    out = capsys.readouterr().out
    assert status == 0
    assert "seed s" in out
    assert "vmcoreinfo" in out
    assert "nothing broke" in out
    assert not (tmp_path / "kept").exists()


def test_a_run_keeps_what_breaks_and_says_how_to_repeat_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = target_that(raising(ValueError("not ours")))
    assert run.fuzz([broken, TARGETS["vmcoreinfo"]], 0.3, "s", tmp_path) == 1
    out = capsys.readouterr().out
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == b"seed"
    assert "ValueError: not ours" in out
    assert "seed s" in out
    assert f"--target pretended --replay {kept}" in out
    with pytest.raises(FindingError):
        run.replay(broken, kept)


def test_an_input_can_be_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").write_bytes(b"OSRELEASE=6.1\n")
    assert run.main(["--target", "vmcoreinfo", "--replay", str(tmp_path / "kept")]) == 0
    assert "breaks nothing" in capsys.readouterr().out
