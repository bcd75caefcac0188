"""The crash boot: what stage one of the image starts. Saves, then does what the kernel command line asks for.

Exit status SHELL (64) means: the console belongs to a person now, and why has been said. Stage one takes anything else
as an accident.
"""

from __future__ import annotations

import sys

from capture.boot import actions, config
from capture.boot.last_words import print_last_words
from capture.boot.supervisor import save_to_targets
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
    try:
        saved = save_to_targets(boot, console, dog=dog)
        outcome, action = saved.line, boot.final if saved.complete else boot.failure
        log_saved = saved.log_saved or saved.status == SourceError.exit_status  # (then there is none to be had)
    except CaptureError as error:
        outcome, action, log_saved = f"not saved: {error}", boot.failure, False
    except Exception as error:  # (whatever it is, a person or the failure action must get the machine)
        outcome, action, log_saved = f"not saved: internal error: {type(error).__name__}: {error}", boot.failure, False
    if not log_saved:
        print_last_words(console, dog)
    again = "" if action == boot.final and outcome.startswith("saved in ") else "; to try again: vmcapture save"
    console.say(f"{outcome}{again}")
    if action != "shell":
        console.say(action)
    dog.settle(action)
    try:
        actions.perform(action, console, dog)
    except CaptureError as error:
        console.say(str(error))
    return SHELL


if __name__ == "__main__":
    sys.exit(main())
