"""How large a dump could be: arithmetic on what the kernel says of its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs import predict
from initramfs.predict import Prediction

MIB = 1 << 20
MEMINFO = """\
MemTotal:         900000 kB
MemFree:          500000 kB
MemAvailable:     700000 kB
Buffers:           10000 kB
Cached:            80000 kB
SwapCached:         1000 kB
AnonPages:         60000 kB
HugePages_Total:       2
Hugetlb:            4096 kB
"""
IOMEM = """\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-3fffffff : System RAM
  1a000000-1b0023d0 : Kernel code
  2c000000-37ffffff : Crash kernel
feffc000-feffffff : Reserved
"""
RAM = 0x9FC00 - 0x1000 + 0x40000000 - 0x100000


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "meminfo").write_text(MEMINFO)
    (tmp_path / "iomem").write_text(IOMEM)
    return tmp_path / "meminfo", tmp_path / "iomem"


@pytest.mark.parametrize(
    ("level", "left_out"),
    [
        (0, 0),
        (1, 0),  # how many pages are zeros, nobody knows
        (2, 0),  # of the cache some has private data
        (4, 91_000),
        (8, 64_096),
        (16, 500_000),
        (17, 500_000),
        (31, 655_096),
    ],
)
def test_a_level_leaves_out_what_it_says(level: int, left_out: int, files: tuple[Path, Path]) -> None:
    reserved = 128 * MIB
    assert predict.predict(level, reserved, *files) == Prediction(level, RAM - reserved - left_out * 1024)


def test_who_may_not_see_addresses_is_given_the_kernels_total(files: tuple[Path, Path], tmp_path: Path) -> None:
    files[1].write_text("00000000-00000000 : Reserved\n00000000-00000000 : System RAM\n")
    assert predict.predict(0, 192 * MIB, *files).most == 900_000 * 1024
    assert predict.predict(0, 0, files[0], tmp_path / "none").most == 900_000 * 1024


def test_it_is_never_less_than_nothing(files: tuple[Path, Path]) -> None:
    files[0].write_text("MemTotal: 10 kB\nMemFree: 9999999999 kB\n")
    assert predict.predict(31, 0, *files).most == 0


def test_this_machine() -> None:
    everything, least = predict.predict(0, 0), predict.predict(31, 0)
    assert 0 < least.most < everything.most
    assert predict.meminfo_bytes()["MemTotal"] <= everything.most
