"""The estimate: what is reserved is enough for what is said to be needed, and CPUs come with the room."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from initramfs import estimate
from initramfs.estimate import MIB

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
    parts_sum = sum(float(part.split()[1]) for part in parts)
    assert parts_sum * MIB <= found.needed <= parts_sum * MIB * 1.02
    assert found.values()["reservation"] == found.reservation


def test_a_plain_tree_takes_the_memory_that_it_is_unpacked_into(tmp_path: Path) -> None:
    packed, squashfs = tmp_path / "plain", tmp_path / "squashfs"
    packed.write_bytes(gzip.compress(bytes(10 * MIB)))
    squashfs.write_bytes(b"070701" + bytes(MIB))
    assert estimate.unpacked_size(packed) == 10 * MIB
    assert estimate.memory_of(packed) == 10 * MIB
    assert estimate.unpacked_size(squashfs) is None
    assert estimate.memory_of(squashfs) == squashfs.stat().st_size
