"""The crash boot: what stage one of the image starts. Saves, then does what the kernel command line asks for.

Exit status SHELL (64) means: the console belongs to a person now, and why has been said. Stage one takes anything else
as an accident.
"""

from __future__ import annotations

import sys

from capture.boot import actions, config, hooks
from capture.boot.last_words import print_last_words
from capture.boot.supervisor import Outcome, save_to_targets
from capture.boot.watchdog import Watchdog, open_watchdogs
from capture.console import Console, open_standard_streams
from capture.errors import CaptureError, SourceError
from capture.memory.source import COMMAND_LINE, is_crash_boot

SHELL = 64


def main() -> int:
    """Run the whole crash boot; returns only where the answer is a shell."""
    open_standard_streams()
    console = Console()
    boot = config.parse(COMMAND_LINE.read_text(errors="replace"))
    for line in boot.problems:
        console.say(line)
    if not is_crash_boot():
        console.say("this kernel was not booted by a crash (no elfcorehdr= on its command line): nothing to save")
        return SHELL
    with open_watchdogs(boot.watchdog, console) as dog:
        return _save_and_act(boot, console, dog)


def _save_and_act(boot: config.BootConfig, console: Console, dog: Watchdog) -> int:
    called_off = _run_before(boot, console, dog)
    if called_off is not None:
        action = boot.final
        console.say(f"{called_off}; to save all the same: vmcapture save" if action == "shell" else called_off)
    else:
        saved = _save(boot, console, dog)
        action = boot.final if saved.complete else boot.failure
        if not saved.log_saved and saved.status != SourceError.exit_status:  # (then there is none to be had)
            print_last_words(console, dog)
        again = "" if action == boot.final and saved.complete else "; to try again: vmcapture save"
        console.say(f"{saved.line}{again}")
        _run_after(saved, boot, console, dog)
    if action != "shell":
        console.say(action)
    dog.settle(action)
    try:
        actions.perform(action, console, dog)
    except CaptureError as error:
        console.say(str(error))
    return SHELL


def _save(boot: config.BootConfig, console: Console, dog: Watchdog) -> Outcome:
    """Save, and return what came of it, whatever that is."""
    try:
        return save_to_targets(boot, console, dog=dog)
    except CaptureError as error:
        reason, status = str(error), error.exit_status
    except Exception as error:  # (whatever it is, a person or the failure action must get the machine)
        reason, status = f"internal error: {type(error).__name__}: {error}", CaptureError.exit_status
    return Outcome("", status, "not saved", reasons=(reason,))


def _run_before(boot: config.BootConfig, console: Console, dog: Watchdog) -> str | None:
    try:
        return hooks.run_before(boot.timeout, console, dog)
    except Exception as error:  # what goes wrong here must not cost the save
        console.say(f"before the save: {type(error).__name__}: {error}; going on")
        return None


def _run_after(saved: Outcome, boot: config.BootConfig, console: Console, dog: Watchdog) -> None:
    try:
        hooks.run_after(saved, boot.timeout, console, dog)
    except Exception as error:  # nor keep the machine from its end
        console.say(f"after the save: {type(error).__name__}: {error}; going on")


if __name__ == "__main__":
    sys.exit(main())
