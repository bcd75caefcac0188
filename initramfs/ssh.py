"""A target on an SSH server, seen from the healthy machine: its host key is pinned, the key to log in with tried."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from capture.boot import ssh
from capture.boot.ssh import Credentials, Login
from initramfs import network, remote, runtime, tools
from initramfs.devices import Needed
from initramfs.errors import ImageError, ToolError
from initramfs.wishes import KEYS, Say, Wishes

GLOBAL_KNOWN_HOSTS = Path("/etc/ssh/ssh_known_hosts")
MEMORY = 12 << 20
"""Bytes that sshfs and ssh take while a save runs (11 MiB in a guest with 6.1)."""
_MODULES = ("fuse",)
_PASSWD = b"root:x:0:0:root:/root:/bin/sh\n"
"""ssh does nothing for a user without a name."""


def needed(target: str, wishes: Wishes, home: Path | None = None) -> Needed:
    """Return what the image has to hold for a save there; try it first.

    Raises:
        CaptureError: a program is missing, the host's key is not known, ours cannot be used, the server cannot be
            reached or does not take a file.
    """
    login = ssh.parse(target)
    programs = (tools.require("sshfs", "sshfs"), tools.require("ssh", "openssh-client"))
    folder = (home or Path.home()) / ".ssh"
    key = _key(target, wishes.ssh_key, folder)
    public = _public_half(target, key)
    known_hosts = pinned(login, (folder / "known_hosts", folder / "known_hosts2", GLOBAL_KNOWN_HOSTS))
    route = network.route_to(login.host, login.port)
    has = remote.needed(route) + Needed(_MODULES, binaries=programs)
    if wishes.check:
        remote.have_module("fuse")

        def mount(point: Path, scratch: Path) -> None:
            (scratch / "known_hosts").write_bytes(known_hosts)
            try:
                ssh.mount(login, route.address, point, Credentials(key, scratch / "known_hosts"), scratch=scratch)
            except ssh.KeyRefusedError as error:
                raise ImageError(f"{error}: {public}") from None

        with remote.tried(target, route, login.port, mount) as point:
            remote.probe(point, wishes.path, target)
    place = ssh.credentials(login)
    has += Needed(files=((str(place.key), key), (str(place.known_hosts), known_hosts), ("/etc/passwd", _PASSWD)))
    return has + Needed(files=tuple(_found_by_name(programs)))


def _found_by_name(programs: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """Yield what has to be at another place in the image than on this machine, to be found there."""
    for program in programs:
        if str(program.parent) not in runtime.SEARCH_PATH.split(os.pathsep):
            yield f"/usr/bin/{program.name}", program


def _key(target: str, wanted: Path | None, folder: Path) -> Path:
    """Return the file of the secret key."""
    if wanted is not None:
        if not wanted.is_file():
            raise ImageError(f"{target}: {wanted}: no such key; make one: ssh-keygen -t ed25519 -N '' -f {wanted}")
        return wanted
    for name in KEYS:
        if (folder / name).is_file():
            return folder / name
    raise ImageError(
        f"{target}: no key to log in with in {folder}; make one, ssh-keygen -t ed25519 -N '', or name it with --ssh-key"
    )


def _public_half(target: str, key: Path) -> str:
    """Return the public half of a key, as it stands in authorized_keys.

    Raises:
        ImageError: the key cannot be used without a person.
    """
    keygen = tools.require("ssh-keygen", "openssh-client")
    with tempfile.TemporaryDirectory(prefix="vmcapture-") as name:
        copy = Path(name) / "key"  # with a mode that ssh-keygen does not object to
        try:
            copy.write_bytes(key.read_bytes())
        except OSError as error:
            raise ImageError(f"{target}: {key}: {error.strerror}") from None
        copy.chmod(0o600)
        try:
            public = tools.run([keygen, "-y", "-P", "", "-f", copy]).strip()
        except ToolError as error:
            said = str(error)
            if "passphrase" in said:
                raise ImageError(
                    f"{target}: {key} has a passphrase, which nobody will type in the capture kernel; name a key "
                    "without one with --ssh-key, and restrict it on the server (authorized_keys)"
                ) from None
            raise ImageError(f"{target}: {key}: {tools.last_line(said).replace(str(copy), str(key))}") from None
    if public.startswith("sk-"):
        raise ImageError(f"{target}: {key} stands on a security key, which nobody will touch; name another: --ssh-key")
    return public


def pinned(login: Login, files: tuple[Path, ...]) -> bytes:
    """Return the host keys that these files of known hosts have of a server, under the name that the target gives it.

    Raises:
        ImageError: they have none.
    """
    keygen = tools.require("ssh-keygen", "openssh-client")
    name = login.host if login.port == ssh.PORT else f"[{login.host}]:{login.port}"
    lines: dict[str, None] = {}
    for file in files:
        if not file.is_file():
            continue
        try:
            found = tools.run([keygen, "-F", name, "-f", file])
        except ToolError:  # it has none
            continue
        lines.update(dict.fromkeys(_renamed(line, login.host) for line in found.splitlines() if line[:1] not in "# "))
    if not any(not line.startswith("@revoked") for line in lines):
        port = f"-p {login.port} " if login.port != ssh.PORT else ""
        raise ImageError(
            f"{ssh.text_of(login)}: its host key is not known here; log in once and compare the fingerprint: "
            f"ssh {port}{login.user}@{login.host} (or, where nobody is in between: ssh-keyscan {port}{login.host} >> "
            f"{files[0]})"
        )
    return "".join(f"{line}\n" for line in lines).encode()


def _renamed(line: str, host: str) -> str:
    """Return a line of known hosts with another name in it, hashed or not; a marker before it stays."""
    words = line.split()
    at = 1 if words[0].startswith("@") else 0
    return " ".join((*words[:at], host, *words[at + 1 :]))


def named(target: str, say: Say) -> str:
    """Return the target; say whether the server does not answer now.

    Raises:
        UsageError: it is none.
    """
    login = ssh.parse(target)
    remote.doubt(target, login.host, login.port, say)
    return target
