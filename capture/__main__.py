"""``python -m capture``: the commands of the capture side, all that the capture kernel has."""

from __future__ import annotations

import sys

from capture import interruption


def main() -> int:
    """Read the program, and run it."""
    interruption.end_quietly()
    from capture.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
