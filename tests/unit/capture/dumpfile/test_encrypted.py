"""Files that only the key opens: what is in them, what is on the disk when they are cut short, and what age may do."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from capture.dump import write_dump
from capture.dumpfile import encrypted, writer
from capture.dumpfile.assemble import assemble
from capture.dumpfile.encrypted import EncryptedFile, check_recipients, find_program
from capture.dumpfile.output import OutputFile, Pieces, TargetFullError
from capture.errors import SourceError, TargetError, UsageError
from capture.memory import image
from capture.vmcore import open_vmcore
from tests.builders import PAGE, crashed_core, numbered
from tests.encryption import Key
from tests.faults import Recorded, Step, after_power_cut, raising, tmpfs, umask
from tests.outcome import Run, dump_options, read_back
from tests.readers import ElfPages, by_hand, read_by_drgn

CHUNK = 1 << 16
"""Plain bytes that age encrypts together."""


def on_path(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have ``script`` in the place of age."""
    (folder / "age").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "age").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


# --- one file


def test_the_key_opens_what_was_written(key: Key, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(3 * CHUNK + 7)
    with closing(EncryptedFile(tmp_path / "file", key.recipients)) as file:
        assert file.append([data[:10], memoryview(data)[10:]]) == len(data)
        file.end()
        file.sync()
        raw = (tmp_path / "file").read_bytes()
        assert file.size == len(raw)
        assert file.digests() == [hashlib.sha256(raw).hexdigest()]
    assert key.open(tmp_path / "file") == (0, data)
    assert data[:64] not in raw


def test_the_file_is_new_private_and_no_link_is_followed(key: Key, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match="creating failed: File exists"):
        EncryptedFile(tmp_path / "link", key.recipients)
    assert not (tmp_path / "elsewhere").exists()
    with umask(0), closing(EncryptedFile(tmp_path / "file", key.recipients)):
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


def test_what_was_synced_can_be_decrypted_but_for_the_last_chunk(key: Key, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(5 * CHUNK + 7)
    with closing(EncryptedFile(tmp_path / "file", key.recipients)) as file:
        file.append([data])
        file.sync()
        shutil.copy(tmp_path / "file", tmp_path / "copy")
    status, opened = key.open(tmp_path / "copy")
    assert status != 0, "it says that there is no end"
    assert opened == data[: 5 * CHUNK]


@pytest.mark.parametrize("how", ["cut", "zeros", "flipped"])
def test_a_damaged_file_gives_its_good_chunks_and_an_error(how: str, key: Key, tmp_path: Path) -> None:
    data = random.Random(1).randbytes(5 * CHUNK)
    with closing(EncryptedFile(tmp_path / "file", key.recipients)) as file:
        file.append([data])
        file.end()
    raw = bytearray((tmp_path / "file").read_bytes())
    at = len(raw) // 2
    if how == "cut":
        del raw[at:]
    elif how == "zeros":
        raw[at:] = bytes(len(raw) - at)
    else:
        raw[at] ^= 1
    (tmp_path / "file").write_bytes(raw)
    status, opened = key.open(tmp_path / "file")
    assert status != 0
    assert opened == data[: 2 * CHUNK]


def test_without_age_there_is_one_line_and_no_file(key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(encrypted, "_PLACES", ())
    with pytest.raises(TargetError, match=r"^age was not found: nothing can be encrypted; install age$"):
        EncryptedFile(tmp_path / "file", key.recipients)
    assert not (tmp_path / "file").exists()


def test_an_age_of_the_current_directory_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_path(tmp_path, "exit 1", monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", ":.:")
    assert find_program() in ("/usr/local/bin/age", "/usr/bin/age", "/bin/age")


def test_an_age_that_cannot_be_run_leaves_no_file(key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", raising(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))))
    with pytest.raises(TargetError, match="age cannot be run: Cannot allocate memory; nothing is saved without it"):
        EncryptedFile(tmp_path / "file", key.recipients, ballast=True)
    assert not (tmp_path / "file").exists()


def test_what_age_says_is_in_the_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("age1nonsense\n")
    with closing(EncryptedFile(tmp_path / "file", bad)) as file:
        with pytest.raises(TargetError, match=r"file: age failed: .*malformed recipient at line 1$") as caught:
            file.end()
        assert "filippo" not in str(caught.value)
        file.discard_if_empty()
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("when", ["append", "end"])
def test_an_age_that_is_killed_is_said(when: str, key: Key, tmp_path: Path) -> None:
    with closing(EncryptedFile(tmp_path / "file", key.recipients)) as file:
        file.append([bytes(10)])
        os.kill(file._age.pid, signal.SIGKILL)
        file._age.wait()
        for _ in range(2):
            with pytest.raises(TargetError, match=r"file: age was killed by signal 9$"):
                file.append([bytes(1 << 20)]) if when == "append" else file.end()


def test_an_age_that_swallows_everything_does_not_hold_a_sync_for_ever(
    key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encrypted, "_PATIENCE", 0.05)
    on_path(tmp_path, "cat > /dev/null; true", monkeypatch)
    with closing(EncryptedFile(tmp_path / "file", key.recipients)) as file:
        file.append([bytes(1 << 20)])
        file.sync()
        assert file.size == 0


def test_ctrl_c_does_not_reach_age(key: Key, tmp_path: Path) -> None:
    with closing(EncryptedFile(tmp_path / "file", key.recipients)) as file:
        assert os.getpgid(file._age.pid) != os.getpgid(0)


def test_a_full_disk_is_said(key: Key, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "full", "size=256k") as full, closing(EncryptedFile(full / "file", key.recipients)) as file:
        with pytest.raises(TargetError, match="no room left while writing"):
            file.append([bytes(40 * CHUNK)])  # more than the pipes hold
        with pytest.raises(TargetError, match="no room left while writing"):
            file.sync()
        assert not file.full


def test_with_ballast_there_is_room_to_come_to_an_end(key: Key, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "full", "size=6m") as full:
        data = random.Random(1).randbytes(CHUNK)
        with closing(EncryptedFile(full / "file", key.recipients, ballast=True)) as file:
            count = 0
            while not file.full:
                file.append([data])
                file.sync()
                count += 1
            file.append([b"the end"])
            file.end()
            file.sync()
        assert 1 << 20 < (full / "file").stat().st_size < 5 << 20
        assert key.open(full / "file") == (0, data * count + b"the end")


def test_room_that_is_given_back_late_is_waited_for(key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As XFS and btrfs may do: the disk stays full for some tries."""
    real = OutputFile.write
    refused: list[int] = []

    def write(file: OutputFile, pieces: Pieces, offset: int) -> int:
        if offset > CHUNK and len(refused) < 4:
            refused.append(offset)
            raise TargetFullError("no room left")
        return real(file, pieces, offset)

    monkeypatch.setattr(OutputFile, "write", write)
    monkeypatch.setattr(encrypted, "_PAUSE", 0.01)
    data = random.Random(1).randbytes(8 * CHUNK)
    with closing(EncryptedFile(tmp_path / "file", key.recipients, ballast=True)) as file:
        file.append([data])
        file.end()
        assert file.full
        assert len(refused) == 4
    assert key.open(tmp_path / "file") == (0, data)


# --- recipients


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no recipient"),
        ("# only a comment\n\n", "names no recipient"),
        ("# fine\nAGE-SECRET-KEY-1QQQ\n", "line 2: is a secret key"),
        ("  age-secret-key-1qqq", "line 1: is a secret key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n", "line 1: is a secret key"),
    ],
)
def test_recipients_that_cannot_be_used_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "recipients").write_text(text)
    with pytest.raises(UsageError, match=words):
        check_recipients(tmp_path / "recipients")


def test_recipients_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipients: the recipients cannot be read: No such file or directory"):
        check_recipients(tmp_path / "recipients")


def test_age_and_ssh_keys_are_recipients(key: Key, tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    made = subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh], check=False, capture_output=True)
    if made.returncode:
        pytest.skip("ssh-keygen is not installed")
    both = tmp_path / "both"
    both.write_text(key.recipients.read_text() + ssh.with_suffix(".pub").read_text())
    check_recipients(both)
    with closing(EncryptedFile(tmp_path / "file", both)) as file:
        file.append([b"for both"])
        file.end()
    assert key.open(tmp_path / "file") == (0, b"for both")
    assert Key(ssh, both).open(tmp_path / "file") == (0, b"for both")


# --- a dump


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "core").write_bytes(crashed_core(pages=numbered(0, 40) + random.Random(2).randbytes(60 * PAGE)))
    return str(tmp_path / "core")


def opened(key: Key, path: Path, folder: Path) -> Path:
    """Decrypt as much as can be, put it together, and return where it is."""
    folder.mkdir(exist_ok=True)
    (folder / "flat").write_bytes(key.open(path)[1])
    return assemble(str(folder / "flat"), folder / "dump", replace=True, progress=False).path


def test_a_dump_is_the_one_that_would_be_written_in_the_clear(source: str, key: Key, tmp_path: Path, run: Run) -> None:
    ran = run("dump", "--recipients", key.recipients, source, tmp_path / "secret")
    assert (ran.status, ran.out) == (0, "")
    dump = opened(key, tmp_path / "secret", tmp_path / "opened")
    assert not by_hand(dump).incomplete
    assert by_hand(dump).pages == ElfPages(Path(source).read_bytes()).pages()
    assert read_by_drgn(dump, by_hand(dump).pages) == by_hand(dump).pages
    raw = (tmp_path / "secret").read_bytes()
    for plain in (b"KDUMP   ", b"makedumpfile", b"OSRELEASE", Path(source).read_bytes()[-64:]):
        assert plain not in raw


def test_wherever_it_is_cut_the_key_opens_a_dump_of_what_was_there(
    source: str, key: Key, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "CHUNK_PAGES", 2)
    monkeypatch.setattr(writer, "SYNC_PAGES", 8)
    assert run("dump", "--recipients", key.recipients, "-c", "none", source, tmp_path / "secret").status == 0
    pages = ElfPages(Path(source).read_bytes()).pages()
    size = (tmp_path / "secret").stat().st_size
    counts = []
    for cut in range(0, size, size // 40):
        (tmp_path / "cut").write_bytes((tmp_path / "secret").read_bytes()[:cut])
        try:
            dump = by_hand(opened(key, tmp_path / "cut", tmp_path / "opened"))
        except SourceError:
            assert cut < 2 * CHUNK, "a header is in the first chunk"
            continue
        assert dump.incomplete
        assert {pfn: pages[pfn] for pfn in dump.pages} == dump.pages
        counts.append(len(dump.pages))
    assert counts == sorted(counts)
    assert 0 < counts[len(counts) // 2] < len(pages)


def test_after_a_power_cut_the_key_opens_all_that_was_synced(
    source: str, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the blocks that were written since, the disk has any that it pleases."""
    made: list[Recorded] = []

    def recorded(path: Path, **_options: bool) -> Recorded:
        made.append(Recorded(path))
        return made[0]

    monkeypatch.setattr(image, "CHUNK_PAGES", 2)
    monkeypatch.setattr(writer, "SYNC_PAGES", 8)
    monkeypatch.setattr(encrypted, "OutputFile", recorded)
    with open_vmcore(source) as vmcore:
        write_dump(vmcore, tmp_path / "dump", dump_options(recipients=key.recipients, compression="none"))
    monkeypatch.undo()
    pages, steps = ElfPages(Path(source).read_bytes()).pages(), made[0].steps

    def found(steps: Sequence[Step], seed: int) -> dict[int, bytes]:
        (tmp_path / "cut").write_bytes(after_power_cut(steps, random.Random(seed)))
        try:
            dump = by_hand(opened(key, tmp_path / "cut", tmp_path / "opened"))
        except SourceError:
            return {}
        assert {pfn: pages[pfn] for pfn in dump.pages} == dump.pages
        return dump.pages

    for number in range(len(steps)):
        last = max((index for index, step in enumerate(steps[:number]) if step.what == "sync"), default=-1)
        synced = found(steps[: last + 1], 0)
        assert found(steps[:number], number).keys() >= synced.keys()
    assert len(synced) > len(pages) // 2


def test_a_full_disk_leaves_a_dump_that_the_key_opens_whole(key: Key, tmp_path: Path) -> None:
    """It ends in an orderly way: each page that is counted is described, in a stream that has an end."""
    (tmp_path / "large").write_bytes(crashed_core(pages=random.Random(2).randbytes(800 * PAGE)))
    with tmpfs(tmp_path / "full", "size=6m") as full:
        with open_vmcore(str(tmp_path / "large")) as vmcore:
            report = write_dump(vmcore, full / "dump", dump_options(recipients=key.recipients))
        assert report.failure is not None
        assert "no room left" in report.failure
        assert report.path == full / "dump.incomplete"
        assert os.statvfs(full).f_bavail * os.statvfs(full).f_frsize > 1 << 20, "room for the manifest"
        status, stream = key.open(report.path)
        assert status == 0
        (tmp_path / "flat").write_bytes(stream)
    found = assemble(str(tmp_path / "flat"), tmp_path / "dump", progress=False)
    assert (found.failure, found.incomplete) == (None, True)
    good, _ = read_back(found.path)
    assert len(good) == report.pages_written > 300
    pages = ElfPages((tmp_path / "large").read_bytes()).pages()
    assert {pfn: pages[pfn] for pfn in good} == good


def test_a_deadline_leaves_a_dump_that_the_key_opens(source: str, key: Key, tmp_path: Path) -> None:
    with open_vmcore(source) as vmcore:
        report = write_dump(
            vmcore, tmp_path / "dump", dump_options(recipients=key.recipients, deadline=time.monotonic())
        )
    assert report.path == tmp_path / "dump.incomplete"
    assert by_hand(opened(key, report.path, tmp_path / "opened")).pages == {}


def test_an_age_that_is_killed_costs_the_rest_of_the_dump_only(
    source: str, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image, "CHUNK_PAGES", 2)
    monkeypatch.setattr(writer, "SYNC_PAGES", 8)
    age = find_program()
    on_path(tmp_path, f'head -c 200000 | {age} "$@"', monkeypatch)
    with open_vmcore(source) as vmcore:
        report = write_dump(vmcore, tmp_path / "dump", dump_options(recipients=key.recipients, compression="none"))
    assert report.failure is not None
    assert report.path == tmp_path / "dump.incomplete"
    dump = by_hand(opened(key, report.path, tmp_path / "opened"))
    pages = ElfPages(Path(source).read_bytes()).pages()
    assert dump.incomplete
    assert dump.pages
    assert {pfn: pages[pfn] for pfn in dump.pages} == dump.pages


def test_killed_at_any_time_it_leaves_what_the_key_opens(key: Key, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(crashed_core(pages=random.Random(2).randbytes(6000 * PAGE)))
    pages = ElfPages((tmp_path / "large").read_bytes()).pages()
    program = (
        "import sys; from capture.dumpfile import writer; writer.SYNC_PAGES = 256; from capture.cli import main; main()"
    )
    found = []
    for number, size in enumerate((1 << 20, 4 << 20, 12 << 20)):
        target = tmp_path / f"dump{number}"
        arguments = ["dump", "-q", "--recipients", key.recipients, tmp_path / "large", target]
        process = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])
        unfinished = Path(f"{target}.incomplete")
        while process.poll() is None and not (unfinished.exists() and unfinished.stat().st_size > size):
            time.sleep(0.002)
        process.kill()
        if process.wait() == 0:
            continue
        dump = by_hand(opened(key, unfinished, tmp_path / f"opened{number}"))
        assert dump.incomplete
        assert {pfn: pages[pfn] for pfn in dump.pages} == dump.pages
        found.append(len(dump.pages))
    assert found
    assert found == sorted(found)
    assert found[-1] > 0


def test_memory_does_not_grow_with_the_dump(key: Key, tmp_path: Path) -> None:
    """What age holds is the same for 16 MiB and for 256 MiB."""
    peaks = []
    for mebibytes in (16, 256):
        with closing(EncryptedFile(tmp_path / f"{mebibytes}", key.recipients, hashed=False)) as file:
            for _ in range(mebibytes):
                file.append([bytes(1 << 20)])
            status = Path(f"/proc/{file._age.pid}/status").read_text()
            peaks.append(int(status.split("VmHWM:")[1].split()[0]) << 10)
            file.end()
        (tmp_path / f"{mebibytes}").unlink()
    assert peaks[1] < peaks[0] + (4 << 20)
    assert peaks[1] < 16 << 20


def test_an_encrypted_dump_is_not_gone_on_with(source: str, key: Key, tmp_path: Path, run: Run) -> None:
    ran = run("dump", "--resume", "--recipients", key.recipients, source, tmp_path / "dump")
    assert ran.status == 2
    assert "an encrypted dump cannot be gone on with: this machine cannot read it back" in ran.err


@pytest.mark.parametrize("option", ["--force", "--resume"])
def test_to_standard_output_goes_a_new_dump_only(option: str, source: str, run: Run) -> None:
    ran = run("dump", option, source, "-")
    assert ran.status == 2
    assert "to standard output goes one new dump, unencrypted" in ran.err


def test_a_failed_start_leaves_no_file(source: str, tmp_path: Path, run: Run) -> None:
    bad = tmp_path / "bad"
    bad.write_text("age1nonsense\n")
    ran = run("dump", "--recipients", bad, source, tmp_path / "dump")
    assert ran.status == 5
    assert "malformed recipient at line 1" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "core"]
