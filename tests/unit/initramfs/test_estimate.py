"""The estimate: what is reserved is enough for what is said to be needed, and CPUs come with the room."""

from __future__ import annotations

import gzip
import io
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from initramfs import cpio, estimate
from initramfs.estimate import MIB
from initramfs.tree import File, Tree

sizes = st.integers(0, 1 << 30)


@given(sizes, st.integers(1, estimate.MAX_CPUS), sizes)
def test_the_reservation_holds_what_is_needed_in_whole_steps(image: int, cpus: int, target: int) -> None:
    found = estimate.estimate(image, cpus, target)
    assert found.needed <= found.reservation < found.needed + estimate.STEP
    assert found.reservation % estimate.STEP == 0
    assert found.parameter == f"crashkernel={found.reservation // MIB}M"
    assert found.needed >= image
    assert found.needed >= target


@given(sizes, sizes, st.integers(1, 64))
def test_as_many_cpus_as_fit_and_one_in_any_case(reservation: int, image: int, online: int) -> None:
    cpus = estimate.cpus_for(reservation, image, online)
    assert 1 <= cpus <= min(online, estimate.MAX_CPUS)
    if cpus > 1:
        assert estimate.estimate(image, cpus).needed <= reservation
    if cpus < min(online, estimate.MAX_CPUS):
        assert estimate.estimate(image, cpus + 1).needed > reservation


def test_what_the_target_takes_leaves_room_for_fewer_cpus() -> None:
    assert estimate.cpus_for(128 * MIB, 13 * MIB, 64, 16 * MIB) == 1


@pytest.mark.parametrize(("reserved", "cpus"), [(96, 1), (112, 1), (128, 3), (160, 7), (256, 8)])
def test_cpus_with_an_image_of_today(reserved: int, cpus: int) -> None:
    assert estimate.cpus_for(reserved * MIB, 13 * MIB, 64) == cpus


def test_the_lines_name_every_part_and_sum_up() -> None:
    found = estimate.estimate(21 * MIB, 2)
    parameter, *parts = found.lines()
    assert parameter == found.parameter
    assert [part.split()[0] for part in parts] == ["kernel", "drivers", "image", "job", "spare"]
    assert "target" in estimate.estimate(21 * MIB, 2, MIB).lines()[5]
    assert estimate.estimate(100 * MIB).needed > 40 * MIB + 300 * MIB  # half of the memory, and the packed image
    large = estimate.estimate(46 * MIB)
    assert [part.split()[0] for part in large.lines()[1:]] == ["kernel", "drivers", "image", "job", "spare", "unpack"]
    for whole in (found, large):
        parts_sum = sum(float(part.split()[1]) for part in whole.lines()[1:])
        assert (parts_sum - 0.3) * MIB <= whole.needed <= (parts_sum + 0.3) * MIB * 1.02
    assert found.values()["reservation"] == found.reservation


def test_a_plain_tree_takes_the_memory_that_it_is_unpacked_into(tmp_path: Path) -> None:
    packed, squashfs = tmp_path / "plain", tmp_path / "squashfs"
    packed.write_bytes(gzip.compress(bytes(10 * MIB)))
    squashfs.write_bytes(b"070701" + bytes(MIB))
    assert estimate.unpacked_size(packed) == 10 * MIB
    assert estimate.memory_of(packed) == 10 * MIB
    assert estimate.unpacked_size(squashfs) is None
    assert estimate.memory_of(squashfs) == squashfs.stat().st_size


def archive(content: bytes) -> bytes:
    tree, output = Tree(), io.BytesIO()
    tree.add("/file", File(content))
    cpio.write(tree, output)
    return output.getvalue()


def zstd(content: bytes) -> bytes:
    """As a pipe is compressed: the frame does not say how long it is."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstd])
@pytest.mark.parametrize("before", [b"", archive(b"microcode"), archive(b"one") + bytes(1024) + archive(b"two")])
def test_a_distributions_image_takes_what_it_is_unpacked_into(
    pack: Callable[[bytes], bytes], before: bytes, tmp_path: Path
) -> None:
    image, main = tmp_path / "image", archive(bytes(3 * MIB))
    image.write_bytes(before + pack(main))
    assert estimate.unpacked_size(image) == len(before) + len(main)


def test_an_image_that_cannot_be_read_is_guessed(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(lzma.compress(os.urandom(3 * MIB))[:-MIB])
    assert estimate.unpacked_size(image) == estimate.USUAL_RATIO * image.stat().st_size


def test_an_image_that_nobody_here_can_unpack_is_guessed(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"\x02\x21\x4c\x18" + bytes(MIB))
    assert estimate.unpacked_size(image) == estimate.USUAL_RATIO * image.stat().st_size


def test_an_image_that_is_not_packed_takes_its_own_size(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(archive(bytes(MIB)))
    assert estimate.unpacked_size(image) is None
    assert estimate.memory_of(image) == image.stat().st_size
