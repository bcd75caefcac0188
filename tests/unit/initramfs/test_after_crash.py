"""The report after a reboot: each crash once, to everybody, whatever fails on the way."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from capture.console import Console
from capture.errors import UsageError
from initramfs import after_crash, crash_test, crashes, journal, notify, state
from initramfs.after_crash import Reported, Verdict
from initramfs.errors import KexecError, StateError
from initramfs.notify import COMMAND, MAIL, WEBHOOK, Receiver
from initramfs.places import Place
from tests.builders import PANIC, PrintkRing
from tests.encryption import Key
from tests.faults import raising
from tests.saved import name_of, save_crash

from .conftest import program_of

NOW = int(time.time()) - 3600


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "crash").mkdir()
    return tmp_path / "crash"


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "DIRECTORY", tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, str]]]]:
    """The journal's socket; call it for what came."""
    path = tmp_path / "journal"
    monkeypatch.setattr(journal, "SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.setblocking(False)

        def received() -> list[dict[str, str]]:
            found: list[dict[str, str]] = []
            while True:
                try:
                    datagram = listener.recv(1 << 16).decode()
                except BlockingIOError:
                    return found
                found.append(dict(line.split("=", 1) for line in datagram.splitlines()))

        yield received


def report(folder: Path, *receivers: Receiver) -> Reported:
    return after_crash.report([Place(folder, str(folder))], receivers, Console(quiet=True), quiet=True)


def test_a_crash_is_told_once(folder: Path, entries: Callable[[], list[dict[str, str]]]) -> None:
    directory = save_crash(folder, NOW)
    (news,) = report(folder).news
    assert (news.status, news.directory) == (0, str(directory))
    assert news.summary.startswith("db7 crashed at ")
    assert PANIC.decode() in news.summary
    (entry,) = entries()
    assert entry["MESSAGE"] == news.summary
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"]) == ("4", "vmcapture")
    assert entry["VMCAPTURE_DIRECTORY"] == str(directory)
    assert entry["VMCAPTURE_PANIC"] == PANIC.decode()

    assert report(folder).news == []
    assert entries() == []
    save_crash(folder, NOW + 9)
    assert [news.directory for news in report(folder).news] == [str(folder / name_of(NOW + 9))]


def test_old_crashes_are_no_news_when_the_first_report_is_made(folder: Path) -> None:
    save_crash(folder, NOW - 8 * 86400)
    save_crash(folder, NOW)
    assert len(report(folder).news) == 1
    save_crash(folder, NOW - 9 * 86400)  # put there since: whoever did so wants to know
    assert len(report(folder).news) == 1


def test_what_is_gone_is_forgotten(folder: Path, own_state: Path) -> None:
    directory = save_crash(folder, NOW)
    report(folder)
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    assert report(folder).news == []
    assert json.loads((own_state / "reported.json").read_text()) == {"crashes": {}}


def test_a_disk_that_is_not_there_now_is_not_forgotten(folder: Path) -> None:
    save_crash(folder, NOW)
    report(folder)
    after_crash.report([], [], Console(quiet=True), quiet=True)
    assert report(folder).news == []


# --- verified


def check(directory: Path) -> Verdict:
    return after_crash.check(crashes.describe(directory))


def test_a_whole_crash_is_read_back(folder: Path) -> None:
    assert check(save_crash(folder)) == Verdict(0, "whole, every page read back")


@pytest.mark.parametrize("name", ["vmcore", "vmcore-dmesg.txt", "registers.json"])
def test_a_flipped_byte_anywhere_is_damage(
    name: str, folder: Path, entries: Callable[[], list[dict[str, str]]]
) -> None:
    path = save_crash(folder, NOW) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (news,) = report(folder).news
    assert news.status == after_crash.DAMAGED
    assert f"damaged: {name}: " in news.summary
    assert entries()[0]["PRIORITY"] == "2"


def test_a_file_that_is_gone_is_damage(folder: Path) -> None:
    directory = save_crash(folder)
    (directory / "registers.txt").unlink()
    assert check(directory) == Verdict(1, "damaged: registers.txt: No such file or directory")


def test_one_that_was_cut_short_is_incomplete(folder: Path) -> None:
    directory = save_crash(folder)
    (directory / "vmcore").rename(directory / "vmcore.incomplete")
    (directory / "manifest.json").unlink()
    verdict = check(directory)
    assert verdict == Verdict(3, "incomplete: no manifest: the save did not come to its end")


def test_an_encrypted_one_is_held_against_its_manifest(folder: Path, key: Key) -> None:
    directory = save_crash(folder, options={"recipients": key.recipients})
    assert check(directory) == Verdict(0, "whole, SHA-256 as in the manifest")
    with (directory / "vmcore.flat.age").open("ab") as file:
        file.write(b"x")
    assert check(directory).status == 1


# --- told


def test_programs_get_directory_status_and_json(folder: Path, tmp_path: Path) -> None:
    directory = save_crash(folder, NOW)
    hooks = tmp_path / "notify.d"
    hooks.mkdir()
    program_of(hooks / "10-page", f'echo "$1 $2 $VMCAPTURE_STATUS" > {tmp_path}/args; cat > {tmp_path}/stdin')
    (hooks / "README").write_text("no program")
    receivers = notify.receivers([(MAIL, "root"), (COMMAND, "/bin/true")], hooks)
    assert receivers == [
        Receiver(COMMAND, str(hooks / "10-page")), Receiver(MAIL, "root"), Receiver(COMMAND, "/bin/true"),
    ]  # fmt: skip
    assert report(folder, receivers[0]).failures == []
    assert (tmp_path / "args").read_text() == f"{directory} 0 0\n"
    assert json.loads((tmp_path / "stdin").read_text())["panic"] == PANIC.decode()


@pytest.mark.parametrize(
    "left", ["10-page~", "#10-page#", ".10-page.swp", "10-page.bak", "10-page.dpkg-old", "10-page.rpmsave"]
)
def test_what_an_editor_or_a_package_left_there_is_not_run(left: str, tmp_path: Path) -> None:
    for name in (left, "10-page.sh"):
        program_of(tmp_path / name, "exit 0")
    assert notify.receivers([], tmp_path) == [Receiver(COMMAND, str(tmp_path / "10-page.sh"))]


def test_two_reports_at_once_tell_once(folder: Path, tmp_path: Path) -> None:
    save_crash(folder, NOW)
    hook = program_of(tmp_path / "hook", f"echo told >> {tmp_path}/told; sleep 0.5")
    consoles = [Console(quiet=True) for _ in range(2)]

    def run(console: Console) -> None:
        after_crash.report([Place(folder, str(folder))], [Receiver(COMMAND, str(hook))], console, quiet=True)

    threads = [threading.Thread(target=run, args=(console,)) for console in consoles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "told").read_text() == "told\n"
    said = [line for console in consoles for line in console.lines]
    assert said == ["another report is being made: waiting for it"]


def test_a_mail_goes_through_the_local_mta(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "SENDMAIL", program_of(tmp_path / "sendmail", f"echo $@; cat > {tmp_path}/mail"))
    directory = save_crash(folder, NOW)
    assert report(folder, Receiver(MAIL, "ops@example.org")).failures == []
    head, _, body = (tmp_path / "mail").read_text().partition("\n\n")
    assert "To: ops@example.org" in head
    assert "Subject: " in head
    assert f"vmcapture show {directory}" in body
    assert f"panic: {PANIC.decode()}" in body


class Hook(BaseHTTPRequestHandler):
    """Keeps what is posted; answers with the status in the path."""

    posted: list[Any]

    def do_POST(self) -> None:
        self.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(int(self.path.strip("/")))
        self.send_header("Location", "/200")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[tuple[str, list[Any]]]:
    Hook.posted = []
    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", Hook.posted
        server.shutdown()
        thread.join()


def test_a_webhook_gets_json_and_no_dump(folder: Path, web: tuple[str, list[Any]]) -> None:
    url, posted = web
    directory = save_crash(folder, NOW)
    assert report(folder, Receiver(WEBHOOK, f"{url}/200")).failures == []
    (body,) = posted
    assert body["crash"]["directory"] == str(directory)
    assert body["status"] == 0
    assert "Linux version" not in json.dumps(body), "a line of the log"


@pytest.mark.parametrize("status", [500, 302])
def test_who_could_not_be_told_is_told_by_the_next_report(
    status: int, folder: Path, tmp_path: Path, web: tuple[str, list[Any]]
) -> None:
    url, posted = web
    save_crash(folder, NOW)
    good = Receiver(COMMAND, str(program_of(tmp_path / "good", f"echo told >> {tmp_path}/told")))
    broken = Receiver(WEBHOOK, f"{url}/{status}")
    (failure,) = report(folder, broken, good).failures
    assert failure.startswith(f"notify webhook {url}/{status}: it answered {status}")
    assert len(posted) == 1, "no redirection is followed"
    assert len(report(folder, broken, good).failures) == 1
    assert (tmp_path / "told").read_text() == "told\n", "who was told is not told again"


@pytest.mark.parametrize(
    ("receiver", "line"),
    [
        (Receiver(WEBHOOK, "http://127.0.0.1:1/"), "Connection refused"),
        (Receiver(MAIL, "root"), "install a mail server"),
        (Receiver(COMMAND, "/nowhere/at/all"), "No such file or directory"),
        (Receiver(COMMAND, "/bin/false"), "failed with status 1"),
    ],
)
def test_each_failure_is_one_line(
    receiver: Receiver, line: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "SENDMAIL", tmp_path / "no-sendmail")
    save_crash(folder, NOW)
    (failure,) = report(folder, receiver).failures
    assert failure.startswith(f"notify {receiver}")
    assert line in failure
    assert "\n" not in failure


def test_a_program_that_does_not_end_is_given_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notify, "TIMEOUT", 0.5)
    save_crash(folder, NOW)
    (failure,) = report(folder, Receiver(COMMAND, str(program_of(tmp_path / "slow", "exec sleep 60")))).failures
    assert failure.endswith("did not end within 0.5 s")


