"""One laboratory a session: a small vmcore, and an undisturbed save of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.drgn_view import wrong_for_drgn
from tests.lab.matrix import Laboratory, disk, small_vmcore


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    source = small_vmcore(tmp_path_factory.mktemp("laboratory") / "vmcore.elf")
    with disk() as targets:
        yield Laboratory(targets, source, wrong_for_drgn)
