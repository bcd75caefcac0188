"""What is saved first: passes select every page once, and a dump does not care in which order it was written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from capture.dumpfile import output, passes, selection, writer
from capture.dumpfile.output import OutputFile
from capture.dumpfile.passes import Passes
from capture.dumpfile.writer import KdumpWriter
from capture.errors import TargetError
from capture.memory.image import CHUNK_PAGES
from tests.builders import PAGE, filled
from tests.readers import by_hand
from tests.unit.capture.dumpfile.test_writer import PLAN, packed, runs_of

MAX_PFN = 100


def bits(*pfns: int) -> NDArray[np.bool_]:
    found = np.zeros(MAX_PFN, dtype=np.bool_)
    found[list(pfns)] = True
    return found


@pytest.fixture
def made(tmp_path: Path) -> Iterator[KdumpWriter]:
    with (
        closing(OutputFile(tmp_path / "dump")) as file,
        closing(KdumpWriter(file, PLAN._replace(max_mapnr=MAX_PFN))) as made,
    ):
        made.map_memory([(0, MAX_PFN)])
        made.select([(0, bits(1, 2, 3, 20, 21, 50, 99))])
        yield made


def selected(order: Passes, made: KdumpWriter) -> list[list[tuple[int, int]]]:
    return [list(runs) for runs in order.runs(made)]


def test_each_pass_has_its_pages_and_the_last_one_all_others(made: KdumpWriter, tmp_path: Path) -> None:
    with closing(Passes(tmp_path, MAX_PFN)) as order:
        order.note(0, (bits(2, 20, 60), bits(3, 99)))
        assert selected(order, made) == [[(2, 1), (20, 1)], [(3, 1), (99, 1)], [], [], [], [(1, 1), (21, 1), (50, 1)]]
        order.note(0, (bits(1), bits()))  # the filter was asked again
        assert selected(order, made) == [[(1, 1)], [], [], [], [], [(2, 2), (20, 2), (50, 1), (99, 1)]]
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]


def test_pages_that_nobody_noted_come_last(made: KdumpWriter, tmp_path: Path) -> None:
    with closing(Passes(tmp_path, MAX_PFN)) as order:
        assert selected(order, made) == [[], [], [], [], [], [(1, 3), (20, 2), (50, 1), (99, 1)]]


def test_a_file_system_without_unnamed_files_does_as_well(
    made: KdumpWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_CREAT | os.O_EXCL)
    with closing(Passes(tmp_path, MAX_PFN)) as order:
        assert order.failure is None
        assert [path.name for path in tmp_path.iterdir()] == ["dump"]
        order.note(0, (bits(99), bits()))
        assert selected(order, made)[0] == [(99, 1)]


def test_without_room_there_is_one_pass(made: KdumpWriter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = [[(1, 3), (20, 2), (50, 1), (99, 1)]]

    def full(*_arguments: object, **_more: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with closing(Passes(tmp_path, MAX_PFN)) as order:
        monkeypatch.setattr(os, "pwrite", full)
        order.note(0, (bits(99), bits()))
        assert order.failure == "the order of pages cannot be written: No space left on device"
        assert selected(order, made) == everything
    with closing(Passes(tmp_path, MAX_PFN)) as order:
        monkeypatch.setattr(os, "pwrite", lambda *_arguments: 1)
        order.note(0, (bits(99), bits()))
        assert selected(order, made) == everything
    monkeypatch.setattr(tempfile, "mkstemp", full)
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY | os.O_CREAT | os.O_EXCL)
    with closing(Passes(tmp_path, MAX_PFN)) as order:
        assert order.failure is not None
        order.note(0, (bits(99), bits()))
        assert selected(order, made) == everything


def test_what_is_saved_already_is_noted_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is cut short says nothing; pages that are not noted would be saved, and counted, twice."""
    with closing(Passes(tmp_path, MAX_PFN)) as order:
        monkeypatch.setattr(os, "pwrite", lambda *_arguments: 1)
        with pytest.raises(TargetError, match="cannot be noted: no room"):
            order.note_done(np.arange(1, 90))


