"""``python -m capture``: the commands of the capture side, all that the capture kernel has."""

from __future__ import annotations

import sys

from capture.cli import main

if __name__ == "__main__":
    sys.exit(main())
