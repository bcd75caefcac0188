"""Whether this machine would survive a crash right now: what has to hold for it, a check each.

A check is good, a doubt or bad; where it is not good, it says what to do. With one that is bad nothing, or not
all, would be saved. What does not apply to a machine is left out.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from capture.boot import config as boot_config
from capture.boot.config import BootConfig
from capture.console import printable
from capture.errors import CaptureError, IncompleteError
from capture.options import RECIPIENTS
from initramfs import crash_test, estimate, kexec, predict, services, stamp, watchdogs
from initramfs.errors import KexecError
from initramfs.estimate import Estimate
from initramfs.image import ImageRequest
from initramfs.kexec import CrashKernel, Loaded
from initramfs.predict import Prediction
from initramfs.reach import Target, reach
from initramfs.stamp import Stamp
from initramfs.targets import memory_of
from initramfs.units import size_text

GOOD, DOUBT, BAD = "good", "doubt", "bad"
SMALLER = 4
"""What compression makes a dump smaller by (guests of 1 and 4 GiB: 3 to 9, README.md, Speed)."""
LOCKDOWN = Path("/sys/kernel/security/lockdown")
SECURE_BOOT = Path("/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
SYSCTL = Path("/proc/sys/kernel")
DOUBTFUL = IncompleteError.exit_status
ARM = "vmcapture arm"
MAKE_IT = f"let {ARM} make it (by dracut or initramfs-tools: image_builder in /etc/vmcapture.conf)"
LOAD_IT = f"{ARM}; or vmcapture load --image IMG, for an image made by hand"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to hold. ``remedy`` says what to do where it does not."""

    name: str
    state: str  # GOOD, DOUBT or BAD
    what: str
    remedy: str = ""

    def line(self) -> str:
        """Return it for a person."""
        return printable(f"{self.name:<12} {self.state:<5}  {self.what}" + (f": {self.remedy}" if self.remedy else ""))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the machine should be armed with, by its configuration: asked for when it is to be compared."""

    image: Callable[[Path], ImageRequest]
    kernel: Callable[[], CrashKernel]


@dataclass(frozen=True, slots=True)
class Status:
    """All of it. Sizes in bytes, times in seconds since 1970."""

    armed: bool
    reservation: int
    loaded: Loaded | None
    checks: tuple[Check, ...]
    needed: int | None = None
    targets: tuple[Target, ...] = ()
    predicted: Prediction | None = None
    image_built: float | None = None
    encrypted: bool | None = None
    watchdog: str | None = None

    @property
    def verdict(self) -> str:
        """The worst of the checks."""
        states = {check.state for check in self.checks}
        return next((state for state in (BAD, DOUBT) if state in states), GOOD)

    @property
    def exit_status(self) -> int:
        """0: a crash now would be saved; 1: it would not; 3: it would, but for a doubt."""
        return {GOOD: 0, DOUBT: DOUBTFUL, BAD: 1}[self.verdict]

    def values(self) -> dict[str, Any]:
        """Return it as values for JSON."""
        return {
            "armed": self.armed,
            "verdict": self.verdict,
            "reservation": self.reservation,
            "reservation_needed": self.needed,
            "loaded": None if self.loaded is None else asdict(self.loaded),
            "image_built": self.image_built,
            "encrypted": self.encrypted,
            "watchdog": self.watchdog,
            "predicted": None if self.predicted is None else {**asdict(self.predicted), "method": predict.METHOD},
            "targets": [asdict(target) for target in self.targets],
            "checks": [asdict(check) for check in self.checks],
        }

    def lines(self) -> list[str]:
        """Return it on one screen; what matters most comes first."""
        worst = next((check for check in self.checks if check.state == self.verdict), None)
        reason = "" if worst is None else worst.what + (f"; {worst.remedy}" if worst.remedy else "")
        first = {
            GOOD: "armed: a crash now would be saved",
            DOUBT: f"armed, but doubtful: {reason}",
            BAD: f"{'armed, but a crash now would not be saved' if self.armed else 'not armed'}: {reason}",
        }[self.verdict]
        return [printable(first), *(check.line() for check in self.checks)]


def status(wanted: Wanted) -> Status:
    """Look at everything. It takes as long as servers take to answer, and changes nothing.

    Raises:
        KexecError: the machine is armed, and with what only root may see.
    """
    reservation, armed, loaded = kexec.reservation(), kexec.armed(), kexec.loaded()
    if not reservation or not armed or loaded is None:
        checks = (*_unarmed(reservation, armed=armed), *_surroundings(None))
        return Status(armed, reservation, loaded, checks)
    if os.geteuid() != 0:
        raise KexecError("armed; whether a crash would be saved only root can see: use sudo")
    image = Path(loaded.image)
    boot = boot_config.parse(loaded.command_line)
    made_from = stamp.read(image)
    cpus = kexec.cpus_of(loaded.command_line)
    estimated = _estimated(image, cpus, boot) if image.exists() else None
    needed = None if estimated is None else estimated.needed
    targets = tuple(reach(target, boot.path) for target in boot.targets)
    predicted = predict.predict(boot.levels[-1], reservation)
    encrypted = None if made_from is None else made_from.encrypted
    watchdog = watchdogs.doubt(loaded.command_line, image)
    checks = (
        _reservation(reservation, estimated),
        _kernel(loaded, wanted),
        _image(image, made_from, wanted),
        *_targets(targets),
        *_room(targets, predicted),
        _encryption(encrypted),
        *_watchdog(watchdog, boot),
        *_surroundings(loaded),
    )
    built = None if made_from is None else made_from.built
    return Status(armed, reservation, loaded, checks, needed, targets, predicted, built, encrypted, watchdog)


def _estimated(image: Path, cpus: int, boot: BootConfig) -> Estimate:
    return estimate.estimate(estimate.memory_of(image), cpus, memory_of(boot.targets))


def _unarmed(reservation: int, *, armed: bool) -> Iterator[Check]:
    if not reservation:
        yield Check("reservation", BAD, *kexec.NO_RESERVATION)
        return
    if armed:
        yield Check("reservation", GOOD, _reserved(reservation))
        yield Check("kernel", DOUBT, "what is loaded was not loaded by vmcapture, which cannot look into it", LOAD_IT)
        return
    yield Check("kernel", BAD, f"no capture kernel is loaded ({_reserved(reservation)})", f"run {ARM}")
    if _number(SYSCTL / "kexec_load_disabled"):
        yield Check("kexec", BAD, "kernel.kexec_load_disabled=1: nothing can be loaded any more", "reboot")


def _reserved(reservation: int) -> str:
    return f"{reservation >> 20} MiB reserved for the capture kernel"


def _reservation(reservation: int, estimated: Estimate | None) -> Check:
    what = _reserved(reservation)
    if estimated is None:
        return Check("reservation", GOOD, what)
    if reservation >= estimated.needed:
        return Check("reservation", GOOD, f"{what}, about {estimated.needed >> 20} MiB needed")
    remedy = f"reserve more ({estimated.parameter}), or find out by vmcapture test"
    return Check("reservation", DOUBT, f"{what}, about {estimated.needed >> 20} MiB are needed", remedy)


def _kernel(loaded: Loaded, wanted: Wanted) -> Check:
    call = "kexec_file_load" if loaded.syscall == "file" else "kexec_load"
    what = f"{loaded.kernel}, loaded by {call}"
    if why := kexec.out_of_date(loaded):
        return Check("kernel", DOUBT, f"{what}; {why}", ARM)
    if services.enabled(services.ARMING):
        try:
            same = kexec.is_of(wanted.kernel(), loaded)
        except CaptureError as error:
            return Check("kernel", DOUBT, f"{what}; it cannot be loaded again: {error}")
        if not same:
            return Check("kernel", DOUBT, f"{what}, not as the configuration says now", ARM)
    return Check("kernel", GOOD, what)


def _image(image: Path, made_from: Stamp | None, wanted: Wanted) -> Check:
    if not image.exists():
        return Check("image", DOUBT, f"{image} is loaded, and gone from the disk", ARM)
    if made_from is None:
        what = f"{image}: nobody knows what it was made from, nor when it is out of date (an image made by hand?)"
        return Check("image", DOUBT, what, MAKE_IT)
    what = f"{image}, built {datetime.fromtimestamp(made_from.built, UTC):%Y-%m-%d %H:%M} UTC for {made_from.release}"
    try:
        why = stamp.stale(wanted.image(image))
    except CaptureError as error:
        return Check("image", DOUBT, f"{what}; it could not be built again: {error}")
    return Check("image", GOOD, f"{what}, current") if why is None else Check("image", DOUBT, f"{what}; {why}", ARM)


def _targets(targets: Sequence[Target]) -> Iterator[Check]:
    """Yield a check for each; one that cannot be reached is no more than a doubt where another one can."""
    if not targets:
        yield Check("target", BAD, "no target is named: the capture kernel would not know where to save", ARM)
    spare = any(target.reached for target in targets)
    for target in targets:
        if target.reached is False:
            yield Check("target", DOUBT if spare else BAD, target.what, target.remedy)
        else:
            free = "" if target.free is None else f": {size_text(target.free)} free"
            yield Check("target", GOOD if target.reached else DOUBT, target.what + free, target.remedy)


def _room(targets: Sequence[Target], predicted: Prediction) -> Iterator[Check]:
    """Compare the predicted dump with the room on each target that is there and tells."""
    frees = [(target, target.free) for target in targets if target.reached and target.free is not None]
    # Where one is full the next is taken.
    too_small = DOUBT if any(free >= predicted.most // SMALLER for _, free in frees) else BAD
    size = f"a dump of level {predicted.level} has at most {size_text(predicted.most)} ({predict.METHOD})"
    for target, free in frees:
        what = f"{size_text(free)} on {target.target}; {size}"
        if free >= predicted.most:
            yield Check("room", GOOD, what)
        elif free >= predicted.most // SMALLER:
            yield Check("room", GOOD, f"{what}, compressed a quarter of it in most cases")
        else:
            remedy = "make room, or keep fewer crashes (keep, free in /etc/vmcapture.conf)"
            yield Check("room", too_small, f"{what}: it would be cut short there", remedy)


def _encryption(encrypted: bool | None) -> Check:
    keys = os.path.lexists(RECIPIENTS)
    if encrypted is None:
        return Check("encryption", DOUBT if keys else GOOD, "not known: the image has no stamp", ARM if keys else "")
    if encrypted:
        return Check("encryption", GOOD, "on: only the keys that the image was built with open what it saves")
    if keys:
        return Check("encryption", BAD, f"off, though there is {RECIPIENTS}: a crash would be saved in the clear", ARM)
    return Check("encryption", GOOD, "off: who has the disk can read a dump")


def _watchdog(doubt: str | None, boot: BootConfig) -> Iterator[Check]:
    if doubt is not None:
        yield Check("watchdog", DOUBT, doubt)
    elif boot.watchdog:
        yield Check("watchdog", GOOD, f"resets the machine when a save hangs for {boot.watchdog} s")
    else:
        yield Check("watchdog", GOOD, "none is used")


def _surroundings(loaded: Loaded | None) -> Iterator[Check]:
    """Yield what is not ours: services, firmware, settings of the kernel."""
    for unit in services.competitors():
        what = f"{unit} loads a capture kernel, too"
        yield Check("others", DOUBT, what, f"systemctl disable --now {unit}, which unloads ours, and {ARM}")
    if services.running() and not services.enabled(services.ARMING):
        what = f"{services.ARMING} is not enabled: after a reboot nothing is loaded"
        yield Check("service", DOUBT, what, f"systemctl enable {services.ARMING}")
    lockdown = re.search(r"\[(\w+)\]", _text(LOCKDOWN))
    secure = _secure_boot()
    if secure or (lockdown and lockdown[1] != "none"):
        what = f"Secure Boot {'on' if secure else 'off'}, lockdown {lockdown[1] if lockdown else 'none'}"
        by_load = loaded is not None and loaded.syscall == "load"
        remedy = "arm with kexec_file_load (syscall file), the only one that works then" if by_load else ""
        yield Check("secure boot", DOUBT if by_load else GOOD, what, remedy)
    if loaded is None:
        return
    oops = _number(SYSCTL / "panic_on_oops")
    yield Check(
        "crashes on", GOOD, "panic and oops" if oops else "panic; an oops kills what caused it (kernel.panic_on_oops=0)"
    )
    yield _tested()


def _tested() -> Check:
    test = crash_test.last()
    if test is None:
        return Check("tested", GOOD, "never by a crash: vmcapture test --crash, while nobody needs the machine")
    if test.saved is None:
        return Check("tested", GOOD, f"crash test of {test.when}: not looked at yet: vmcapture report")
    what = f"crash test of {test.when} on {test.host or socket.gethostname()}: {test.result}"
    return Check("tested", GOOD if test.saved else DOUBT, what, "" if test.saved else "find out why, and test again")


def _secure_boot() -> bool:
    try:
        return SECURE_BOOT.read_bytes()[-1:] == b"\1"  # four bytes of attributes, then the value (efivarfs)
    except OSError:
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _number(path: Path) -> int:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else 0
