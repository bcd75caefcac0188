"""Sizes for people."""

from __future__ import annotations


def size_text(size: int) -> str:
    """Return a number of bytes in MiB, or GiB from one on."""
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