# --- a crash on purpose


def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, boot: str = "before") -> crash_test.CrashTest:
    """A test whose crash is to come; the machine has been booted since."""
    (tmp_path / "boot_id").write_text(f"{boot}\n")
    monkeypatch.setattr(crash_test, "BOOT_ID", tmp_path / "boot_id")
    monkeypatch.setattr(crash_test, "KMSG", tmp_path / "kmsg")
    made = crash_test.begin("db7", ["UUID=1"])
    (tmp_path / "boot_id").write_text("after\n")
    return made


def test_a_crash_on_purpose_is_known_by_its_id(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: Callable[[], list[dict[str, str]]]
) -> None:
    made = begun(monkeypatch, tmp_path)
    assert (tmp_path / "kmsg").read_text() == f"<5>vmcapture: crash test {made.id}\n"
    save_crash(folder, NOW)
    log = PrintkRing(desc_bits=6).add(f"vmcapture: crash test {made.id}".encode()).add(PANIC)
    directory = save_crash(folder, NOW + 5, log=log)
    done = report(folder)
    assert len(done.news) == 2
    assert done.test == crash_test.last()
    assert done.test is not None
    assert (done.test.saved, done.test.result) == (True, f"whole, every page read back: {directory}")
    *_, entry = entries()
    assert (entry["PRIORITY"], entry["VMCAPTURE_TEST"], entry["VMCAPTURE_TEST_SAVED"]) == ("5", made.id, "1")
    assert report(folder).test is None, "told once"


