"""Files being written: private from the first byte, whole writes, block hashes, and every way to be refused."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import pulse
from capture.dumpfile import output as module
from capture.dumpfile.output import HASH_BLOCK, OutputFile, TargetFullError, sync_directory
from capture.errors import TargetError
from tests.faults import file_size_limit, raising, refused_to_others, tmpfs, umask
from tests.outcome import sha256_blocks


def written(path: Path) -> closing[OutputFile]:
    return closing(OutputFile(path))


# --- creating


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_new_file_is_for_its_owner_only_whatever_the_umask(mask: int, tmp_path: Path) -> None:
    with umask(mask), written(tmp_path / "dump"):
        assert (tmp_path / "dump").stat().st_mode & 0o7777 == 0o600


def test_an_existing_file_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "dump").write_bytes(b"precious")
    with pytest.raises(TargetError, match="exists"):
        OutputFile(tmp_path / "dump")
    assert (tmp_path / "dump").read_bytes() == b"precious"


@pytest.mark.parametrize("target", [b"precious", None], ids=["to a file", "dangling"])
def test_a_symbolic_link_is_not_followed(target: bytes | None, tmp_path: Path) -> None:
    if target is not None:
        (tmp_path / "elsewhere").write_bytes(target)
    (tmp_path / "dump").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TargetError):
        OutputFile(tmp_path / "dump")
    assert (tmp_path / "elsewhere").exists() == (target is not None)
    assert target is None or (tmp_path / "elsewhere").read_bytes() == target


def test_a_directory_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="create the directory first") as failed:
        OutputFile(tmp_path / "missing" / "dump")
    assert str(tmp_path / "missing" / "dump") in str(failed.value)
    assert failed.value.exit_status == 5


def test_a_read_only_file_system_is_named_with_the_remedy(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "ro,size=64k") as disk, pytest.raises(TargetError, match="mount it read-write"):
        OutputFile(disk / "dump")


def test_a_directory_that_may_not_be_written_is_named_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused_to_others(lambda: OutputFile(tmp_path / "locked" / "dump"), TargetError, "check its permissions")


# --- writing


def test_pieces_lie_one_after_another(tmp_path: Path) -> None:
    with written(tmp_path / "dump") as file:
        assert file.write([b"ab", memoryview(b"xcdx")[1:3], b"", memoryview(bytearray(b"ef"))], 3) == 6
        assert file.size == 9
    assert (tmp_path / "dump").read_bytes() == b"\0\0\0abcdef"


def test_more_pieces_than_one_system_call_takes(tmp_path: Path) -> None:
    pieces = [bytes([number % 256]) * (number % 3) for number in range(5000)]  # IOV_MAX is 1024
    with written(tmp_path / "dump") as file:
        assert file.write(pieces, 0) == len(b"".join(pieces))
    assert (tmp_path / "dump").read_bytes() == b"".join(pieces)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=30), st.lists(st.integers(1, 50), min_size=1, max_size=10))
def test_a_write_that_the_kernel_cuts_short_is_carried_on(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], cuts: list[int]
) -> None:
    real, turns = os.pwritev, [0]

    def short(fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        turns[0] += 1
        return real(fd, [b"".join(buffers)[: cuts[turns[0] % len(cuts)]]], offset)

    path = tmp_path_factory.mktemp("short") / "dump"
    with pytest.MonkeyPatch.context() as patch, written(path) as file:
        patch.setattr(os, "pwritev", short)
        file.write(pieces, 5)
    assert path.read_bytes()[5:] == b"".join(pieces)


def test_reserved_room_is_taken_and_reads_as_zeros_until_it_is_written(tmp_path: Path) -> None:
    with written(tmp_path / "dump") as file:
        file.reserve(100, 1 << 20)
        file.write([b"x"], 200)
        assert file.size == 100 + (1 << 20)
        file.reserve(7, 0)
        assert file.size == 100 + (1 << 20)
        assert (tmp_path / "dump").stat().st_blocks * 512 >= 1 << 20
    assert (tmp_path / "dump").read_bytes() == bytes(200) + b"x" + bytes(100 + (1 << 20) - 201)


def test_to_reserve_much_is_a_sign_of_life_every_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file system cannot, each block is written: a terabyte's descriptors take a server minutes."""
    monkeypatch.setattr(module, "_RESERVED_AT_ONCE", 1 << 16)
    signs = pulse.Pulse()
    with written(tmp_path / "dump") as file:
        pulse.share(signs)
        try:
            file.reserve(100, (1 << 20) + 1)
        finally:
            pulse.share(None)
        assert (signs.beats, signs.waits_for_target) == (17, False)
        assert file.size == (tmp_path / "dump").stat().st_size == 100 + (1 << 20) + 1
        assert (tmp_path / "dump").stat().st_blocks * 512 > 1 << 20


def test_a_file_can_be_cut_off(tmp_path: Path) -> None:
    with written(tmp_path / "dump") as file:
        file.write([b"0123456789"], 0)
        file.truncate(4)
        assert file.size == 4
        assert file.digests() == sha256_blocks(b"0123", HASH_BLOCK)
    assert (tmp_path / "dump").read_bytes() == b"0123"


# --- block hashes

actions = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.binary(min_size=1, max_size=150), st.just(0)),
        st.tuples(st.just("write"), st.binary(min_size=1, max_size=150), st.integers(0, 500)),
        st.tuples(st.just("reserve"), st.binary(min_size=1, max_size=150), st.integers(0, 500)),
        st.tuples(st.just("truncate"), st.just(b""), st.integers(0, 500)),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=400)
