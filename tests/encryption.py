"""A key pair of age, and what it opens."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Key(NamedTuple):
    """A file with the secret key, and one with the public half: the recipients."""

    secret: Path
    recipients: Path

    def open(self, path: Path) -> tuple[int, bytes]:
        """Decrypt a file as far as that can be: age's exit status, and what it gave."""
        ran = subprocess.run(["age", "-d", "-i", self.secret, path], capture_output=True, check=False)
        return ran.returncode, ran.stdout


def make_key(folder: Path) -> Key:
    """Make a key pair; skips where age is not installed."""
    if shutil.which("age") is None or shutil.which("age-keygen") is None:
        pytest.skip("age is not installed (Debian package age)")
    key = Key(folder / "key.txt", folder / "recipients")
    subprocess.run(["age-keygen", "-o", key.secret], check=True, capture_output=True)
    public = subprocess.run(["age-keygen", "-y", key.secret], check=True, capture_output=True).stdout
    key.recipients.write_bytes(b"# the dumps' own key\n" + public)
    return key