def test_a_crash_on_purpose_that_saved_nothing_is_said_loudly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: Callable[[], list[dict[str, str]]]
) -> None:
    begun(monkeypatch, tmp_path)
    save_crash(folder, NOW)  # another crash
    test = report(folder).test
    assert test is not None
    assert test.saved is False
    assert test.result == "nothing of it was found here; look for it on UUID=1"
    assert entries()[-1]["PRIORITY"] == "2"


def test_before_the_reboot_nothing_is_said_of_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(monkeypatch, tmp_path, "after")
    assert report(folder).test is None


def test_an_encrypted_one_is_known_by_its_time(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: Key
) -> None:
    made = begun(monkeypatch, tmp_path)
    save_crash(folder, NOW, options={"recipients": key.recipients})
    near = save_crash(folder, int(made.time) + 3, options={"recipients": key.recipients})
    test = report(folder).test
    assert test is not None
    assert test.result == f"whole, SHA-256 as in the manifest: {near}"


@pytest.mark.parametrize("answers", [["web1"], ["db7", "yes"], ["", ""], ["db7", ""]])
def test_whoever_does_not_say_it_twice_crashes_nothing(answers: list[str]) -> None:
    asked = iter(answers)
    with pytest.raises(UsageError, match="nothing was done"):
        crash_test.confirm("db7", lambda _: next(asked))
    crash_test.confirm("db7", lambda question: "crash" if "panics" in question else "db7")


