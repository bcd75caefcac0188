"""``vmcapture``, ``python -m initramfs``: the whole command, the set-up side included."""

from __future__ import annotations

import sys

from capture import interruption


def main() -> int:
    """Read the program, and run it."""
    interruption.end_quietly()
    from initramfs.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
