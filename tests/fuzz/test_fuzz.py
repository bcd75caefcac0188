"""A short run of the fuzzer, the same inputs each time; what long runs have kept; and that the fuzzer would notice."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import random
import re
import resource
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from capture.errors import SourceError
from capture.kernel.pages import CLASS_NAMES
from capture.kernel.protect import KINDS
from capture.pagefilter import PageFilter
from capture.report import find_panic
from capture.vmcore import open_vmcore
from tests.builders import patched
from tests.dumps import SUB_HDR_SIZE
from tests.faults import raising
from tests.fuzz import corpus, run
from tests.fuzz.bounds import MAX_ADDRESS_SPACE, MAX_BYTES, FindingError, Target, check, limit_address_space
from tests.fuzz.kernel import PAGES
from tests.fuzz.mutation import Inputs, Seed, mutated
from tests.fuzz.reach import Novelty, Reach, Seen
from tests.fuzz.seeds import kdump_seeds, kernel_seeds
from tests.fuzz.targets import TARGETS
from tests.structpages import ERAS

INPUTS = 40
"""Of each target; `make fuzz` takes as many as its time allows."""
MEASURED = 8
"""Of so many inputs, the memory of one is measured exactly: that takes four times as long."""

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


# --- Whatever comes, it is a CaptureError in one line, in bounded memory and time -----------------------------------


def try_all(target: Target, entries: Iterable[Seed], folder: Path, *, every: int = MEASURED) -> int:
    """Run inputs and return how many there were; of ``every`` so many, the memory of one is measured."""
    number = 0
    with limit_address_space() as renew:
        for number, entry in enumerate(entries, 1):
            renew()
            try:
                check(target, entry.data, folder / "input", measured=number % every == 0)
            except FindingError as finding:
                kept = folder / f"{target.name}-{number}"
                kept.write_bytes(entry.data)
                pytest.fail(f"{finding}; python -m tests.fuzz.run --target '{target.name}' --replay {kept}")
    return number


@every_target
def test_mutated_inputs_are_read_or_refused(target: Target, tmp_path: Path) -> None:
    seeds = target.seeds()
    entries = itertools.islice(Inputs(seeds, f"tests/{target.name}"), len(seeds) + INPUTS)
    assert try_all(target, entries, tmp_path) == len(seeds) + INPUTS


@every_target
def test_what_the_long_runs_have_kept_is_read_or_refused(target: Target, tmp_path: Path) -> None:
    entries = corpus.load(target)
    assert try_all(target, entries, tmp_path, every=len(entries) + 1)  # (each was measured when it was found)


@every_target
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_behind_any_beginning_are_read_or_refused(
    target: Target, data: st.DataObject, tmp_path: Path
) -> None:
    seed = data.draw(st.sampled_from(target.seeds()))
    begin = data.draw(st.integers(0, len(seed.data)))
    check(target, seed.data[:begin] + data.draw(st.binary(max_size=300)), tmp_path / "input")


SOME_REFUSED = {"vmcoreinfo", "dump as source", "save", "cli"}
"""Targets with seeds that are refused: a VMCOREINFO without a log, dumps by hand without a machine."""


@pytest.mark.parametrize("name", sorted(set(TARGETS) - SOME_REFUSED))
def test_the_seeds_are_sound(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for seed in target.seeds():
        (tmp_path / "input").write_bytes(seed.data)
        try:
            target.run(tmp_path / "input")
        except SourceError as error:
            pytest.fail(f"a seed is refused: {error}")
        assert all(offset + width <= len(seed.data) for offset, width in seed.fields)


def test_the_small_kernels_have_all_that_is_looked_for(tmp_path: Path) -> None:
    for seed in kernel_seeds()[: len(ERAS) + 2]:  # what follows has something else on top
        (tmp_path / "core").write_bytes(seed.data)
        with open_vmcore(str(tmp_path / "core")) as vmcore:
            page_filter = PageFilter(vmcore)
            assert page_filter.unusable is None
            assert sum(len(window.kinds) for window in page_filter.windows()) == PAGES
            assert set(page_filter.protects) == set(KINDS[:-1])
            assert all(page_filter.census.by_name()[name] for name in CLASS_NAMES if name != "unknown")
            assert page_filter.verdict(31).level == 31
            assert find_panic(vmcore).line.startswith("Kernel panic")


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


def target_that(run_it: Callable[[Path], Sequence[str]], *, name: str = "pretended") -> Target:
    return Target(name, run_it, lambda: [Seed(b"seed")], seconds=0.3)


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


def test_memory_that_is_not_measured_is_bounded_all_the_same(tmp_path: Path) -> None:
    target = target_that(lambda _: [str(len(bytearray(2 * MAX_ADDRESS_SPACE)))])
    before = resource.getrlimit(resource.RLIMIT_AS)
    with limit_address_space() as renew:
        renew()
        with pytest.raises(FindingError, match="MemoryError"):
            check(target, b"input", tmp_path / "input", measured=False)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@every_target
def test_the_same_name_gives_the_same_inputs(target: Target) -> None:
    seeds = target.seeds()
    first, again, other = (
        [entry.data for entry in itertools.islice(Inputs(seeds, name), len(seeds) + 30)] for name in ("a", "a", "b")
    )
    assert first == again != other
    assert len(set(first)) > 20


def test_mutations_reach_the_integers_that_steer() -> None:
    rng = random.Random(1)
    seed = Seed(bytes(64), ((8, 4), (16, 8)))
    found = {struct.unpack_from("<I", mutated(seed, [seed], rng).ljust(64, b"\0"), 8)[0] for _ in range(500)}
    assert {1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF} <= found


def test_mutations_hide_keys_and_lend_lines() -> None:
    rng = random.Random(1)
    seed, other = Seed(b"OFFSET(a.b)=8\nSIZE(page)=64\n"), Seed(b"NUMBER(x)=1\n")
    made = {mutated(seed, [seed, other], rng) for _ in range(500)}
    assert b"OFFSET(a.b)=8\n#IZE(page)=64\n" in made
    assert b"NUMBER(x)=1\n\n\nSIZE(page)=64\n" in made


def test_what_is_kept_is_mutated_further() -> None:
    made = Inputs([Seed(b"seed")], "name")
    made.keep(Seed(b"kept" * 100, ((8, 4),), 7))
    found = list(itertools.islice(made, 200))
    assert any(entry.data.startswith(b"kept") and entry.origin == 7 and entry.fields for entry in found)
    assert any(entry.data.startswith(b"seed") for entry in found)


def test_a_run_counts_its_inputs_and_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.fuzz([TARGETS["command line"]], 0.3, "s", tmp_path / "kept") == 0
    out = capsys.readouterr().out
    assert "command line" in out
    assert "nothing broke" in out
    assert not (tmp_path / "kept").exists()


def test_a_run_keeps_the_first_of_each_finding_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def breaks(path: Path) -> list[str]:
        if path.read_bytes() == b"seed":
            raise ValueError("not ours")
        raise TypeError("not ours either")

    broken = target_that(breaks)
    assert run.fuzz([broken, TARGETS["command line"]], 0.5, "s", tmp_path) == 1
    out = capsys.readouterr().out
    first, second = sorted(tmp_path.iterdir())
    assert first.read_bytes() == b"seed"
    assert out.count("ValueError: not ours") == out.count("TypeError: not ours either") == 1
    assert f"--target 'pretended' --replay {first}; seed s" in out
    counted = re.search(r"2 findings: pretended: ValueError: test_fuzz.py:\d+ \((\d+)\), pretended: TypeError", out)
    assert counted is not None
    assert int(counted[1]) > 1
    for kept in (first, second):
        with pytest.raises(FindingError):
            run.replay(broken, kept)


def test_an_input_can_be_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kept").write_bytes(b"vmcapture.level=1")
    assert run.replay(TARGETS["command line"], tmp_path / "kept") == 0
    assert "breaks nothing" in capsys.readouterr().out


def test_a_run_is_led_by_what_its_inputs_reach_and_keeps_them(tmp_path: Path) -> None:
    out = command("--seconds", "3", "--seed", "s", "--target", "command line", "--keep", str(tmp_path))
    found = re.search(r"command line +(\d+) inputs +\d+/s +(\d+) branches", out)
    assert found is not None
    assert int(found[2]) > 50
    kept = corpus.load(TARGETS["command line"], tmp_path / "corpus")
    assert 5 < len(kept) < int(found[1]) / 2


def test_the_figures_are_printed_module_by_module(tmp_path: Path) -> None:
    out = command("--coverage", "--missing", "--target", "command line", "--keep", str(tmp_path))
    assert re.search(r"^capture/boot/config.py +\d+ +\d+\.\d% +\d+ +\d+\.\d%$", out, re.MULTILINE)
    assert re.search(r"^capture/kernel/pages.py +\d+ +\d+\.\d% +\d+ +0\.0%$", out, re.MULTILINE)
    assert "not reached: lines" in out
    assert out.splitlines()[-1].startswith("all ")


def command(*arguments: str) -> str:
    """Run the fuzzer in a process of its own: what it reaches is counted only where ``capture`` is not imported yet."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", *arguments],
        cwd=run.REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


