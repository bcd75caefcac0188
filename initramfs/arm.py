"""Brings a machine into the state in which a crash is saved: an image that is current, and loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from capture.console import Console
from capture.errors import CaptureError, IncompleteError
from initramfs import kexec, state
from initramfs.errors import ImageError, KexecError, StateError, ToolError
from initramfs.kexec import CrashKernel, Loaded

DOUBTFUL = IncompleteError.exit_status
"""Armed, but not with what should be."""
LOCK = Path("/run/vmcapture/arm.lock")

Run = Callable[[Sequence[str]], int]
"""Runs ``vmcapture`` with these words; returns its exit status."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the machine is to be armed with."""

    release: str
    kernel: Path
    image: Path
    words: tuple[str, ...] = ()  # options of both commands: --config, --quiet
    load: bool = True
    force: bool = False  # whether or not anything has changed


def arm(wanted: Wanted, run: Run, console: Console) -> int:
    """Build the image if something that it is made from has changed, and load it if it is not loaded as it is.

    A machine that is not armed is armed first as it was the last time: it may crash while the image is built. It stays
    so where the new cannot be had, whatever is wrong (the configuration, since somebody edited it). Where only the
    image cannot be built now (its disk is not attached) and one is there, that is loaded: an older one saves most
    crashes, none saves no crash. DOUBTFUL is returned then.

    Raises:
        CaptureError: the machine cannot be armed; or it is already, and not as it is wanted.
    """
    with _alone(console):
        as_before = wanted.load and not _is_armed() and _as_before(wanted.image)
        try:
            status = _arm(wanted, run, console)
        except CaptureError as error:
            if wanted.load and not _is_armed():  # a load that fails may have freed what was loaded before
                as_before = _as_before(wanted.image)
            if not as_before:
                raise
            console.say(f"{error}; meanwhile the machine is armed as it was the last time")
            return DOUBTFUL
        _remember(kexec.loaded() if wanted.load else None, before_of(wanted.image))
        return status


def _arm(wanted: Wanted, run: Run, console: Console) -> int:
    needed = () if wanted.force else ("--if-needed",)
    doubtful = 0
    try:
        words = ("--kernel", wanted.release, "-o", str(wanted.image))
        status = run(("initramfs", *words, *needed, *wanted.words))
    except (ImageError, ToolError) as error:
        if not wanted.load or not wanted.image.exists():
            raise
        console.say(f"{error}; the image that is there, {wanted.image}, is used")
        doubtful = DOUBTFUL
    else:
        if status or not wanted.load:
            return status
    words = ("--kernel-image", str(wanted.kernel), "--image", str(wanted.image))
    return run(("load", *words, *needed, *wanted.words)) or doubtful


def before_of(image: Path) -> Path:
    """Return where it stands how a machine with this image was armed the last time."""
    return image.with_name(f"{image.name}.loaded")


def _remember(loaded: Loaded | None, record: Path) -> None:
    """Write down how the machine is armed, where that is something else than the last time."""
    if loaded is not None and state.read(record) != asdict(loaded):
        with contextlib.suppress(StateError):
            state.write(record, asdict(loaded))


def _is_armed() -> bool:
    """Return whether a capture kernel is loaded that knows the machine's memory as it is now."""
    there = kexec.loaded()
    return kexec.armed() and (there is None or kexec.out_of_date(there) is None)


def _as_before(image: Path) -> bool:
    """Arm the machine as it was the last time; return whether that could be done."""
    record = state.read(before_of(image))
    if record is None:
        return False
    try:
        kernel, line, syscall = (str(record[name]) for name in ("kernel", "command_line", "syscall"))
        kexec.load(CrashKernel(Path(kernel), image, line, syscall))
    except (KeyError, CaptureError):
        return False
    return True


@contextmanager
def _alone(console: Console) -> Iterator[None]:
    """Wait until nobody else arms the machine: a kernel's installation, plugged memory and the boot may coincide."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(state.alone(LOCK, lambda: console.say("somebody else is arming this machine: waiting")))
        except PermissionError:
            raise KexecError("only root may arm a machine: use sudo") from None
        yield
