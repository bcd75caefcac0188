"""Ctrl-C before there is anybody to answer it: while a command's modules are read, for a few tenths of a second.

Python would print a traceback, which tells nobody anything. The process ends without a word instead, as any program
does that has not said otherwise.
"""

from __future__ import annotations

import signal


def end_quietly() -> None:
    """Let an interruption end the process, until ``say_again``; one that is ignored (nohup) stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def say_again() -> None:
    """Let an interruption be a KeyboardInterrupt, as it is in Python."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
