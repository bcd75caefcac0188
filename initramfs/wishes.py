"""What a person may ask for besides the names of targets."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Say = Callable[[str], object]
"""Prints one line."""


KEYS = ("kdump_id_rsa", "id_ed25519", "id_ecdsa", "id_rsa")
"""Whose file of ~/.ssh is taken where nobody names one: that of kdump, whose servers know it, comes first."""


class Wishes(NamedTuple):
    """``path`` is the directory on the target, ``ssh_key`` the secret key to log in with (None: the user's own);
    without ``check`` no target on another machine is tried."""

    path: str = "/var/crash"
    ssh_key: Path | None = None
    check: bool = True


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what a person may wish of a target on another machine."""
    add = parser.add_argument
    default = Wishes()
    add("--path", metavar="DIR", help=f"directory on an nfs: or ssh: target, which is tried (default: {default.path})")
    add(
        "--ssh-key", type=Path, dest="sshkey", metavar="FILE",
        help=f"the secret key for ssh: targets, default: of ~/.ssh, the first of {', '.join(KEYS)}",
    )  # fmt: skip
    add("--no-check", action="store_true", help="do not mount nfs:, ssh: and virtiofs: targets to try them")


def of(args: argparse.Namespace) -> Wishes:
    """Return what was wished, when the configuration file has been asked for what the options do not say."""
    return Wishes(args.path or str(args.directory), args.sshkey, not args.no_check)