# --- The corpus -----------------------------------------------------------------------------------------------------


def test_a_corpus_is_read_as_it_was_written(tmp_path: Path) -> None:
    target = TARGETS["elf"]
    assert corpus.load(target, tmp_path) == []
    entries = [
        Seed(b"second" * 9, target.seeds()[1].fields, 1),
        Seed(b"", target.seeds()[0].fields),
        Seed(b"x", (), 99),
    ]
    size = corpus.save(target, entries, tmp_path)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert sorted(corpus.load(target, tmp_path), key=lambda entry: entry.origin) == [entries[1], entries[0], entries[2]]


def test_the_fewest_inputs_are_kept_that_reach_all() -> None:
    def reaching(data: bytes, *branches: int) -> tuple[Seed, NDArray[np.bool_]]:
        return Seed(data), np.isin(np.arange(8), branches)

    inputs = [
        reaching(b"long one", 1, 2, 3),
        reaching(b"short", 1, 2, 3),
        reaching(b"part", 3),
        reaching(b"other", 4, 0),
        reaching(b"seeds reach it", 0),
    ]
    covered = np.isin(np.arange(8), [0])
    chosen, reached = corpus.fewest(inputs, covered)
    assert [seed.data for seed in chosen] == [b"short", b"other"]
    assert np.flatnonzero(covered).tolist() == [0]
    assert np.flatnonzero(reached).tolist() == [0, 1, 2, 3, 4]


