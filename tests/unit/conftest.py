"""Fixtures: the corpus of real vmcores, small vmcores as files, the command line in-process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zstandard

from capture.cli import main
from tests.encryption import Key, make_key
from tests.guest.conftest import unavailable
from tests.guest.host import HostError
from tests.openssh import OpenSSH
from tests.outcome import Ran, Run

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS_VARIABLE = "VMCAPTURE_CORPUS"
CORPUS = ("linux-6.1-la57", "linux-6.12")
ADVICE = f"set {CORPUS_VARIABLE} to the folder of the vmcore corpus"


def corpus_folder() -> Path:
    """Where the corpus of real vmcores is, if it is anywhere."""
    return Path(os.environ.get(CORPUS_VARIABLE) or REPOSITORY.parent / "shared" / "corpus")


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``corpus_file("linux-6.12")``: the vmcore of that name, decompressed once a session."""
    folder = corpus_folder()
    unpacked = tmp_path_factory.mktemp("corpus")

    def vmcore(name: str) -> Path:
        packed, target = folder / f"{name}.elf.zst", unpacked / f"{name}.elf"
        if not packed.exists():
            pytest.skip(f"{packed} is not there: {ADVICE}")
        if not target.exists():
            with packed.open("rb") as source, target.open("wb") as sink:
                zstandard.ZstdDecompressor(max_window_size=1 << 27).copy_stream(source, sink)
        return target

    return vmcore


@pytest.fixture(scope="session", params=CORPUS)
def corpus_vmcore(request: pytest.FixtureRequest, corpus_file: Callable[[str], Path]) -> Path:
    """Each vmcore of the corpus in turn."""
    return corpus_file(request.param)


@pytest.fixture
def vmcore_file(tmp_path: Path) -> Callable[[bytes], str]:
    """Write bytes to a file and return its name, as SOURCE."""

    def write(data: bytes, name: str = "vmcore.elf") -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


@pytest.fixture
def key(tmp_path: Path) -> Key:
    """A key pair to encrypt to."""
    return make_key(tmp_path)


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """Run the command line in this process: ``run("dump", source, target)``."""

    def command(*arguments: str | Path) -> Ran:
        capfdbinary.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        out, err = capfdbinary.readouterr()
        return Ran(status, out.decode(), err.decode())

    return command


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = corpus_folder()
    for item in items:
        names = getattr(item, "fixturenames", [])
        if "corpus_file" in names or "corpus_vmcore" in names:
            item.add_marker(pytest.mark.corpus)
            if not folder.is_dir():  # said once for each file of tests, not for each test
                item.add_marker(pytest.mark.skip(f"{folder} is not there: {ADVICE}"))


@contextmanager
def running_openssh(folder: Path) -> Iterator[OpenSSH]:
    """A real OpenSSH server on this machine, which sees what is mounted now."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists() or shutil.which("sshfs") is None:
        unavailable("sshfs needs root, /dev/fuse and the package sshfs")
    server = OpenSSH(folder / "openssh")
    try:
        server.start()
    except HostError as error:
        unavailable(str(error))
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def openssh(tmp_path: Path) -> Iterator[OpenSSH]:
    """A real OpenSSH server on this machine."""
    with running_openssh(tmp_path) as server:
        yield server
