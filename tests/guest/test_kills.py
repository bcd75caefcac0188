"""The kill matrix on a real crash boot: /proc/vmcore is saved to ext4, and killed at every operation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.guest import disk
from tests.guest.cache import Kernel
from tests.guest.cases import RESCUE
from tests.guest.crash import (
    TARGET_LABEL,
    ImageStore,
    demand,
    image_python,
    rescue_shell,
    target_image,
)
from tests.guest.qemu import BOOT_TIMEOUT
from tests.lab.drgn_view import wrong_for_drgn
from tests.lab.invariants import Reference, Seen, directories, look, reference_of
from tests.lab.walk import UNDISTURBED

WALK_TIMEOUT = 1500.0


class Part(NamedTuple):
    """Points at every ``every``-th operation from the ``first`` on; what is left is kept of every ``keep_every``-th."""

    every: int
    first: int
    keep_every: int

    def __str__(self) -> str:
        return f"{self.first}-of-{self.every}"


MOST_TABLES = 500
"""More than the page tables of a small machine: they are saved, and described, before all other pages."""
SAMPLE = Part(12, 4, 4)
PARTS = 2
WHOLE = [Part(PARTS, first, 6) for first in range(1, PARTS + 1)]
"""All operations, in parts that take minutes each."""


@pytest.mark.parametrize("part", [SAMPLE, *(pytest.param(part, marks=pytest.mark.long) for part in WHOLE)], ids=str)
def test_killed_at_any_operation_a_save_leaves_what_is_promised_and_goes_on(
    part: Part, kernels: Callable[[str], Kernel], image_store: ImageStore, tmp_path: Path
) -> None:
    """In the guest each dump is held against /proc/vmcore page by page; here drgn reads some of them."""
    kernels(RESCUE.kernel)  # skips here, where it can say why
    case = replace(RESCUE, crashkernel="320M")
    with rescue_shell(case, image_store, tmp_path, target="LABEL=none", append="vmcapture.wait=1") as machine:
        python = image_python(machine)
        demand(machine, "mkdir -p /run/healthy /run/target && mount -t ext4 -o ro LABEL=healthy /run/healthy")
        demand(machine, f"mount LABEL={TARGET_LABEL} /run/target && mkdir /run/target/lab")
        where = f"--every {part.every} --first {part.first} --keep-every {part.keep_every}"
        walk = f"{python} -m tests.lab.walk /proc/vmcore /run/target/lab {where}"
        status, said = machine.run(walk, WALK_TIMEOUT)
        assert status == 0, said
        demand(machine, "umount /run/target")
        machine.send("poweroff -f")
        machine.wait_exit(BOOT_TIMEOUT)
    assert "BROKEN" not in said
    counted = re.search(r"^all +(\d+) +(\d+)$", said, re.MULTILINE)
    assert counted is not None, said
    assert counted[1] == counted[2]
    assert int(counted[1]) > 220 // part.every
    assert re.search(r"^went-on .* went on, whole", said, re.MULTILINE), said
    image = target_image(tmp_path)
    disk.check(image)
    kept = disk.extract(image, "/lab/kept", tmp_path / "from-the-guest")
    (undisturbed,) = directories(kept / UNDISTURBED)
    reference = reference_of(undisturbed / "vmcore", undisturbed, wrong_for_drgn)
    left = [folder for folder in sorted(kept.iterdir()) if folder.name != UNDISTURBED]
    seen = {folder.name: looked_at(folder, reference) for folder in left}
    assert {name: found.wrong for name, found in seen.items() if found.wrong} == {}
    assert any(state.pages > 0 for found in seen.values() for state in found.states.values()), "dumps, not only logs"


def looked_at(folder: Path, reference: Reference) -> Seen:
    """Hold what a kill left against what is promised, with drgn once it can read: it needs all of the page tables."""
    seen = look(folder, reference._replace(other_reader=None))
    if seen.wrong or all(state.pages <= MOST_TABLES for state in seen.states.values()):
        return seen
    return look(folder, reference)
