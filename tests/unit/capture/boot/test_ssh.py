"""SSH targets: what the words mean, what ssh is told, and a real sshfs with a real OpenSSH behind it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from capture.boot import job, mounting, network, routes, ssh
from capture.boot.config import BootConfig
from capture.boot.names import LOG
from capture.boot.ssh import Credentials, KeyRefusedError, Login
from capture.boot.supervisor import save_to_targets
from capture.console import Console
from capture.dumpfile import writer
from capture.dumpfile.output import OutputFile, target_error
from capture.errors import TargetError, UsageError
from capture.vmcore import open_vmcore
from tests.builders import PAGE, crashed_core
from tests.faults import raising, tmpfs
from tests.kernels import PAGES, busy_kernel
from tests.openssh import OpenSSH
from tests.outcome import Run, dump_options, manifest_of, read_back, the_directory
from tests.unit.conftest import running_openssh


@pytest.mark.parametrize(
    ("target", "login"),
    [
        ("ssh:root@server", Login("root", "server", 22)),
        ("ssh:crash@192.0.2.1:2222", Login("crash", "192.0.2.1", 2222)),
        ("ssh:crash@[2001:db8::1]", Login("crash", "2001:db8::1", 22)),
        ("ssh:crash@[2001:db8::1]:23", Login("crash", "2001:db8::1", 23)),
    ],
)
def test_a_target_names_user_host_and_port_and_is_named_by_them(target: str, login: Login) -> None:
    assert ssh.parse(target) == login
    assert ssh.text_of(login) == target


@pytest.mark.parametrize(
    "target",
    ["ssh:", "ssh:server", "ssh:@server", "ssh:u@server:0", "ssh:u@server:65536", "ssh:u@2001:db8::1", "ssh:u@a:/path",
     "ssh:u@v@w", "ssh:u@server:22 x", "nfs:u@server", "ssh:u%h@server", "ssh:u@server%eth0", 'ssh:u"@server'],
)  # fmt: skip
def test_anything_else_is_refused_with_the_right_form(target: str, console: Console) -> None:
    with pytest.raises(UsageError, match=r"not of the form ssh:USER@HOST\[:PORT\]"):
        ssh.parse(target)
    with pytest.raises(TargetError, match=r"not of the form ssh:USER@HOST"), ssh.mounted(target, 0, console):
        pass


def test_ssh_understands_what_it_is_told_and_asks_nobody(tmp_path: Path) -> None:
    program = shutil.which("ssh")
    if program is None:
        pytest.skip("no ssh here: apt-get install openssh-client")
    config = tmp_path / "config"
    login = Login("crash", "2001:db8::1", 2222)
    config.write_text(ssh.configuration(login, "2001:db8::1", tmp_path / "key", tmp_path / "known", 7))
    said = subprocess.run([program, "-G", "-F", config, "server"], capture_output=True, text=True, check=True).stdout
    told = dict(line.split(" ", 1) for line in said.splitlines())
    assert told["hostname"] == "2001:db8::1"
    assert (told["user"], told["port"], told["hostkeyalias"]) == ("crash", "2222", "2001:db8::1")
    assert told["stricthostkeychecking"] in ("true", "yes")
    assert (told["batchmode"], told["identitiesonly"], told["connecttimeout"]) == ("yes", "yes", "7")
    assert told["userknownhostsfile"] == str(tmp_path / "known")
    assert told["globalknownhostsfile"] == "/dev/null"
    assert told["ciphers"].startswith("aes128-gcm@openssh.com,")


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("@@@@@@\nHost key verification failed.\r\nread: Connection reset by peer\n",
         "Host key verification failed.; the server's host key is not the one that was pinned; "),
        ("crash@a: Permission denied (publickey).\nread: Connection reset by peer\n", "crash@a: Permission denied ("),
        ("ssh: connect to host a port 22: No route to host\nread: Connection reset by peer\n",
         "ssh: connect to host a port 22: No route to host"),
        ("read: Connection reset by peer\n", "read: Connection reset by peer"),
        ("", "sshfs did not say why"),
    ],
)  # fmt: skip
def test_of_what_ssh_says_the_telling_line_is_repeated(said: str, line: str) -> None:
    assert ssh.explained(said).startswith(line)


@pytest.fixture
def point(tmp_path: Path) -> Path:
    folder = tmp_path / "point"
    folder.mkdir()
    return folder


def mount(server: OpenSSH, point: Path, *, key: Path | None = None, known: bytes | None = None) -> Path:
    known_hosts = point.with_name("known_hosts")
    known_hosts.write_bytes(server.known_hosts("pinned") if known is None else known)
    login = Login("root", "pinned", server.port)
    has = Credentials(key or server.key, known_hosts)
    return ssh.mount(login, "127.0.0.1", point, has, scratch=point.with_name("scratch"), connect=10)


def test_what_is_written_renamed_and_asked_for_is_so_on_the_server(
    openssh: OpenSSH, point: Path, tmp_path: Path
) -> None:
    """A link on the server is followed there; a rename replaces; the key that the image shows to all is none to ssh."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real/vmcore").write_text("old")
    openssh.key.chmod(0o644)
    said = mount(openssh, point)
    try:
        folder = point / (tmp_path / "link").relative_to("/")
        fd = os.open(folder / "vmcore.incomplete", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.pwrite(fd, b"x" * 5_000_000, 1_000_000)
        os.posix_fallocate(fd, 6_000_000, 1_000_000)
        os.fdatasync(fd)
        assert (tmp_path / "real/vmcore.incomplete").stat().st_size == 7_000_000
        os.close(fd)
        (folder / "vmcore.incomplete").rename(folder / "vmcore")
        here, there = os.statvfs(tmp_path), os.statvfs(folder)
        assert here.f_blocks * here.f_frsize == there.f_blocks * there.f_frsize
    finally:
        subprocess.run(["umount", point], check=True)
    saved = tmp_path / "real/vmcore"
    assert saved.read_bytes() == bytes(1_000_000) + b"x" * 5_000_000 + bytes(1_000_000)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert ssh.complaints(said) == ""


def test_another_host_key_is_refused(openssh: OpenSSH, point: Path) -> None:
    wrong = b"pinned " + b" ".join(openssh.key.with_suffix(".pub").read_bytes().split()[:2]) + b"\n"
    with pytest.raises(TargetError, match=r"Host key verification failed.*not the one that was pinned") as refused:
        mount(openssh, point, known=wrong)
    assert "\n" not in str(refused.value)
    with pytest.raises(TargetError, match=r"Host key verification failed"):
        mount(openssh, point, known=b"")


def test_a_key_that_the_server_does_not_know_is_refused(openssh: OpenSSH, point: Path) -> None:
    with pytest.raises(KeyRefusedError, match=r"Permission denied.*authorized_keys"):
        mount(openssh, point, key=openssh.keys.server)


def test_a_server_that_is_gone_is_named(openssh: OpenSSH, point: Path) -> None:
    openssh.stop()
    with pytest.raises(TargetError, match=r"ssh:root@pinned:[0-9]+ cannot be mounted from 127.0.0.1: .*refused"):
        mount(openssh, point)


def test_without_a_key_in_the_image_there_is_one_line(tmp_path: Path, point: Path) -> None:
    has = Credentials(tmp_path / "none", tmp_path / "none")
    with pytest.raises(TargetError, match=r"none: No such file or directory; build the image with this target"):
        ssh.mount(Login("root", "pinned"), "127.0.0.1", point, has, scratch=tmp_path / "scratch")


@pytest.mark.parametrize("size", ["6m", "9m", "12m"])
def test_a_dump_that_a_full_server_cut_short_has_only_pages_that_are_there(
    size: str, tmp_path: Path, point: Path, vmcore_file: Callable[[bytes], str], run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """sshfs writes behind our back and tells of it at the next sync: nothing is described before."""
    monkeypatch.setattr(writer, "SYNC_BYTES", 1 << 20)  # so that there are several, whoever is faster
    kernel = busy_kernel()
    source, memory = vmcore_file(kernel.core()), kernel.memory()
    with tmpfs(tmp_path / "small", f"size={size}") as small, running_openssh(tmp_path) as server:
        mount(server, point)
        try:
            place = point / small.relative_to("/")
            ran = run("save", "--no-progress", "-d", "0", "-c", "none", "--source", source, str(place))
        finally:
            subprocess.run(["umount", point], check=True)
        assert ran.status == 3
        assert "no room left on the server while" in ran.err
        assert "make room there or choose another target" in ran.err
        assert "Input/output error" not in ran.err
        good, _ = read_back(the_directory(small) / "vmcore.incomplete")
        assert manifest_of(the_directory(small))["dump"]["whole"] is False, "what was given back is room for it"
    assert 0 < len(good) < PAGES
    assert [pfn for pfn, page in good.items() if page != memory[pfn * PAGE : (pfn + 1) * PAGE]] == []


def test_after_a_full_server_the_next_target_has_its_turn(
    tmp_path: Path, loop_disk: tuple[str, str], vmcore_file: Callable[[bytes], str], console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    disk, _ = loop_disk
    source = vmcore_file(crashed_core(pages=os.urandom(4 << 20)))
    with tmpfs(tmp_path / "small", "size=2m") as small, running_openssh(tmp_path) as server:
        target = named(server, tmp_path, monkeypatch)
        boot = BootConfig(targets=(target, disk), path=str(small), wait=5)
        found = save_to_targets(boot, console, dump_options(), source)
        assert manifest_of(the_directory(small))["dump"]["whole"] is False
    assert (found.target, found.what, found.status) == (disk, "saved", 0)
    (line,) = [line for line in console.lines if "trying the next target" in line]
    assert line.startswith(f"saved in part in {target}{small}/")
    assert "no room left on the server while" in line
    assert line.endswith(f"; make room there or choose another target; trying the next target, {disk}")
    assert mounts(tmp_path) == []


@pytest.mark.parametrize("path", ["", "a/b"], ids=["there", "not there"])
def test_a_server_that_makes_no_directory_is_not_said_to_have_it(
    path: str, tmp_path: Path, point: Path, vmcore_file: Callable[[bytes], str], run: Run
) -> None:
    """sshfs says of each that it exists; nobody is to look for a name 9999 times. Why not, only the room tells."""
    source = vmcore_file(crashed_core())
    with tmpfs(tmp_path / "small", "size=8m,nr_inodes=1") as small, running_openssh(tmp_path) as server:
        mount(server, point)
        place = point / small.relative_to("/") / path
        try:
            ran = run("save", "--no-progress", "--source", source, str(place))
            assert (ran.status, ran.err.count("\n")) == (5, 1)
            assert f"{place}: no room left on the server while making a directory for this crash; make room" in ran.err
            subprocess.run(["mount", "-o", "remount,nr_inodes=9", small], check=True)
            error = target_error(place, "making it", OSError(errno.EPERM, os.strerror(errno.EPERM)))
            assert "making it failed: Operation not permitted; SFTP does not say why: see the server" in str(error)
        finally:
            subprocess.run(["umount", point], check=True)
    error = target_error(tmp_path / "crash", "making it", OSError(errno.EPERM, os.strerror(errno.EPERM)))
    assert "SFTP" not in str(error), "that is for servers"


def test_a_server_that_goes_while_a_file_is_written_is_an_error_of_the_target(openssh: OpenSSH, point: Path,
                                                                              tmp_path: Path) -> None:  # fmt: skip
    """Nothing can be asked of such a file any more, not even its size."""
    mount(openssh, point)
    try:
        with closing(OutputFile(point / (tmp_path / "dump").relative_to("/"))) as file:
            file.write([b"x" * 100_000], 0)
            end(b"sshfs", point)
            with pytest.raises(
                TargetError, match=r"writing at 100000 failed: .*not connected; the connection is lost: "
            ):
                file.write([b"x"], 100_000)
            assert file.size == 100_000
    finally:
        subprocess.run(["umount", point], check=True)


def processes(program: bytes, point: Path) -> list[int]:
    """Who runs ``program`` for what is mounted there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0] == program and any(bytes(point.parent) in word for word in words):
                found.append(int(process.name))
    return found


def end(program: bytes, point: Path) -> None:
    """Kill it, as who looks for memory does, and wait until nobody is behind the mount point."""
    for number in processes(program, point):
        os.kill(number, signal.SIGKILL)
    gone(b"sshfs", point)


def gone(program: bytes, point: Path) -> None:
    """Wait until nobody runs it any more."""
    for _ in range(200):
        if not processes(program, point):
            return
        time.sleep(0.05)
    pytest.fail("it is still there")


@pytest.fixture
def target(openssh: OpenSSH, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A target that is this machine."""
    return named(openssh, tmp_path, monkeypatch)


def named(server: OpenSSH, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The target that is a server, with what an image has of it; the way to it is known."""
    place, target = tmp_path / "place", f"ssh:root@pinned:{server.port}"
    (place / target).mkdir(parents=True)
    (place / target / "key").write_bytes(server.key.read_bytes())
    (place / target / "known_hosts").write_bytes(server.known_hosts("pinned"))
    monkeypatch.setattr(ssh, "PLACE", place)
    monkeypatch.setattr(ssh, "SCRATCH", tmp_path / "run")
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "run/target")
    monkeypatch.setattr(routes, "route_to", lambda _server: None)
    monkeypatch.setattr(network, "connect", lambda *_: "127.0.0.1")
    return target


def mounts(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {folder}/" in line]


@pytest.mark.parametrize("program", [b"ssh", b"sshfs"])
def test_a_server_that_goes_before_a_save_has_begun_leaves_no_place_in_our_memory(
    program: bytes, target: str, tmp_path: Path, console: Console, vmcore_file: Callable[[bytes], str]
) -> None:
    """sshfs unmounts itself when its ssh ends: what is below is the file system of the image, which goes with us."""
    with ssh.mounted(target, 0, console) as root, open_vmcore(vmcore_file(crashed_core())) as vmcore:
        end(program, root)
        with pytest.raises(TargetError, match="; the connection is lost: see to the server"):
            job.save(vmcore, root / "var/crash", dump_options(), console)
    assert list((tmp_path / "run/target").iterdir()) == []
    assert mounts(tmp_path) == []
    assert not any("cannot be unmounted" in line for line in console.lines)


def test_a_server_that_goes_when_a_save_is_gone_on_with_is_a_failure_of_the_target(
    target: str, tmp_path: Path, vmcore_file: Callable[[bytes], str]
) -> None:
    """Even to look whether a file is there fails then; that is no error of ours: another target has its turn."""
    saving: list[Path] = []

    class Ending(Console):
        def say(self, line: str) -> None:
            super().say(line)
            if saving and line.startswith("saving to"):
                end(b"sshfs", saving[0])

    console = Ending(quiet=True)
    with ssh.mounted(target, 0, console) as root, open_vmcore(vmcore_file(crashed_core())) as vmcore:
        place = root / (tmp_path / "crash").relative_to("/")
        for path in job.save(vmcore, place, dump_options(), console).directory.iterdir():
            if path.name != LOG:
                path.unlink()
        saving.append(root)
        saved = job.save(vmcore, place, dump_options(), console)
    assert any("where it was cut short before" in line for line in console.lines)
    assert saved.target_failed
    assert len(saved.failures) == 7
    assert [line for line in saved.failures if "the connection is lost" not in line] == []


def test_a_dead_mount_that_a_killed_save_left_is_taken_away(target: str, tmp_path: Path, console: Console) -> None:
    with contextlib.suppress(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(mounting, "run", raising(KeyboardInterrupt()))  # as of a job that was killed
        with ssh.mounted(target, 0, console):
            pass
    assert len(mounts(tmp_path)) == 1
    end(b"sshfs", tmp_path / "run/target")
    with ssh.mounted(target, 0, console) as root:
        assert root == tmp_path / "run/target"
        assert (root / tmp_path.relative_to("/")).is_dir()
        assert len(mounts(tmp_path)) == 2
    assert mounts(tmp_path) == []


def test_an_interrupt_is_for_the_job_alone(target: str, tmp_path: Path, console: Console) -> None:
    """A terminal sends it to everybody; what the job still writes then goes by ssh. Login has time, wait or no wait."""
    with ssh.mounted(target, 0, console) as root:
        (number,) = processes(b"ssh", root)
        assert os.getpgid(number) != os.getpgid(0)
        assert "ConnectTimeout 30\n" in (tmp_path / "run/ssh-target.config").read_text()


def test_a_server_that_lets_in_and_says_nothing_is_given_up(
    openssh: OpenSSH, point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its SFTP is a program that waits for ever, as one does that needs a home directory which hangs."""
    public = openssh.key.with_suffix(".pub").read_text()
    (openssh.folder / "authorized_keys").write_text(f'command="sleep 30" {public}')
    monkeypatch.setattr(ssh, "_LOGIN", -8.0)
    with pytest.raises(TargetError, match=r"from 127.0.0.1: no answer for 2 s while logging in; see to the server, "):
        mount(openssh, point)
    assert mounts(point.parent) == []
    assert processes(b"sshfs", point) == []
    gone(b"ssh", point)
