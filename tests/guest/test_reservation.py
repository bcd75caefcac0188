"""Capture kernels with little memory, and with more than one CPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.guest.cases import RESERVATION_CASES, Case, parameters
from tests.guest.crash import BOOT_ATTEMPTS, ImageStore, Saved, crash
from tests.guest.qemu import GuestError
from tests.readers import drgn_reader


@pytest.fixture(scope="session", params=parameters(RESERVATION_CASES), ids=str)
def saved(
    request: pytest.FixtureRequest, image_store: ImageStore, kernels: Callable[[str], Any], guest_folder: Path
) -> Saved:
    """What the capture kernel of a case saved.

    QEMU without KVM now and then loses a kernel with several CPUs (see ``booted``), a capture kernel too: such a crash
    is tried again.
    """
    case: Case = request.param
    kernels(case.kernel)
    for attempt in range(1, BOOT_ATTEMPTS + 1):
        try:
            return crash(case, image_store, guest_folder / f"{case.name}-{attempt}")
        except GuestError:
            if case.capture_cpus == 1 or attempt == BOOT_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def manifest(saved: Saved) -> Any:
    return json.loads((saved.saved / "manifest.json").read_text())


def test_everything_is_saved(saved: Saved) -> None:
    assert manifest(saved)["complete"]
    assert manifest(saved)["dump"]["level"] == 31
    drgn_reader(saved.saved / "vmcore")


def test_the_capture_kernel_has_the_cpus_that_load_gave_it(saved: Saved) -> None:
    assert manifest(saved)["capture_machine"]["cpus"] == saved.case.capture_cpus


def test_there_was_memory_left(saved: Saved) -> None:
    machine = manifest(saved)["capture_machine"]
    assert machine["memory_total"] < int(saved.case.crashkernel.rstrip("M")) << 20
    assert 0 < machine["peak_rss"] < machine["memory_total"]
    assert machine["memory_available_least"] > 0
    assert re.search("Out of memory|invoked oom-killer", saved.console) is None


def test_the_manifest_says_which_levels_the_dump_was_compressed_with(saved: Saved) -> None:
    dump = manifest(saved)["dump"]
    assert dump["compression"] == "zstd:auto"
    assert sum(dump["pages_by_zstd_level"].values()) == dump["pages"] - dump["zero_pages"]
    assert dump["target_bytes_per_second"] > 0
