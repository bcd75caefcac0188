"""The peer's image: how it is armed, and what is read of its notes; it is booted by ``make bench-reservation``."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import zstandard

from initramfs.kexec import ADDED
from tests.bench import peer_image
from tests.builders import PAGE
from tests.dumps import dump_of
from tests.guest import host
from tests.guest.cache import Kernel
from tests.guest.cases import Case
from tests.guest.host import HostError, Said
from tests.guest.qemu import GuestError

NOTES = {
    "init": "2.5", "mounted": "3.25", "log_status": "0", "log_saved": "3.5", "dump_status": "0", "dump_written": "9.0",
    "dump_saved": "9.75", "memory_total": "90000", "memory_available_least": "50000", "peak_rss": "6000",
}  # fmt: skip


def saved(folder: Path, **changes: str) -> Path:
    """A folder as the image leaves it; a note that is changed to nothing is not there."""
    notes = (NOTES | changes).items()
    (folder / peer_image.NOTES).write_text("".join(f"{key} {value}\n" for key, value in notes if value))
    (folder / peer_image.DUMP).write_bytes(dump_of({pfn: (0, bytes([pfn]) * PAGE) for pfn in (1, 2, 5)}))
    return folder


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "run", lambda *_: Said("", ""))


@pytest.mark.usefixtures("opens")
def test_notes_become_figures(tmp_path: Path) -> None:
    found = peer_image.figures(saved(tmp_path))
    assert (found.complete, found.reason) == (True, "")
    assert (found.memory_total, found.memory_least, found.peak_rss) == (90000 << 10, 50000 << 10, 6000 << 10)
    assert (found.start, found.first_byte, found.end, found.dump_seconds) == (3.25, 3.5, 9.75, 6.25)
    assert (found.dump_pages, found.dump_size) == (3, (tmp_path / peer_image.DUMP).stat().st_size)


@pytest.mark.usefixtures("opens")
def test_makedumpfile_has_to_say_that_it_is_done(tmp_path: Path) -> None:
    found = peer_image.figures(saved(tmp_path, dump_status="137", log_status="1"))
    assert not found.complete
    assert found.reason == "the log ended with status 1; makedumpfile ended with status 137"


def test_a_dump_has_to_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> Said:
        raise HostError("makedumpfile failed with status 1: not a dump")

    monkeypatch.setattr(host, "run", refuses)
    found = peer_image.figures(saved(tmp_path))
    assert not found.complete
    assert found.reason == "the dump does not open: makedumpfile failed with status 1: not a dump"


@pytest.mark.parametrize("key", sorted(NOTES.keys() - {"dump_written"}))
def test_a_note_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(GuestError, match=rf"says nothing of {key}\b"):
        peer_image.figures(saved(tmp_path, **{key: ""}))


def test_a_note_that_is_no_number_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"peer\.txt: .*'much'"):
        peer_image.figures(saved(tmp_path, peak_rss="much"))


def test_without_notes_nothing_was_saved(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match=r"no peer\.txt"):
        peer_image.figures(tmp_path)


@pytest.mark.parametrize("option", ["-c", "-l"])
def test_the_peer_is_armed_with_the_words_that_we_are_armed_with(option: str) -> None:
    command = peer_image.saver(option).load(Case("case"), "poweroff", "LABEL=crash", "panic=-1")
    assert command.startswith("kexec -p -s /run/healthy/vmlinuz --initrd=/run/healthy/peer.img --command-line='")
    line = command.partition("--command-line=")[2].strip("'").split()
    assert {*ADDED, "nr_cpus=1", "vmcapture.target=LABEL=crash", "panic=-1", f"peer_option={option}"} <= set(line)
    assert not [word for word in line if word.startswith("crashkernel")]


@pytest.mark.parametrize("zstd", [True, False])
def test_the_image_is_packed_as_the_kernel_can_unpack_it(tmp_path: Path, zstd: bool) -> None:
    kernel = Kernel("package", "1", "6.1.0", tmp_path / "vmlinuz-6.1.0", tmp_path)
    (tmp_path / "config-6.1.0").write_text("CONFIG_RD_GZIP=y\n" + "CONFIG_RD_ZSTD=y\n" * zstd)
    assert peer_image.takes_zstd(kernel) == zstd
    archive = b"070701" * 1000
    packed = peer_image.packed(archive, zstd=zstd)
    assert (zstandard.decompress(packed) if zstd else gzip.decompress(packed)) == archive


def test_a_kernel_whose_configuration_is_not_there_gets_gzip(tmp_path: Path) -> None:
    assert not peer_image.takes_zstd(Kernel("package", "1", "6.1.0", tmp_path / "vmlinuz-6.1.0", tmp_path))
