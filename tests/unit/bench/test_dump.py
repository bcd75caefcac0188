"""The dump benchmark's own arithmetic; the dumpers themselves are run by ``make bench``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from capture.dumpfile.reader import KdumpFile
from tests.bench import dump, dumpers, table
from tests.bench.dumpers import (
    COPIES,
    DUMPERS,
    OURS_1,
    OURS_2,
    OURS_AUTO_2,
    PEER_ZLIB_1,
    Content,
    Dumper,
    NotAvailableError,
    PeerFailedError,
    Sample,
)
from tests.bench.table import LevelResults
from tests.builders import PAGE
from tests.dumps import dump_of
from tests.guest.host import HostError

RAW = 0
PAGES = 1000


def sample(wall: float, cpu: float = 1.0, size: int = 1 << 20, pages: int | None = PAGES) -> Sample:
    return Sample(wall, cpu, 32 << 20, size, pages)


def results(level: int = 31, more: Mapping[str, Sample] | None = None) -> LevelResults:
    """Everyone took 2 s, libzstd 0.5 s, those of ``more`` (by codec) what is said; zstd:auto refused."""
    found = LevelResults(
        Content(level, PAGE, PAGES, 200, Path("sample")), floor=[sample(0.5, 0.5), sample(0.9, 0.8), sample(0.9, 0.9)]
    )
    for dumper in dumpers.dumpers(level):
        if dumper.codec == "zstd:auto":
            found.refused.add(dumper)
        else:
            found.samples[dumper].append((more or {}).get(dumper.codec, sample(2.0)))
    return found


def page(number: int) -> bytes:
    return number.to_bytes(2, "little") * (PAGE // 2)


def sampled(folder: Path, numbers: list[int], most: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], int]:
    """Sample a dump of the pages 0, 1, 2, ... of ``numbers``, ``most`` at most; return what it took, and zero pages."""
    (folder / "dump").write_bytes(dump_of({pfn: (RAW, page(number)) for pfn, number in enumerate(numbers)}))
    monkeypatch.setattr(dumpers, "SAMPLE_BYTES", most * PAGE)
    with KdumpFile(folder / "dump") as source:
        zero_pages = dumpers._write_sample(source, folder / "sample")
    data = (folder / "sample").read_bytes()
    return [int.from_bytes(data[at : at + 2], "little") for at in range(0, len(data), PAGE)], zero_pages


def test_the_sample_has_every_page_that_is_not_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled(tmp_path, [7, 0, 9, 0, 0, 8], 6, monkeypatch) == ([7, 9, 8], 3)


@pytest.mark.parametrize("batch", [1, 7, 1024])
def test_the_sample_is_evenly_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr("capture.dumpfile.reader.BATCH_PAGES", batch)
    taken, _ = sampled(tmp_path, list(range(1, 101)), 30, monkeypatch)
    assert taken == list(range(1, 101, 4))


def test_copies_stand_beside_level_1_only() -> None:
    assert set(dumpers.dumpers(1)) - set(dumpers.dumpers(31)) == set(COPIES)


def test_what_refused_is_not_available(tmp_path: Path) -> None:
    lines = text(tmp_path, results())
    (row,) = (line.split() for line in lines if "zstd:auto  2" in line)
    assert row == ["31", "vmcapture", "zstd:auto", "2", "not", "available"]
    assert f"level 31: {OURS_AUTO_2} against makedumpfile -l (lzo), 1 thread: not measured" in lines


def test_what_follows_from_the_table(tmp_path: Path) -> None:
    lines = text(tmp_path, results(more={"zstd:1": sample(0.5, cpu=1.5)}))
    assert f"level 31: {OURS_1}: 4.00 times as fast as {PEER_ZLIB_1}" in lines
    assert f"level 31: CPU time of {OURS_1}: 3.00 times that of libzstd alone" in lines
    assert not [line for line in lines if "NOT ALIKE" in line]


def test_what_fails_now_and_then_is_named(tmp_path: Path) -> None:
    found = results()
    found.failures[PEER_ZLIB_1] = ["it crashed"]
    lines = text(tmp_path, found)
    assert "level 31: FAILED: 1 of 2 times: it crashed" in lines
    found.samples[PEER_ZLIB_1].clear()
    lines = text(tmp_path, found)
    assert "level 31: FAILED: 1 of 1 times: it crashed" in lines
    (row,) = (line.split() for line in lines if line.split()[2:5] == ["-c", "zlib", "1"])
    assert row == ["31", "makedumpfile", "-c", "zlib", "1", "failed"]


def test_dumps_of_other_pages_are_named(tmp_path: Path) -> None:
    lines = text(tmp_path, results(more={"zlib": sample(2.0, pages=PAGES + 11)}))
    assert f"level 31: NOT ALIKE: {PEER_ZLIB_1} dumps 1011 pages, not 1000" in lines


def test_every_row_of_markdown_has_every_column(tmp_path: Path) -> None:
    rows = [line for line in text(tmp_path, results(1), markdown=True) if line.startswith("|")]
    assert len(rows) == 2 + len(DUMPERS) + len(COPIES) + 1
    assert {line.replace("\\|", "").count("|") for line in rows} == {len(table.COLUMNS) + 1}


def text(folder: Path, found: LevelResults, *, markdown: bool = False) -> list[str]:
    (folder / "vmcore").write_bytes(b"\0")
    return table.report(folder / "vmcore", [found], markdown=markdown).splitlines()


def test_medians_are_taken_figure_by_figure() -> None:
    assert table.middle([sample(1.0, 9.0), sample(5.0, 2.0), sample(3.0, 4.0)]) == sample(3.0, 4.0)


def test_a_dumper_is_measured_by_itself(tmp_path: Path) -> None:
    """Neither our memory nor the starter's time is counted as its own."""
    ballast = bytearray(256 << 20)
    writes = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(bytes(5)); print('said')"
    dumper = Dumper("python", "none", "1", lambda *all_of: (sys.executable, "-c", writes, all_of[2]), whole_file=True)
    with dumpers.dumped(dumper, tmp_path / "vmcore", 1, tmp_path) as (found, out):
        assert (found.size, out.read_bytes(), found.pages) == (5, bytes(5), None)
    assert 0 < found.peak_memory < len(ballast)
    assert found.cpu > 0
    assert found.wall > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ours", "status", "kind"),
    [(True, 1, HostError), (True, 2, NotAvailableError), (False, 1, PeerFailedError), (False, 2, PeerFailedError)],
)
def test_a_dumper_that_fails_is_quoted(tmp_path: Path, ours: bool, status: int, kind: type[Exception]) -> None:
    fails = f"import sys; print('no such thing', file=sys.stderr); sys.exit({status})"
    dumper = Dumper("python", "none", "1", lambda *_: (sys.executable, "-c", fails), ours=ours)
    with (
        pytest.raises(HostError, match="no such thing") as raised,
        dumpers.dumped(dumper, tmp_path / "vmcore", 1, tmp_path),
    ):
        pass
    assert raised.type is kind
    assert not list(tmp_path.iterdir())


def test_two_threads_are_asked_for() -> None:
    command = " ".join(map(str, OURS_2.command(Path("vmcore"), 31, Path("out"))))
    assert command.endswith(" -m capture dump -d 31 -c zstd:1 --threads 2 --no-progress -q vmcore out")


@pytest.mark.parametrize(
    "arguments",
    [["--memory", "2"], ["--memory", "2G,"], ["--levels", "32"], ["--levels", ""], ["--repeat", "0"]],
    ids=" ".join,
)
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        dump.main(arguments)
    assert left.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_vmcore_that_is_not_there_takes_one_line(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in dump.NEEDED:
        (programs / name).write_text("#!/bin/sh\necho version 1\n")
        (programs / name).chmod(0o755)
    command = [sys.executable, "-m", "tests.bench.dump", "--vmcore", str(tmp_path / "absent")]
    done = subprocess.run(
        command, env={"PATH": f"{programs}:/usr/bin:/bin", "TMPDIR": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"bench: {tmp_path}/absent: No such file or directory"
