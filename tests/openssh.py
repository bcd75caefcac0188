"""A real OpenSSH server on a port of its own, with keys of its own; the system's, if it has one, is left alone.

sshd itself comes from its Debian package, unpacked and not installed: nothing listens on this machine afterwards.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.guest import cache, host
from tests.guest.server import Keys, make_keys

PACKAGES = ("openssh-server", "openssh-sftp-server", "libwrap0")
PATIENCE = 20.0


@dataclass(slots=True)
class OpenSSH:
    """It lets in whoever has ``key``, as root."""

    folder: Path
    port: int = 0
    keys: Keys = field(init=False)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def start(self) -> None:
        """Start it.

        Raises:
            HostError: there is no sshd to be had.
        """
        tree = cache.tree("sshd", PACKAGES)
        self.keys = make_keys(self.folder)
        (self.folder / "authorized_keys").write_bytes(self.keys.user.with_suffix(".pub").read_bytes())
        accounts = Path("/etc/passwd").read_text() + "sshd:x:65533:65534::/run/sshd:/bin/false\n"
        (self.folder / "passwd").write_text(accounts)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (self.folder / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.keys.server}\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\nPidFile none\nUsePAM no\n"
            f"Subsystem sftp {tree}/usr/lib/openssh/sftp-server\n"
        )
        # In a mount namespace of its own: an account and a directory that the package's scripts would have made.
        script = (
            f"mount --bind {self.folder}/passwd /etc/passwd && mount -t tmpfs run /run && mkdir /run/sshd && "
            f"exec {tree}/usr/sbin/sshd -D -e -f {self.folder}/config"
        )
        libraries = ":".join(str(path) for path in tree.rglob("*-linux-gnu"))
        environment = {"LD_LIBRARY_PATH": libraries, "PATH": host.SEARCH_PATH}
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stderr=log, env=environment)
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            time.sleep(0.05)
        raise host.HostError(f"sshd does not run: {(self.folder / 'log').read_text(errors='replace')}")

    def stop(self) -> None:
        """Stop it, and who is logged in."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def known_hosts(self, name: str) -> bytes:
        """A line for known_hosts that calls the server ``name``."""
        return self.keys.known_hosts(name)

    @property
    def key(self) -> Path:
        """The secret key of whom it lets in, with its public half beside it."""
        return self.keys.user
