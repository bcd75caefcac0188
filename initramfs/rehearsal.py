"""A crash rehearsed: the targets are written to, and a guest in QEMU crashes with what this machine is armed with.

The guest has this machine's kernel, capture image, reservation and options; its disk is its own, because this machine's
targets cannot be handed to it: they are tried here. What a guest cannot show is how this machine's firmware and devices
live through a crash: ``vmcapture test --crash`` shows that.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from capture.boot import config as boot_config
from capture.boot.targets import LOCAL, RAW, VIRTIOFS, kind_of
from capture.errors import CaptureError
from initramfs import estimate, kexec, measure, places, qemu, stamp, targets
from initramfs.errors import NotSavedError, ToolError
from initramfs.status import BAD, DOUBT, DOUBTFUL, GOOD, Check, Status, Wanted
from initramfs.wishes import Wishes

MODULES = Path("/lib/modules")
DEADLINE = 600
"""Seconds for the guest: a minute without KVM on an idle host, and many times as long on a busy one."""
NOT_FOR_A_GUEST = ("target", "path", "final", "failure", "wait")
"""Words of ``vmcapture.…=`` that are the machine's own."""
_TRIAL = b"vmcapture test\n" * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """What to rehearse: a machine as its status says it is armed."""

    state: Status
    wanted: Wanted
    deadline: int = DEADLINE  # seconds
    guest: bool = True
    wishes: Wishes = field(default_factory=Wishes)  # for targets on other machines


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What it came to."""

    checks: tuple[Check, ...]

    @property
    def exit_status(self) -> int:
        """0: all went well; 1: something did not; 3: it could not be tried, or only in part."""
        states = {check.state for check in self.checks}
        return 1 if BAD in states else DOUBTFUL if DOUBT in states else 0

    def lines(self) -> list[str]:
        """Return it for a person."""
        first = {
            0: "the rehearsal went well",
            1: "a crash would not be saved",
            DOUBTFUL: "what could be tried went well; not all could",
        }[self.exit_status]
        return [first, *(check.line() for check in self.checks)]


def rehearse(request: Request, say: Callable[[str], object]) -> Rehearsal:
    """Try everything but the crash of this machine."""
    state = request.state
    # What is not as it should be comes first; what is tried below need not be said twice.
    tried = "target" if state.targets else None
    checks = [check for check in state.checks if check.state != GOOD and check.name != tried]
    if state.loaded is None:
        return Rehearsal(tuple(checks))
    checks += _image(request, Path(state.loaded.image))
    path = boot_config.parse(state.loaded.command_line).path
    for target in state.targets:
        say(f"writing to {target.target}")
        checks.append(_target(target.target, path, request.wishes))
    if request.guest:
        checks.append(_guest(request, say))
    return Rehearsal(tuple(checks))


def _image(request: Request, image: Path) -> Iterator[Check]:
    """Ask what an image would have to hold now: each kind of target looks at its route, its keys, its devices."""
    try:
        request.wanted.image(image)
    except CaptureError as error:
        yield Check("image", BAD, f"it could not be built now: {error}")
    else:
        yield Check("image", GOOD, "it could be built now: what each target needs is there")


def _target(target: str, path: str, wishes: Wishes) -> Check:
    local = kind_of(target) == LOCAL
    try:
        if local:
            with places.opened(target, path, "rw,nosuid,nodev,noexec") as place:
                _refuse_link(place.path)
                _write(place.path)
        else:
            targets.needed_by(target, wishes._replace(path=path, check=True))
    except (CaptureError, OSError) as error:
        return Check("target", BAD, f"{target}: {places.reason(error, target)}", "a save there would fail")
    if kind_of(target) == RAW:
        return Check(
            "target", GOOD, f"{target}: it is there, and nothing is on it that would be lost; nothing was written"
        )
    where = "it" if kind_of(target) == VIRTIOFS else path
    return Check("target", GOOD, f"{target}: a file was written to {where}{', read back' if local else ''} and removed")


def _refuse_link(directory: Path) -> None:
    """Refuse what leads to the right place on this machine only: in the capture kernel its root is elsewhere.

    Raises:
        ToolError: a part of the path is an absolute symbolic link.
    """
    for part in (directory, *directory.parents):
        if part.is_symlink() and part.readlink().is_absolute():
            raise ToolError(f"{part} is a symbolic link to {part.readlink()}, which is not followed: name that as path")


def _write(directory: Path) -> None:
    """Write a file as a save would, and read it back; directories that were missing are removed again."""
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    file = directory / f".vmcapture-test-{secrets.token_hex(8)}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, _TRIAL)
            os.fsync(descriptor)
            if os.pread(descriptor, len(_TRIAL), 0) != _TRIAL:
                raise ToolError("what was written is not what is read")
        finally:
            os.close(descriptor)
            file.unlink()
    finally:
        with contextlib.suppress(OSError):  # somebody else has put something there, or they are not there
            for folder in made:
                folder.rmdir()


def _guest(request: Request, say: Callable[[str], object]) -> Check:
    loaded, reservation = request.state.loaded, request.state.reservation
    assert loaded is not None  # rehearse() has looked
    image, kernel = Path(loaded.image), Path(loaded.kernel)
    made_from = stamp.read(image)
    release = os.uname().release if made_from is None else made_from.release
    fast = qemu.accelerators()[0] != "tcg"
    try:
        asked = measure.Request(
            kernel=kernel,
            modules_dir=MODULES / release,
            image=image,
            image_memory=estimate.memory_of(image),
            first=reservation,
            cpus=kexec.cpus_of(loaded.command_line) if fast else 1,
            deadline=request.deadline,
            append=options_of(loaded.command_line),
        )
        with tempfile.TemporaryDirectory(prefix="vmcapture-", ignore_cleanup_errors=True) as scratch:
            lab = measure.Laboratory(asked, Path(scratch) / "guest", say)
            run = lab.crash(reservation)
    except NotSavedError as error:
        return Check("guest", BAD, f"not all of a guest's crash was saved: {error}")
    except CaptureError as error:
        return Check("guest", DOUBT, f"no guest was crashed: {error}")
    except OSError as error:
        return Check("guest", DOUBT, f"no guest was crashed: {error.filename or 'system'}: {error.strerror}")
    what = (
        f"a guest with {release} and {reservation >> 20} MiB reserved crashed in QEMU ({lab.accelerators[0]}), and all "
        f"was saved; {run.memory_available_least >> 20} MiB were left at the least"
    )
    if lab.drivers:
        what += f"; without the devices of {', '.join(lab.drivers)}"
    return Check("guest", GOOD, what)


def options_of(command_line: str) -> str:
    """Return the words for us on a capture kernel's command line that a guest can be given."""
    words = [word for word in command_line.split() if word.startswith("vmcapture.")]
    return " ".join(word for word in words if word.partition("=")[0].partition(".")[2] not in NOT_FOR_A_GUEST)