def test_the_kept_corpus_is_small() -> None:
    sizes = [file.stat().st_size for file in corpus.FOLDER.glob("*.zst")]
    assert len(sizes) == len(TARGETS)
    assert sum(sizes) < 300_000


# --- Counting what is reached ---------------------------------------------------------------------------------------

SOURCE = '''
"""A module."""
from __future__ import annotations

def function(first: int, second: int | None = None) -> object:
    """A docstring that stays one."""
    for number in range(first):
        if number == 3:
            break
    else:
        first = first or second
    while first and first > 5:
        first -= 1
    try:
        return [each for each in (first and second, "a" if second else "b")]
    except ValueError:
        return None

class Thing:
    value: int | None = None or 5

def empty() -> None:
    """Nothing else."""
'''


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Reach, Any]]:
    (tmp_path / "pretended").mkdir()
    (tmp_path / "pretended" / "__init__.py").touch()
    (tmp_path / "pretended" / "module.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    reach = Reach()
    reach.install("pretended")
    yield reach, importlib.import_module("pretended.module")
    for name in ("pretended", "pretended.module"):
        del sys.modules[name]


@pytest.mark.parametrize("arguments", [(0,), (2,), (9,), (9, 4), (0, 0), (0, None), (0, 7)])
def test_code_with_counters_does_what_it_did(counted: tuple[Reach, Any], arguments: tuple[int, ...]) -> None:
    plain: dict[str, Any] = {}
    exec(compile(SOURCE, "plain", "exec"), plain)
    _, module = counted
    assert module.function(*arguments) == plain["function"](*arguments)
    assert module.function.__doc__ == "A docstring that stays one."
    assert module.empty() is None
    assert module.Thing.value == 5


def test_each_way_through_a_module_is_told_from_others(counted: tuple[Reach, Any]) -> None:
    reach, module = counted
    seen = Seen()
    expected = {
        (2,): Novelty.BRANCH,
        (2, 0): Novelty.NOTHING,
        (2, 1): Novelty.BRANCH,
        (6,): Novelty.BRANCH,
        (40,): Novelty.COUNT,
        (41,): Novelty.NOTHING,
    }
    for arguments, novelty in expected.items():
        reach.clear()
        module.function(*arguments)
        assert seen.add(reach.found()) == novelty, arguments
    assert 0 < seen.branches < reach.branches


def test_lines_of_a_traceback_stay_those_of_the_file(counted: tuple[Reach, Any]) -> None:
    _, module = counted
    with pytest.raises(TypeError) as error:
        module.function("text")
    assert traceback.extract_tb(error.value.__traceback__)[-1].line == "for number in range(first):"
