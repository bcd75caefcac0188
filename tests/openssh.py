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

PACKAGES = ("openssh-server", "openssh-sftp-server", "libwrap0")
PATIENCE = 20.0


@dataclass(slots=True)
class OpenSSH:
    """It lets in whoever has ``key``, as root; ``host_key`` is its own."""

    folder: Path
    port: int = 0
    key: Path = field(init=False)
    host_key: Path = field(init=False)
    _process: subprocess.Popen[bytes] | None = field(init=False, default=None)

    def start(self) -> None:
        """Start it.

        Raises:
            HostError: there is no sshd to be had.
        """
        tree = cache.tree("sshd", PACKAGES)
        self.folder.mkdir()
        self.key, self.host_key = self.folder / "user", self.folder / "host"
        for path in (self.key, self.host_key):
            subprocess.run([host.find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        (self.folder / "authorized_keys").write_bytes(self.key.with_suffix(".pub").read_bytes())
        accounts = Path("/etc/passwd").read_text() + "sshd:x:65533:65534::/run/sshd:/bin/false\n"
        (self.folder / "passwd").write_text(accounts)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        (self.folder / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.host_key}\n"
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
        kind, key = self.host_key.with_suffix(".pub").read_text().split()[:2]
        return f"{name} {kind} {key}\n".encode()