def test_whoever_ends_the_input_crashes_nothing() -> None:
    with pytest.raises(UsageError, match="nothing was done"):
        crash_test.confirm("db7", raising(EOFError()))


def test_a_crash_that_did_not_come_about_is_no_test(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the next report after a reboot says that nothing was saved."""
    begun(monkeypatch, tmp_path)
    before = report(folder).test
    assert before is not None
    monkeypatch.setattr(crash_test, "KMSG", tmp_path)
    with pytest.raises(KexecError, match="nothing was done"):
        crash_test.begin("db7", [])
    assert crash_test.last() == before
    monkeypatch.setattr(crash_test, "KMSG", tmp_path / "kmsg")
    crash_test.begin("db7", [])
    assert crash_test.last() != before
    monkeypatch.setattr(crash_test, "SYSRQ", tmp_path)
    with pytest.raises(KexecError, match="was not crashed"):
        crash_test.crash(before)
    assert crash_test.last() == before
    with pytest.raises(KexecError, match="was not crashed"):
        crash_test.crash(None)
    assert crash_test.last() is None


def test_what_is_remembered_of_a_test_may_be_damaged(own_state: Path) -> None:
    own_state.mkdir()
    assert crash_test.last() is None
    whole = {"id": "1", "time": 2.0, "boot_id": "boot", "host": "db7"}
    odd = (
        {"time": "soon"},
        {"time": 1e300},
        {"targets": 1},
        {"targets": [1]},
        {"result": 5},
        {"saved": 1},
        {"host": 1},
    )
    for text in ("", "[]", '{"id": 1}', '{"odd": 1}', *(json.dumps(whole | values) for values in odd)):
        (own_state / "crash-test.json").write_text(text)
        assert crash_test.last() is None
    made = crash_test.CrashTest("1", 2.0, "boot", "db7", ("UUID=1",))
    state.write(own_state / "crash-test.json", asdict(made))
    assert crash_test.last() == made
    assert (own_state / "crash-test.json").stat().st_mode & 0o777 == 0o600


def test_a_file_is_written_whole_or_not_at_all(own_state: Path) -> None:
    state.make_directory(own_state)
    state.write_text(own_state / "a", "one", 0o644)
    state.write_text(own_state / "a", "two", 0o644)
    assert [path.name for path in own_state.iterdir()] == ["a"]
    (own_state / "d").mkdir()
    with pytest.raises(StateError, match="/d: is a directory"):
        state.write_text(own_state / "d", "x")
    with pytest.raises(StateError, match="/none/a: cannot be written: "):
        state.write_text(own_state / "none/a", "x")
    assert {path.name for path in own_state.iterdir()} == {"a", "d"}


def test_no_file_takes_the_place_of_a_device(own_state: Path) -> None:
    """As ``status --prometheus /dev/null`` would, or ``config import -o /dev/stdout``, for the whole machine."""
    state.make_directory(own_state)
    os.mkfifo(own_state / "pipe")
    (own_state / "link").symlink_to("/dev/null")
    for path in (own_state / "pipe", own_state / "link", Path("/dev/no-such-device")):
        with pytest.raises(StateError, match=r"takes the place of|is for devices"):
            state.write_text(path, "x")
    assert (own_state / "pipe").is_fifo()
    assert (own_state / "link").is_symlink()
    assert not Path("/dev/no-such-device").exists()
