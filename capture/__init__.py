"""Saves what is left of a crashed Linux kernel: log, registers and a compressed dump."""

from __future__ import annotations

__version__ = "0.1.0"