@given(actions)
def test_digests_are_those_of_the_file_whatever_the_order_of_writes(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, bytes, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "digests"
    path.unlink(missing_ok=True)
    model = bytearray()
    with pytest.MonkeyPatch.context() as patch, written(path) as file:
        patch.setattr(module, "HASH_BLOCK", 16)
        for what, data, at in steps:
            where = len(model) if what == "append" else at
            if what == "truncate":
                file.truncate(min(at, len(model)))
                del model[at:]
                continue
            model.extend(bytes(max(0, where + len(data) - len(model))))
            if what == "reserve":
                file.reserve(where, len(data))
            else:
                file.write([data[:20], data[20:]], where)
                model[where : where + len(data)] = data
        assert file.size == len(model)
        assert file.digests() == sha256_blocks(bytes(model), 16)
    assert path.read_bytes() == bytes(model)


def test_a_block_is_64_mib(tmp_path: Path) -> None:
    with written(tmp_path / "dump") as file:
        file.write([b"first"], 0)
        file.write([b"last"], 64 << 20)
        assert file.digests() == [
            hashlib.sha256(b"first".ljust(64 << 20, b"\0")).hexdigest(), hashlib.sha256(b"last").hexdigest(),
        ]  # fmt: skip


def test_an_empty_file_has_no_digest(tmp_path: Path) -> None:
    with written(tmp_path / "dump") as file:
        assert file.digests() == []


def test_a_file_written_in_order_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow disk reading a dump back would double the time of the save."""
    monkeypatch.setattr(module, "HASH_BLOCK", 64)
    data = os.urandom(1000)
    with written(tmp_path / "dump") as file:
        for at in range(0, 1000, 10):
            file.write([data[at : at + 10]], at)
        monkeypatch.setattr(os, "pread", raising(AssertionError("the file was read back")))
        assert file.digests() == sha256_blocks(data, 64)


def test_holes_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bitmaps of a dump may be holes for the most part: of gigabytes, where memory is far apart."""
    monkeypatch.setattr(module, "HASH_BLOCK", 64)
    read = []

    def counted(fd: int, length: int, offset: int) -> bytes:
        read.append(offset)
        return pread(fd, length, offset)

    pread = os.pread
    with written(tmp_path / "dump") as file:
        file.write([b"in the middle"], 64 * 100 + 10)
        file.write([b"end"], 64 * 1000)
        monkeypatch.setattr(os, "pread", counted)
        assert file.digests() == sha256_blocks((tmp_path / "dump").read_bytes(), 64)
    assert read == [0, 64 * 100]


# --- refused


def test_no_room_is_an_error_of_its_own_that_names_the_file(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=64k") as disk, written(disk / "dump") as file:
        file.write([b"a" * 1000], 0)
        with pytest.raises(TargetFullError, match="no room left") as full:
            file.write([b"b" * 100_000], 1000)
        assert str(disk / "dump") in str(full.value)
        assert full.value.exit_status == 5
        with pytest.raises(TargetFullError, match="no room left"):
            file.reserve(0, 1 << 20)
        file.truncate(1000)
        file.write([b"c" * 10], 1000)
        assert (disk / "dump").read_bytes() == b"a" * 1000 + b"c" * 10


def test_a_file_that_may_not_grow_is_an_error_and_keeps_what_fitted(tmp_path: Path) -> None:
    with written(tmp_path / "dump") as file, file_size_limit(1500):
        file.write([b"a" * 1000], 0)
        with pytest.raises(TargetError, match="File too large"):
            file.write([b"b" * 1000], 1000)
        with pytest.raises(TargetError, match="File too large"):
            file.reserve(0, 4096)
    assert (tmp_path / "dump").read_bytes()[:1500] == b"a" * 1000 + b"b" * 500


def test_a_sync_that_fails_is_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with written(tmp_path / "dump") as file:
        monkeypatch.setattr(os, "fdatasync", raising(OSError(errno.EIO, os.strerror(errno.EIO))))
        with pytest.raises(TargetError, match="Input/output error") as failed:
            file.sync()
        assert str(tmp_path / "dump") in str(failed.value)


@pytest.mark.parametrize("before", [0, 30, 64, 100])
@pytest.mark.parametrize("cut", [0, 1, 29, 30, 60])
def test_digests_after_a_failed_write_are_of_what_is_in_the_file(
    before: int, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk may end a write within a block whose bytes were all handed over."""
    monkeypatch.setattr(module, "HASH_BLOCK", 64)
    with written(tmp_path / "dump") as file:
        with file_size_limit(before + 20):
            file.write([os.urandom(before)], 0)
            with pytest.raises(TargetError):
                file.write([os.urandom(200)], before)
        file.truncate(max(0, before - cut))
        left = (tmp_path / "dump").read_bytes()
        assert len(left) == file.size == max(0, before - cut)
        assert file.digests() == sha256_blocks(left, 64)


def test_the_size_after_a_failed_write_is_that_of_the_file(tmp_path: Path) -> None:
    """The manifest names the size: it has to be the one that `ls` shows."""
    with written(tmp_path / "dump") as file:
        with file_size_limit(150), pytest.raises(TargetError):
            file.write([b"a" * 200], 0)
        assert file.size == (tmp_path / "dump").stat().st_size
        assert file.digests() == sha256_blocks((tmp_path / "dump").read_bytes(), HASH_BLOCK)


def test_a_directory_is_synced_or_named(tmp_path: Path) -> None:
    sync_directory(tmp_path)
    with pytest.raises(TargetError, match="missing"):
        sync_directory(tmp_path / "missing")
