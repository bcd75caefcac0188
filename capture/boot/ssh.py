"""A target on an SSH server: ``ssh:USER@HOST[:PORT]``, mounted by sshfs as a file system like any other.

sshfs speaks OpenSSH's SFTP: fsync reaches the server's disk (fsync@openssh.com), a rename replaces
(posix-rename@openssh.com), and the room that is left can be asked for (statvfs@openssh.com). Nothing is asked of a
person, and no key is learned: the server's is the one that the image was built with.

A connection that breaks is not made anew: what was open on it is lost anyway. The next target follows, or the next
``vmcapture save``, which goes on where this one was cut short.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from capture import pulse
from capture.boot import mounting
from capture.boot.programs import run
from capture.console import Console, printable
from capture.errors import TargetError, UsageError

PORT = 22
PLACE = Path("/etc/vmcapture/ssh")
"""A directory for each target: the secret key, and the server's host keys under the name that the target gives it."""
SCRATCH = Path("/run/vmcapture")
ROOT = "/"
_OPTIONS = ("follow_symlinks", "dir_cache=no", "nosuid", "nodev", "noatime")
"""Links on the server are followed there: here they would lead into our own file system."""
_ALIVE_INTERVAL, _ALIVE_COUNT = 15, 4
"""A server that says nothing for a minute is gone: well within ``vmcapture.timeout=``."""
_CONNECT = 30
"""Seconds at least for a server that has answered at its port to agree on keys: a busy one takes more than one."""
_LOGIN = 90.0
"""Seconds for all until it is mounted. ssh itself waits for ever for a server that has begun to let us in: one whose
home directories hang, say."""
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


@contextmanager
def mounted(target: str, wait: int, console: Console, device: str | None = None) -> Iterator[Path]:  # noqa: ARG001
    """Mount ``target``, waiting up to ``wait`` seconds for the server to answer.

    Raises:
        TargetError: it does not, or does not let us in.
    """
    try:
        login = parse(target)
    except UsageError as error:
        raise TargetError(str(error)) from None
    from capture.boot import network, routes

    address = network.connect(routes.route_to(login.host), login.port, wait, console)
    said: list[Path] = []

    def mount_it(point: Path) -> None:
        patience = max(wait, _CONNECT)
        said.append(mount(login, address, point, credentials(login), scratch=SCRATCH, connect=patience))
        try:
            mounting.hold(point)
        except TargetError as error:
            console.say(f"{error}; going on")
        console.say(f"{target}: SFTP from {address}")

    with mounting.mounted_by(mount_it, target, console) as point:
        before = complaints(said[0])
        try:
            yield point
        finally:  # why the connection broke, if it did, nobody else tells
            later = complaints(said[0]).removeprefix(before)
            if later.strip():
                console.say(f"{target}: {explained(later)}")


class KeyRefusedError(TargetError):
    """The server does not take our key."""


class Login(NamedTuple):
    """What a target names."""

    user: str
    host: str
    port: int = PORT


class Credentials(NamedTuple):
    """The secret key, and the file with the server's host keys."""

    key: Path
    known_hosts: Path


def parse(target: str) -> Login:
    """Return what ``ssh:USER@HOST[:PORT]`` names; an IPv6 address stands in brackets.

    What ssh_config(5) puts something else for (%), or takes away ("), is in no name: a path in it has them, too.

    Raises:
        UsageError: it is no such text.
    """
    found = re.fullmatch(
        r"ssh:([^\s@:/\[\]%\"]+)@(?:\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\]|([^\s:/\[\]@%\"]+))(?::([0-9]{1,5}))?", target
    )
    if found is None or not 0 < int(found[4] or PORT) < 1 << 16:
        raise UsageError(f"{target}: not of the form ssh:USER@HOST[:PORT] (an IPv6 address in brackets)")
    return Login(found[1], found[2] or found[3], int(found[4] or PORT))


def credentials(login: Login) -> Credentials:
    """Return what the image has for a target."""
    folder = PLACE / text_of(login)
    return Credentials(folder / "key", folder / "known_hosts")


def configuration(login: Login, address: str, key: Path, known_hosts: Path, connect: int) -> str:
    """Return what ssh has to be told; it has ``connect`` seconds to connect."""
    return _CONFIG.format(
        address=address, port=login.port, user=login.user, host=login.host, key=key,
        known_hosts=known_hosts, connect=connect, interval=_ALIVE_INTERVAL, count=_ALIVE_COUNT,
    )  # fmt: skip


def mount(
    login: Login,
    address: str,
    point: Path,
    has: Credentials,
    *,
    scratch: Path = SCRATCH,
    connect: int = _CONNECT,
) -> Path:
    """Mount the root directory of the server at ``address`` on ``point``; return the file that ssh complains to.

    sshfs goes on in the background until it is unmounted. ``scratch`` is a directory in memory for what it needs: a key
    that others than its owner might read, as in the image, is none to ssh.

    Raises:
        TargetError: the server does not let us in, or there is no sshfs.
    """
    config, key, said = (scratch / f"ssh-{point.name}.{name}" for name in ("config", "key", "log"))
    # sshfs sends what ssh has to say to /dev/null, unless ssh writes it to a file of its own.
    options = (*_OPTIONS, f"ssh_command=ssh -E {said}")
    command = ["sshfs", "-F", str(config), f"server:{ROOT}", str(point), "-o", ",".join(options)]
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        _write_secret(key, has.key.read_bytes())
        config.write_text(configuration(login, address, key, has.known_hosts, connect))
        said.unlink(missing_ok=True)
        # No pipe: sshfs lives on, and would keep it open.
        with said.open("ab") as log, pulse.at_target():
            status = _ended(command, log, point, connect + _LOGIN)
    except subprocess.TimeoutExpired:
        raise TargetError(
            f"{text_of(login)} cannot be mounted from {address}: no answer for {connect + _LOGIN:.0f} s while logging "
            f"in; see to the server, to what {login.user} needs there, and to its SFTP"
        ) from None
    except OSError as error:
        what = error.filename or command[0]
        raise TargetError(f"{text_of(login)}: {what}: {error.strerror}; build the image with this target") from None
    if status:
        heard = complaints(said)
        kind = KeyRefusedError if "Permission denied" in heard else TargetError
        raise kind(f"{text_of(login)} cannot be mounted from {address}: {explained(heard)}")
    return said


def _ended(command: list[str], log: IO[bytes], point: Path, patience: float) -> int:
    """Run sshfs until it is mounted on ``point``; return its exit status.

    With its ssh it is in a session of its own: a Ctrl-C is for the job, which has something to write before it ends.

    Raises:
        OSError: it cannot be run.
        subprocess.TimeoutExpired: it takes more than ``patience`` seconds, and was killed.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(patience)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # of its group is its ssh, too
        process.wait()
        with contextlib.suppress(TargetError):  # it mounts first, and then connects
            run(["umount", str(point)], "nobody is behind it")
        raise


def _write_secret(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
        file.write(content)


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
