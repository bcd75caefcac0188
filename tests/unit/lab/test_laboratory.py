"""The laboratory itself: it acts where it should, and what is wrong does not escape it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capture.boot import job
from capture.dumpfile.output import OutputFile
from tests.builders import PAGE
from tests.dumps import INCOMPLETE, STATUS
from tests.faults import raising
from tests.lab.faults import FAULTS, KILLED
from tests.lab.invariants import directories, look, wrong, wrong_after_again, wrong_in_the_end
from tests.lab.matrix import BELOW, Laboratory, matching, points
from tests.lab.tap import Operation, Tap, boundary_within
from tests.outcome import FILES, listing
from tests.readers import by_hand

# --- acting on the n-th operation


def test_operations_are_counted_below_the_directory_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with Tap(tmp_path / "in").listening() as tap:
        for folder in ("in", "."):
            fd = os.open(tmp_path / folder / "file", os.O_CREAT | os.O_RDWR)
            os.pwritev(fd, [b"ab", b"c"], 5)
            os.fdatasync(fd)
            os.close(fd)
            os.close(os.open(tmp_path / folder / "file", os.O_RDONLY))
            os.rename(tmp_path / folder / "file", tmp_path / folder / "other")  # noqa: PTH104
    assert [(done.number, done.kind, done.file, done.offset, done.size) for done in tap.operations] == [
        (1, "open", "file", 0, 0),
        (2, "pwritev", "file", 5, 3),
        (3, "fdatasync", "file", 0, 0),
        (4, "rename", "file", 0, 0),
    ]
    assert os.pwritev.__name__ == "pwritev", "and nothing is left behind"


def test_the_job_is_killed_before_in_or_after_the_operation(laboratory: Laboratory) -> None:
    writes = matching(laboratory.operations, FAULTS["kill-within"])
    large = next(number for number, write in enumerate(writes, 1) if write.size > 2 * PAGE)
    written = []
    for name in ("kill-before", "kill-within", "kill-after"):
        root = laboratory.new_target()
        fault = FAULTS[name]._replace(operations=FAULTS["kill-within"].operations)
        outcome = laboratory.save(root, fault, large)
        assert outcome.status == KILLED
        assert outcome.hit is not None
        assert outcome.hit.size == writes[large - 1].size  # (the offset depends on how well zstd:auto compressed)
        size = (directories(root / BELOW)[0] / "vmcore.incomplete").stat().st_size
        written.append(max(0, size - outcome.hit.offset))
        assert name != "kill-within" or size % PAGE == 0
    assert 0 == written[0] < written[1] < written[2] == writes[large - 1].size


@pytest.mark.parametrize(
    ("offset", "size", "part"),
    [(0, 10, 0), (0, PAGE, 0), (0, PAGE + 1, PAGE), (0, 4 * PAGE, PAGE), (100, 5000, PAGE - 100), (PAGE - 1, 1, 0)],
)
def test_a_write_that_is_killed_ends_at_a_page(offset: int, size: int, part: int) -> None:
    assert boundary_within(Operation(1, "pwritev", "/x", offset, size)) == part


def test_an_error_is_raised_once_or_from_there_on(tmp_path: Path) -> None:
    def tried(name: str, at: int) -> list[bool]:
        with Tap(tmp_path, FAULTS[name], at).listening():
            fd = os.open(tmp_path / name, os.O_CREAT | os.O_RDWR)
            done = []
            for _ in range(4):
                try:
                    done.append(os.pwrite(fd, b"x", 0) == 1)
                except OSError as error:
                    done.append(error.errno == -1)
            os.close(fd)
            return done

    assert tried("eio-write", 2) == [True, False, True, True]
    assert tried("enospc-from-here", 3) == [True, False, False, False], "the first was its opening"


def test_a_write_that_is_cut_short_is_cut_before_it_fails(tmp_path: Path) -> None:
    with Tap(tmp_path, FAULTS["enospc-cut"], 1).listening():
        fd = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
        assert os.pwrite(fd, bytes(4 * PAGE), 100) == 2 * PAGE + 100 - 200
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, b"x", 0)
        assert os.pwrite(fd, b"x", 0) == 1
        os.close(fd)


def test_a_sample_has_every_kind_of_operation_on_every_file(laboratory: Laboratory) -> None:
    fault = FAULTS["kill-before"]
    found = matching(laboratory.operations, fault)
    sample = points(laboratory.operations, fault, 10)
    assert len(sample) < len(found) / 2
    assert {(found[at - 1].kind, found[at - 1].file) for at in sample} == {(each.kind, each.file) for each in found}


# --- what is wrong is found


Break = Callable[[Path], object]


def flip_a_page(folder: Path) -> None:
    raw = bytearray((folder / "vmcore").read_bytes())
    found = by_hand(folder / "vmcore")
    offset = max(offset for offset, size, flags, _ in found.descriptors.values() if not flags)
    raw[offset + 9] ^= 1
    (folder / "vmcore").write_bytes(raw)


def forget_a_page(folder: Path) -> None:
    raw = bytearray((folder / "vmcore").read_bytes())
    found = by_hand(folder / "vmcore")
    table = found.data_start - 24 * len(found.descriptors)
    raw[table : table + 24] = bytes(24)
    (folder / "vmcore").write_bytes(raw)


def mark(folder: Path) -> None:
    raw = bytearray((folder / "vmcore").read_bytes())
    raw[STATUS] |= INCOMPLETE
    (folder / "vmcore").write_bytes(raw)


def behind_the_end(folder: Path) -> None:
    os.truncate(folder / "vmcore", (folder / "vmcore").stat().st_size - PAGE)


def other_size(folder: Path) -> None:
    raw = bytearray((folder / "vmcore").read_bytes())
    struct.pack_into("<I", raw, STATUS + 4, 1234)
    (folder / "vmcore").write_bytes(raw)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: folder.chmod(0o755), "mode 755"),
        (lambda folder: (folder / "vmcore").chmod(0o644), "vmcore: mode 644"),
        (lambda folder: (folder / "manifest.json.new").touch(0o600), "manifest.json.new: a stray file"),
        (lambda folder: (folder.parent / "x").touch(0o600), "x: a stray file"),
        (lambda folder: os.truncate(folder / "vmcore-dmesg.txt", 9), "vmcore-dmesg.txt: not what an undisturbed"),
        (lambda folder: os.truncate(folder / "manifest.json", 99), "manifest.json: "),
        (lambda folder: (folder / "registers.txt").unlink(), "names registers.txt, which is not there"),
        (lambda folder: (folder / "vmcore").rename(folder / "vmcore.incomplete"), "the dump is vmcore, which is not"),
        (lambda folder: os.truncate(folder / "capture-log.txt", 1), "size or SHA-256 of capture-log.txt differ"),
        (flip_a_page, "1 cannot be read back"),
        (forget_a_page, "is not marked incomplete, and lacks 1 pages"),
        (mark, "has its name and is marked incomplete"),
        (behind_the_end, "cannot be read back"),
        (other_size, "page size 1234"),
        (lambda folder: (folder / "vmcore").write_bytes(b""), "vmcore: no header"),
    ],
)
def test_what_is_not_as_promised_is_found(change: Break, words: str, laboratory: Laboratory) -> None:
    root = laboratory.new_target()
    assert laboratory.save(root).status == 0
    assert wrong(root / BELOW, laboratory.reference) == []
    change(directories(root / BELOW)[0])
    found = wrong(root / BELOW, laboratory.reference)
    assert any(words in line for line in found), found


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "registers.txt").unlink(), "status 0 with"),
        (lambda folder: rewrite(folder, lambda said: said["files"].pop("vmcore")), "does not list ['vmcore']"),
        (lambda folder: rewrite(folder, lambda said: said["dump"].update(pages_written=7)), "counts 7 pages"),
        (lambda folder: rewrite(folder, lambda said: said["dump"].update(whole=False)), "says whole: False"),
        (lambda folder: rewrite(folder, lambda said: said.update(dump=None)), "knows of no dump"),
        (lambda folder: rewrite(folder, lambda said: said.update(failures=["x: y"])), "a failure of x"),
    ],
)
def test_a_manifest_that_does_not_say_what_is_there_is_found(change: Break, words: str, laboratory: Laboratory) -> None:
    root = laboratory.new_target()
    assert laboratory.save(root).status == 0
    assert wrong_in_the_end(look(root / BELOW, laboratory.reference), laboratory.reference, 0, "") == []
    change(directories(root / BELOW)[0])
    found = wrong_in_the_end(look(root / BELOW, laboratory.reference), laboratory.reference, 0, "")
    assert any(words in line for line in found), found


def test_a_status_that_is_not_true_is_found(laboratory: Laboratory) -> None:
    root = laboratory.new_target()
    assert laboratory.save(root).status == 0
    for status in (1, 3, 5):
        assert wrong_in_the_end(look(root / BELOW, laboratory.reference), laboratory.reference, status, "")
    assert wrong_in_the_end(
        look(root / BELOW, laboratory.reference), laboratory.reference, 0, "internal error: KeyError"
    )
    assert wrong_after_again(root / BELOW, laboratory.reference, {}, 3)


def test_a_job_that_does_not_sync_its_directory_loses_files(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "sync_directory", lambda _path: None)
    found = [line for point in laboratory.power_cuts(step=25) for line in point.broken]
    assert any("vmcore-dmesg.txt is not on the disk" in line for line in found)


def test_a_job_that_does_not_sync_its_data_has_wrong_pages(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputFile, "sync", lambda _output: None)
    found = [line for point in laboratory.power_cuts(step=10) for line in point.broken]
    assert any("vmcore.incomplete: " in line for line in found)


@pytest.mark.usefixtures("described_early")
def test_a_job_that_describes_pages_before_they_are_there_is_found_when_it_is_killed(laboratory: Laboratory) -> None:
    plan = points(laboratory.operations, FAULTS["kill-before"], 20)
    found = [line for at in plan for line in laboratory.disturbed(FAULTS["kill-before"], at).broken]
    assert any("cannot be read back" in line or "differ" in line for line in found)


def test_a_job_that_raises_is_found(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "target_error", raising(ZeroDivisionError("a bug")))
    found = laboratory.disturbed(FAULTS["rename"], 1).broken
    assert "it says 'internal error'" in found


def test_an_undisturbed_save_is_what_the_laboratory_measures_by(laboratory: Laboratory) -> None:
    root = laboratory.new_target()
    assert laboratory.save(root).status == 0
    assert listing(directories(root / BELOW)[0]) == set(FILES)
    assert len(laboratory.reference.pages) == len(by_hand(directories(root / BELOW)[0] / "vmcore").pages)
