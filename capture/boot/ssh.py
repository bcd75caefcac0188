"""A target on an SSH server: ``ssh:USER@HOST[:PORT]``, mounted by sshfs as a file system like any other.

sshfs speaks OpenSSH's SFTP: fsync reaches the server's disk (fsync@openssh.com), a rename replaces
(posix-rename@openssh.com), and the room that is left can be asked for (statvfs@openssh.com). Nothing is asked of a
person, and no key is learned: the server's is the one that the image was built with.

A connection that breaks is not made anew: what was open on it is lost anyway. The next target follows, or the next
``vmcapture save``, which goes on where this one was cut short.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from capture import pulse
from capture.console import printable
from capture.errors import TargetError, UsageError

PORT = 22
KEY = Path("/etc/vmcapture/ssh/key")
KNOWN_HOSTS = Path("/etc/vmcapture/ssh/known_hosts")
SCRATCH = Path("/run/vmcapture")
ROOT = "/"
_OPTIONS = ("follow_symlinks", "dir_cache=no", "nosuid", "nodev", "noatime")
"""Links on the server are followed there: here they would lead into our own file system."""
_ALIVE_INTERVAL, _ALIVE_COUNT = 15, 4
"""A server that says nothing for a minute is gone: well within ``vmcapture.timeout=``."""
_CONFIG = """\
Host *
  HostName {address}
  Port {port}
  User {user}
  HostKeyAlias {host}
  UserKnownHostsFile {known_hosts}
  GlobalKnownHostsFile /dev/null
  IdentityFile {key}
  IdentitiesOnly yes
  IdentityAgent none
  PreferredAuthentications publickey
  StrictHostKeyChecking yes
  UpdateHostKeys no
  BatchMode yes
  ConnectTimeout {connect}
  ServerAliveInterval {interval}
  ServerAliveCountMax {count}
  Compression no
  Ciphers ^aes128-gcm@openssh.com
  ForwardAgent no
  ForwardX11 no
  ClearAllForwardings yes
  PermitLocalCommand no
  ControlMaster no
  ControlPath none
  LogLevel INFO
"""
_SEEN = {
    "Host key verification failed": "the server's host key is not the one that was pinned; if it was changed on "
    "purpose, put the new one into known_hosts and build the image again",
    "Permission denied": "the server does not take the key for this user: add its public half to the user's "
    "authorized_keys there",
    "subsystem request failed": "the server has no SFTP: see Subsystem sftp in its sshd_config",
    "Connection refused": "nothing listens at that port",
    "This service allows sftp connections only": "the server has no SFTP for this user",
    "no matching": "client and server have no algorithm in common",
    "/dev/fuse": "this kernel has no FUSE: module fuse",
    "fuse: device not found": "this kernel has no FUSE: module fuse",
}
"""What ssh, sshfs or the server say, and what that means."""


class Login(NamedTuple):
    """What a target names."""

    user: str
    host: str
    port: int = PORT


class Credentials(NamedTuple):
    """The secret key, and the file with the host keys under the names of the targets."""

    key: Path = KEY
    known_hosts: Path = KNOWN_HOSTS


def parse(target: str) -> Login:
    """Return what ``ssh:USER@HOST[:PORT]`` names; an IPv6 address stands in brackets.

    Raises:
        UsageError: it is no such text.
    """
    found = re.fullmatch(r"ssh:([^\s@:/\[\]]+)@(?:\[([0-9A-Fa-f:.]+)\]|([^\s:/\[\]@]+))(?::([0-9]{1,5}))?", target)
    if found is None or not 0 < int(found[4] or PORT) < 1 << 16:
        raise UsageError(f"{target}: not of the form ssh:USER@HOST[:PORT] (an IPv6 address in brackets)")
    return Login(found[1], found[2] or found[3], int(found[4] or PORT))


def configuration(login: Login, address: str, credentials: Credentials, connect: int) -> str:
    """Return what ssh has to be told; it has ``connect`` seconds to connect."""
    return _CONFIG.format(
        address=address, port=login.port, user=login.user, host=login.host, key=credentials.key,
        known_hosts=credentials.known_hosts, connect=connect, interval=_ALIVE_INTERVAL, count=_ALIVE_COUNT,
    )  # fmt: skip


def mount(
    login: Login,
    address: str,
    point: Path,
    *,
    credentials: Credentials | None = None,
    scratch: Path = SCRATCH,
    connect: int = 30,
) -> Path:
    """Mount the root directory of the server at ``address`` on ``point``; return the file that ssh complains to.

    sshfs goes on in the background until it is unmounted. ``scratch`` is a directory for its configuration.

    Raises:
        TargetError: the server does not let us in, or there is no sshfs.
    """
    config, said = scratch / f"ssh-{point.name}.config", scratch / f"ssh-{point.name}.log"
    command = ["sshfs", "-F", str(config), f"server:{ROOT}", str(point), "-o", ",".join(_OPTIONS)]
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        config.write_text(configuration(login, address, credentials or Credentials(), max(1, connect)))
        # No pipe: ssh lives on, and would keep it open.
        with said.open("wb") as log, pulse.at_target():
            answer = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
    except OSError as error:
        raise TargetError(f"{text_of(login)}: sshfs cannot be run: {error.strerror}; build the image anew") from None
    if answer.returncode:
        raise TargetError(f"{text_of(login)} cannot be mounted from {address}: {explained(complaints(said))}")
    return said


def text_of(login: Login) -> str:
    """Return the target that names it."""
    host = f"[{login.host}]" if ":" in login.host else login.host
    return f"ssh:{login.user}@{host}" + (f":{login.port}" if login.port != PORT else "")


def complaints(said: Path) -> str:
    """Return what ssh has said by now."""
    try:
        return said.read_text(errors="replace")
    except OSError:
        return ""


def explained(said: str) -> str:
    """Return in one line what ssh's complaints mean."""
    lines = [printable(line.strip()) for line in said.splitlines() if line.strip(" @\r\n")]
    for sign, meaning in _SEEN.items():
        if (line := next((line for line in lines if sign in line), None)) is not None:
            return f"{line}; {meaning}"
    # "read: Connection reset by peer" is sshfs's own word for an ssh that ended: what ssh said stands before it.
    telling = [line for line in lines if not line.startswith("read: ")] or lines
    return telling[-1] if telling else "sshfs did not say why; try it by hand: ssh"
