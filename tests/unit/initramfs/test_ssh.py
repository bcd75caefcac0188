"""SSH targets on the healthy machine: host keys pinned, the key tried, one line for whatever is wrong."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from capture.boot import routes, ssh
from capture.boot.routes import CARD, Link, Route
from capture.errors import CaptureError
from initramfs import network, remote
from initramfs import ssh as setup
from initramfs.errors import ImageError
from initramfs.wishes import KEYS, Wishes
from tests.openssh import OpenSSH

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHOSTHOSTHOSTHOSTHOSTHOSTHOSTHOSTHOSTHOSTHOST"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOTHEROTHEROTHEROTHEROTHEROTHEROTHEROTHERO"

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="apt-get install openssh-client")


def known(folder: Path, text: str) -> tuple[Path, Path]:
    (folder / "known_hosts").write_text(text)
    return folder / "known_hosts", folder / "none"


@pytest.mark.parametrize(
    ("target", "line", "pinned"),
    [
        ("ssh:u@server", f"server {KEY}", f"server {KEY}"),
        ("ssh:u@server", f"other,server,192.0.2.1 {KEY} a comment", f"server {KEY} a comment"),
        ("ssh:u@server", f"*.example,ser*r {KEY}", f"server {KEY}"),
        ("ssh:u@server:2222", f"[server]:2222 {KEY}", f"server {KEY}"),
        ("ssh:u@[2001:db8::1]", f"2001:db8::1 {KEY}", f"2001:db8::1 {KEY}"),
        ("ssh:u@server", f"@cert-authority server {KEY}", f"@cert-authority server {KEY}"),
        ("ssh:u@server", f"server {KEY}\n@revoked server {OTHER}", f"server {KEY}\n@revoked server {OTHER}"),
    ],
)
def test_host_keys_are_pinned_under_the_name_of_the_target(target: str, line: str, pinned: str, tmp_path: Path) -> None:
    files = known(tmp_path, f"another {OTHER}\n{line}\n")
    assert setup.pinned(ssh.parse(target), files).decode() == f"{pinned}\n"


def test_a_hashed_name_is_found(tmp_path: Path) -> None:
    files = known(tmp_path, f"server {KEY}\n")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", files[0]], check=True, capture_output=True)
    assert b"server" not in files[0].read_bytes()
    assert setup.pinned(ssh.parse("ssh:u@server"), files).decode() == f"server {KEY}\n"


@pytest.mark.parametrize(
    ("text", "target", "remedy"),
    [
        ("", "ssh:u@server", "ssh u@server (or, where nobody is in between: ssh-keyscan server >>"),
        (
            f"server {KEY}",
            "ssh:u@server:2222",
            "ssh -p 2222 u@server (or, where nobody is in between: ssh-keyscan -p ",
        ),
        (f"@revoked server {KEY}", "ssh:u@server", "ssh u@server"),
    ],
)
def test_a_host_whose_key_is_not_known_is_refused_with_what_to_type(
    text: str, target: str, remedy: str, tmp_path: Path
) -> None:
    with pytest.raises(ImageError) as refused:
        setup.pinned(ssh.parse(target), known(tmp_path, f"{text}\n"))
    assert f"{target}: its host key is not known here; " in str(refused.value)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def make_key(path: Path, *, passphrase: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", path], check=True)
    return path


def needed(home: Path, target: str = "ssh:root@server", **wishes: object) -> object:
    return setup.needed(target, Wishes(**wishes), home)  # type: ignore[arg-type]


@pytest.fixture
def programs() -> None:
    if shutil.which("sshfs") is None:
        pytest.skip("no sshfs here: apt-get install sshfs")


@pytest.mark.usefixtures("programs")
def test_a_key_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"no key to log in with in .*\.ssh; make one, ssh-keygen"):
        needed(tmp_path)
    with pytest.raises(ImageError, match=r"/none: no such key; make one: ssh-keygen -t ed25519 -N '' -f"):
        needed(tmp_path, ssh_key=tmp_path / "none")
    locked = make_key(tmp_path / ".ssh" / KEYS[-1], passphrase="secret")
    with pytest.raises(ImageError, match=rf"{locked} has a passphrase, which nobody will type"):
        needed(tmp_path)
    nonsense = tmp_path / ".ssh" / KEYS[0]
    nonsense.write_text("no key\n")
    with pytest.raises(ImageError) as refused:
        needed(tmp_path)
    assert str(nonsense) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def at_home(openssh: OpenSSH, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose known_hosts has the real server, as ``server``; the way to it is told: it is this machine."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/id_ed25519").write_bytes(openssh.key.read_bytes())
    (home / ".ssh/known_hosts").write_bytes(openssh.known_hosts(f"[server]:{openssh.port}"))
    route = Route("server", "127.0.0.1", (Link(CARD, "eth0", hardware="52:54:00:00:00:02"),), "127.0.0.1/8")
    monkeypatch.setattr(network, "route_to", lambda *_: route)
    return home


def test_a_server_is_tried_and_everything_goes_into_the_image(openssh: OpenSSH, at_home: Path, tmp_path: Path) -> None:
    """The directory may have to be made then; what was written to try it is gone."""
    target = f"ssh:root@server:{openssh.port}"
    has = setup.needed(target, Wishes(path=f"{tmp_path}/crash/new"), at_home)
    files = dict(has.files)
    place = ssh.credentials(ssh.parse(target))
    assert files[str(place.key)] == at_home / ".ssh/id_ed25519"
    assert files[str(place.known_hosts)] == openssh.known_hosts("server")
    assert b"root:" in files["/etc/passwd"]  # type: ignore[operator]
    (route,) = remote.routes_in(has.files)
    assert str(routes.place_of("server")) in files
    assert route.address == "127.0.0.1"
    assert [program.name for program in has.binaries] == ["sshfs", "ssh"]
    assert "fuse" in has.loaded
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".vmcapture", "crash"))] == []
    mounts = Path("/proc/self/mounts").read_text().splitlines()  # those of other tests, too
    assert [line for line in mounts if "fuse.sshfs" in line and "/vmcapture-" in line] == []


def test_whatever_is_wrong_on_the_server_is_one_line_now(openssh: OpenSSH, at_home: Path, tmp_path: Path) -> None:
    target = f"ssh:root@server:{openssh.port}"

    def refusal(path: str = str(tmp_path), **wishes: object) -> str:
        with pytest.raises(CaptureError) as refused:
            setup.needed(target, Wishes(path, **wishes), at_home)  # type: ignore[arg-type]
        assert "\n" not in str(refused.value)
        assert str(refused.value).startswith(target)
        return str(refused.value)

    public = openssh.keys.server.with_suffix(".pub").read_text().split()[1]
    assert f"authorized_keys there: ssh-ed25519 {public}" in refusal(ssh_key=openssh.keys.server)
    assert "/proc on it cannot be written" in refusal("/proc/x")
    (at_home / ".ssh/known_hosts").write_text(
        f"[server]:{openssh.port} " + " ".join(openssh.key.with_suffix(".pub").read_text().split()[:2])
    )
    assert "host key is not the one that was pinned" in refusal()
    openssh.stop()
    assert f"127.0.0.1 does not answer at port {openssh.port}" in refusal()
    assert setup.needed(target, Wishes(check=False), at_home).binaries


def test_a_target_that_is_none_is_refused() -> None:
    with pytest.raises(CaptureError, match="not of the form ssh:"):
        setup.named("ssh:server", pytest.fail)
