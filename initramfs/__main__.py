"""``python -m initramfs``: the whole command, the set-up side included."""

import sys

from initramfs.cli import main

if __name__ == "__main__":
    sys.exit(main())
