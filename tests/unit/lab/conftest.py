"""One laboratory a session: a small vmcore, and an undisturbed save of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from capture.dumpfile import kdump
from capture.dumpfile.writer import KdumpWriter
from tests.builders import PAGE
from tests.lab.drgn_view import wrong_for_drgn
from tests.lab.matrix import Laboratory, disk, small_vmcore


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    source = small_vmcore(tmp_path_factory.mktemp("laboratory") / "vmcore.elf")
    with disk() as targets:
        yield Laboratory(targets, source, wrong_for_drgn)


@pytest.fixture
def described_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that describes pages before they are there."""
    real = KdumpWriter.append

    def append(writer: KdumpWriter, packed: Any) -> None:
        numbers = writer._numbers.of(packed.pfns)
        table = np.zeros(len(numbers), kdump.PAGE_DESCRIPTOR)
        table["offset"], table["size"] = writer._position, PAGE
        writer._describe(numbers, table)
        real(writer, packed)

    monkeypatch.setattr(KdumpWriter, "append", append)