def test_a_filter_that_failed_has_no_say(made: KdumpWriter, tmp_path: Path) -> None:
    with closing(Passes(tmp_path, MAX_PFN)) as order:
        order.note(0, (bits(99), bits()))
        order.give_up("the page filter failed")
        assert selected(order, made) == [[(1, 3), (20, 2), (50, 1), (99, 1)]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, passes.NAMED), st.booleans()), min_size=1, max_size=200),
    st.integers(1, 40),
    st.sampled_from([1, 3, 8, 4096]),
    st.sampled_from([8, 64, 1 << 15]),
    st.sampled_from([PAGE, 40 * PAGE, 16 << 20]),
)
def test_a_dump_is_the_same_in_whatever_order_it_was_written(
    what: list[tuple[int, bool]], at_once: int, table_block: int, number_window: int, step: int
) -> None:
    """Each page has a pass, and is selected or not."""
    pages = {pfn: filled(chr(97 + pfn % 26)) for pfn, (_, kept) in enumerate(what) if kept}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "_TABLE_BLOCK", table_block)
        patch.setattr(writer, "_NUMBER_WINDOW", number_window)
        patch.setattr(writer, "SYNC_BYTES", step)
        folder = Path(name)
        with (
            closing(OutputFile(folder / "dump")) as file,
            closing(KdumpWriter(file, PLAN._replace(max_mapnr=len(what)))) as made,
            closing(Passes(folder, len(what))) as order,
        ):
            made.map_memory([(0, len(what))])
            made.select([(0, np.array([kept for _, kept in what]))])
            order.note(0, [np.array([number == own for own, _ in what]) for number in range(passes.NAMED)])
            made.start(0)
            written: list[int] = []
            for runs in order.runs(made):
                pfns = [pfn for first, count in runs for pfn in range(first, first + count)]
                for start in range(0, len(pfns), at_once):
                    part = pfns[start : start + at_once]
                    made.append(packed({pfn: pages[pfn] for pfn in part}, share_zero_pages=False))
                written += pfns
            assert [what[pfn][0] for pfn in written] == sorted(what[pfn][0] for pfn in pages)
            made.finish(complete=True)
            assert made.pages_written == len(pages)
        dump = by_hand(folder / "dump")
        assert not dump.incomplete
        assert dump.pages == pages
        assert runs_of(sorted(dump.pages)) == runs_of(sorted(pages))


def test_numbers_are_those_of_the_table_over_many_windows() -> None:
    """A chunk may lie in several windows, and windows without a page of the dump lie between."""
    chosen = np.zeros(200_000, dtype=np.bool_)
    chosen[[5, 8_191, 8_192, 150_000, 199_999]] = True
    assert CHUNK_PAGES < writer._NUMBER_WINDOW < selection.RUNS_WINDOW
    numbers = writer._Numbers(lambda first, count: chosen[first : first + count], lambda: range(2))
    assert numbers.of(np.array([5, 8_191, 8_192, 199_999])).tolist() == [0, 1, 2, 4]
    assert numbers.of(np.array([8_191, 150_000])).tolist() == [1, 3]


def test_numbers_cost_nothing_for_windows_without_memory() -> None:
    """One damaged segment may lie 2^40 pages above all others: 2^27 windows."""
    far = (1 << 40) // selection.RUNS_WINDOW
    chosen = {3, 9_000, far * selection.RUNS_WINDOW + 20_000}
    looked_at = []

    def chosen_of(first: int, count: int) -> NDArray[np.bool_]:
        looked_at.append(first)
        return np.array([pfn in chosen for pfn in range(first, first + count)])

    numbers = writer._Numbers(chosen_of, lambda: [0, far])
    assert numbers.of(np.array(sorted(chosen))).tolist() == [0, 1, 2]
    assert len(looked_at) < 100
