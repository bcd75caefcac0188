"""A local file system: find the device that ``LABEL=``, ``UUID=`` or a path names, and mount it.

The superblocks of the usual file systems are looked at first, because of disks that hang; the others are left to
``findfs`` (busybox in the capture kernel), which knows many.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from capture import pulse
from capture.boot import mounting, superblocks, volumes
from capture.boot.programs import ended
from capture.boot.waiting import attempts
from capture.console import Console
from capture.errors import TargetError


@contextmanager
def mounted(target: str, wait: int, console: Console, device: str | None = None) -> Iterator[Path]:
    """Mount ``target``, waiting up to ``wait`` seconds for it to appear.

    ``device`` is where it was found before (``look_up``); where that is gone, it is looked for again.

    Raises:
        TargetError: it did not appear, or cannot be mounted read-write.
    """
    if device is None or not Path(device).is_block_device():
        device = find_device(target, wait, console)
    command = ["mount", "-o", superblocks.options_for_all_of(device, "rw"), device]
    with mounting.mounted(command, target, f"{target} ({device})", console) as point:
        yield point


def find_device(target: str, wait: int, console: Console) -> str:
    """Return the block device of ``target``.

    Raises:
        TargetError: there is none after ``wait`` seconds.
    """
    assembly = volumes.Assembly(wait, console.say)
    for _ in attempts(time.monotonic() + wait, console, lambda: f"waiting up to {wait} s for {target}"):
        assembly.go_on()
        device = look_up(target)
        if device is not None:
            return device
    lacking = f" ({assembly.line})" if assembly.line else ""
    raise TargetError(
        f"target {target}: no such file system{f' after {wait} s' if wait else ''}{lacking}; attach it and "
        "save again, or mount any other and name it: vmcapture save DIR"
    )


def look_up(target: str, known: Mapping[superblocks.Tag, str] | None = None) -> str | None:
    """Return the block device of ``target`` when it is there now.

    ``known``: what all superblocks that could be read have just said.

    Raises:
        TargetError: there is no findfs to ask.
    """
    if "=" not in target:
        return target if Path(target).is_block_device() else None
    tag = tag_of(target)
    if known is None:
        with pulse.at_target():
            known = superblocks.devices_with([tag])
    found = known.get(tag)
    if found is None and not superblocks.some_hang():
        found = _found_by_findfs(target)
    return None if found is None else _topmost(found, target)


def tag_of(target: str) -> superblocks.Tag:
    """Return both halves of ``TAG=VALUE``."""
    tag, _, value = target.partition("=")
    return tag, value


def _found_by_findfs(target: str) -> str | None:
    try:
        answer = ended(["findfs", target])
    except OSError as error:
        raise TargetError(f"findfs cannot be run ({error.strerror}): name the target by its device, /dev/...") from None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _topmost(device: str, target: str) -> str | None:
    """Return what carries ``target`` at the top of all that stands on ``device``."""
    tops = volumes.tops(device)
    if tops == [device] and volumes.is_member(device):  # of an array that is not there yet
        return None
    if len(tops) == 1:
        return tops[0]
    tag = tag_of(target)
    return superblocks.devices_with([tag], tops).get(tag, device)
