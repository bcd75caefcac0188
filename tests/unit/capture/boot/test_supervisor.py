"""The watch over the job: one target after another, and what hangs, is killed, or is interrupted."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from capture import pulse
from capture.boot import mounting, routes, supervisor, targets
from capture.boot.config import BootConfig
from capture.boot.routes import CARD, Link, Route
from capture.boot.supervisor import Outcome, Watch, save_to_targets
from capture.boot.watchdog import Watchdog
from capture.console import Console
from capture.errors import TargetError, UsageError
from tests.builders import crashed_core
from tests.faults import raising
from tests.outcome import FILES, WHEN, check_manifest, dump_options, listing, manifest_of

WriteFile = Callable[[bytes], str]
REPOSITORY = Path(__file__).resolve().parents[4]
QUIET = dump_options()
CRASH = f"var/crash/db7-{WHEN}"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(supervisor, "TICK", 0.05)
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")  # not this machine's own


@pytest.fixture
def disks(tools: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """``disks(good="exit 0", bad="exit 1")``: labels, and what mounting each of them does; returns where."""

    def make(**mounts: str) -> Path:
        cases = "".join(f"/dev/{label}) {script};; " for label, script in mounts.items())
        tools(findfs='echo "/dev/${1#LABEL=}"', mount=f"case $3 in {cases}esac", umount="exit 0")
        return tmp_path / "mnt"

    return make


def boot(*labels: str, **words: Any) -> BootConfig:
    return BootConfig(targets=tuple(f"LABEL={label}" for label in labels), **words)


# --- one target after another ---------------------------------------------------------------------------------------


def test_without_a_target_the_way_out_is_named(vmcore_file: WriteFile, console: Console) -> None:
    with pytest.raises(UsageError, match="vmcapture save DIR") as refused:
        save_to_targets(BootConfig(), console, QUIET, vmcore_file(crashed_core()))
    assert refused.value.exit_status == 2


def test_the_first_target_that_takes_it_is_enough(
    disks: Callable[..., Path], vmcore_file: WriteFile, tmp_path: Path, console: Console
) -> None:
    root = disks(one="exit 0", two="exit 0")
    found = save_to_targets(boot("one", "two"), console, QUIET, vmcore_file(crashed_core()))
    assert found.line == f"saved in LABEL=one/{CRASH}"
    assert (found.status, found.complete, found.log_saved, found.settled) == (0, True, True, True)
    assert listing(root / CRASH) == set(FILES)
    assert "mount -o rw /dev/two" not in (tmp_path / "calls").read_text()


def test_level_and_compression_come_from_the_command_line_of_the_kernel(
    disks: Callable[..., Path], vmcore_file: WriteFile, console: Console
) -> None:
    root = disks(one="exit 0")
    found = save_to_targets(boot("one", levels=(0,), compression="zlib:3"), console, source=vmcore_file(crashed_core()))
    dump = manifest_of(root / CRASH)["dump"]
    assert (found.status, dump["level"], dump["compression"], dump["zero_pages"]) == (0, 0, "zlib:3", 0)


def test_a_target_that_cannot_be_mounted_is_said_and_the_next_one_taken(
    disks: Callable[..., Path], vmcore_file: WriteFile, console: Console
) -> None:
    root = disks(one="echo wrong fs type >&2; exit 32", two="exit 0")
    found = save_to_targets(boot("one", "two"), console, QUIET, vmcore_file(crashed_core()))
    assert found.line == f"saved in LABEL=two/{CRASH}"
    assert any(
        line.startswith(
            "not saved: LABEL=one (/dev/one) cannot be mounted: wrong fs type; trying the next target, LABEL"
        )
        for line in console.lines
    )
    assert "cannot be mounted" in (root / CRASH / "capture-log.txt").read_text()


def test_on_a_full_disk_there_is_a_part_and_the_next_one_gets_all(
    tools: Callable[..., Path], vmcore_file: WriteFile, console: Console
) -> None:
    mount = "/bin/mount"
    tools(
        findfs='echo "/dev/${1#LABEL=}"',
        mount=f'case $3 in /dev/small) exec {mount} -t tmpfs -o size=192k tmpfs "$4";; esac',
        umount=f'[ "$1" != {mounting.MOUNT_POINT} ]',  # (what is on it is looked at below)
    )
    if os.geteuid() != 0:
        pytest.skip("only root mounts")
    source = vmcore_file(crashed_core(pages=os.urandom(400 << 10)))
    small = mounting.MOUNT_POINT
    try:
        found = save_to_targets(boot("small", "large"), console, QUIET, source)
        assert os.path.ismount(small)
        assert "vmcore.incomplete" in listing(small / CRASH)
    finally:
        subprocess.run(["/bin/umount", small], check=False)
    assert found.line == f"saved in LABEL=large/{CRASH}"
    large = small.with_name("mnt-2") / CRASH
    assert check_manifest(large)["complete"]
    assert any("saved in part in LABEL=small" in line and "no room left" in line for line in console.lines)


def test_with_no_target_left_every_reason_is_in_the_line(
    disks: Callable[..., Path], vmcore_file: WriteFile, console: Console
) -> None:
    disks(one="echo first >&2; exit 32", two="echo second >&2; exit 32")
    found = save_to_targets(boot("one", "two"), console, QUIET, vmcore_file(crashed_core()))
    assert (found.status, found.what, found.log_saved) == (5, "not saved", False)
    assert found.line.index("first") < found.line.index("second")
    assert found.line.startswith("not saved: ")


def test_a_source_that_is_no_vmcore_is_not_tried_again(
    disks: Callable[..., Path], tmp_path: Path, console: Console
) -> None:
    disks(one="exit 0", two="exit 0")
    (tmp_path / "none").write_bytes(b"no vmcore")
    found = save_to_targets(boot("one", "two"), console, QUIET, str(tmp_path / "none"))
    assert (found.status, found.what) == (4, "not saved")
    assert "mount" not in (tmp_path / "calls").read_text()


def test_what_the_source_lacks_is_no_reason_for_another_target(
    disks: Callable[..., Path], vmcore_file: WriteFile, tmp_path: Path, console: Console
) -> None:
    disks(one="exit 0", two="exit 0")
    found = save_to_targets(boot("one", "two"), console, QUIET, vmcore_file(crashed_core(drop=("SYMBOL(prb)",))))
    assert (found.what, found.status, found.settled) == ("saved in part", 3, True)
    assert "mount -o rw /dev/two" not in (tmp_path / "calls").read_text()


def test_why_the_last_target_failed_is_said_where_another_one_has_a_part(
    monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    outcomes = {
        "LABEL=a": Outcome("LABEL=a", 3, "saved in part", "/x", ("full",), log_saved=True, pages=5),
        "LABEL=b": Outcome("LABEL=b", 3, "saved in part", "/x", ("fuller",), log_saved=True, pages=7),
        "LABEL=c": Outcome("LABEL=c", 5, "not saved", reasons=("not there",)),
    }
    jobs(monkeypatch, lambda *arguments, **_options: arguments[-1](outcomes[arguments[1]]._asdict()))
    monkeypatch.setattr(targets, "devices_of", lambda _names: {})
    assert save_to_targets(boot("a", "b", "c"), console, QUIET) == outcomes["LABEL=b"]
    assert console.lines[-1] == "not saved: not there"


def test_targets_are_looked_for_before_any_disk_can_hang(
    tools: Callable[..., Path], vmcore_file: WriteFile, tmp_path: Path, console: Console
) -> None:
    """findfs reads all disks: once one hangs, it does too."""
    if os.geteuid() != 0:
        pytest.skip("only root makes device nodes")
    for name in ("one", "two"):
        os.mknod(tmp_path / name, 0o060600, os.makedev(7, 0))
    tools(
        findfs=f'[ -e {tmp_path}/hangs ] && exec /bin/sleep 600; echo "{tmp_path}/${{1#LABEL=}}"',
        mount=f"case $3 in *one) : > {tmp_path}/hangs; exec /bin/sleep 600;; esac",
        umount="exit 0",
    )
    found = save_to_targets(boot("one", "two", timeout=1), console, QUIET, vmcore_file(crashed_core()))
    subprocess.run(["/usr/bin/pkill", "-f", "sleep 600"], check=False)
    assert found.line == f"saved in LABEL=two/{CRASH}"


def test_targets_are_waited_for_from_the_start_on_not_each_anew(vmcore_file: WriteFile, console: Console) -> None:
    started = time.monotonic()
    found = save_to_targets(
        BootConfig(targets=("/dev/none1", "/dev/none2"), wait=6), console, QUIET, vmcore_file(crashed_core())
    )
    assert time.monotonic() - started < 12
    assert found.status == 5
    assert "none1" in found.line
    assert "none2" in found.line


def test_a_network_is_waited_for_from_its_turn_on(
    vmcore_file: WriteFile, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a missing disk took of the time has not brought the network's card nearer."""
    monkeypatch.setattr(routes, "PLACE", tmp_path)
    route = Route("server", "192.0.2.1", (Link(CARD, "eth0", hardware="52:54:00:ff:ff:ff"),), "192.0.2.2/24")
    routes.place_of("server").write_bytes(routes.dump(route))
    started = time.monotonic()
    boot = BootConfig(targets=("/dev/none", "nfs:server:/x"), wait=2)
    found = save_to_targets(boot, console, QUIET, vmcore_file(crashed_core()))
    assert time.monotonic() - started >= 4
    assert found.reasons[1].startswith("no network card 52:54:00:ff:ff:ff (it was eth0); there is ")


def test_when_the_time_is_over_no_other_target_is_tried(
    disks: Callable[..., Path], vmcore_file: WriteFile, tmp_path: Path, console: Console
) -> None:
    disks(one="echo no >&2; exit 32", two="exit 0")
    options = QUIET._replace(deadline=time.monotonic() - 1)
    found = save_to_targets(boot("one", "two"), console, options, vmcore_file(crashed_core()))
    assert found.what == "not saved"
    assert "/dev/two" not in (tmp_path / "calls").read_text()


def test_a_second_save_at_the_same_time_is_refused(
    disks: Callable[..., Path], vmcore_file: WriteFile, tmp_path: Path, console: Console
) -> None:
    disks(slow=f": > {tmp_path}/begun; exec /bin/sleep 5")
    child = os.fork()
    if not child:
        try:
            save_to_targets(boot("slow"), console, QUIET, vmcore_file(crashed_core()))
        finally:
            os._exit(0)
    try:
        wait_for(tmp_path / "begun")
        with pytest.raises(TargetError, match="another save is running"):
            save_to_targets(boot("slow"), console, QUIET, vmcore_file(crashed_core()))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- what hangs, and what is killed ---------------------------------------------------------------------------------


def test_a_disk_that_hangs_in_mounting_is_given_up_and_the_next_one_taken(
    disks: Callable[..., Path], vmcore_file: WriteFile, tmp_path: Path, console: Console
) -> None:
    disks(one=f"echo $$ > {tmp_path}/pid; exec /bin/sleep 600", two="exit 0")
    found = save_to_targets(boot("one", "two", timeout=1), console, QUIET, vmcore_file(crashed_core()))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert found.line == f"saved in LABEL=two/{CRASH}"
    assert f"/dev/two {mounting.MOUNT_POINT}-2\n" in (tmp_path / "calls").read_text(), "the first may be mounted later"
    (line,) = [line for line in console.lines if "trying the next target" in line]
    assert "LABEL=one: no answer from the target for 1 s (vmcapture.timeout=)" in line


def test_a_disk_that_hangs_in_unmounting_takes_nothing_from_what_was_saved(
    tools: Callable[..., Path], vmcore_file: WriteFile, tmp_path: Path, console: Console
) -> None:
    tools(findfs="echo /dev/one", mount="exit 0", umount=f"echo $$ > {tmp_path}/pid; exec /bin/sleep 600")
    found = save_to_targets(boot("one", "two", timeout=1), console, QUIET, vmcore_file(crashed_core()))
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert found.line == f"saved in LABEL=one/{CRASH}"
    assert any("no answer" in line and line.endswith("after the save") for line in console.lines)


def jobs(monkeypatch: pytest.MonkeyPatch, job: Callable[..., None]) -> None:
    """Let ``job`` be done instead of the save; it gets what the job's process gets."""
    monkeypatch.setattr(supervisor, "_at_target", job)


def test_what_a_hanging_disk_has_taken_counts(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    def job(*_arguments: Any, **_options: Any) -> None:
        pulse.note_log()
        with pulse.at_target():
            time.sleep(600)

    jobs(monkeypatch, job)
    found = save_to_targets(boot("one", timeout=1), console, QUIET)
    assert (found.what, found.status, found.log_saved) == ("saved in part", 3, True)
    assert "no answer from the target" in found.line


def test_a_source_that_hangs_is_not_called_a_disk(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    jobs(monkeypatch, lambda *_arguments, **_options: time.sleep(600))
    found = save_to_targets(boot("one", timeout=1), console, QUIET)
    assert (found.what, found.status, found.log_saved) == ("not saved", 5, False)
    assert "nothing moved for 1 s" in found.line


def test_a_slow_disk_is_not_given_up(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    def job(*arguments: Any, **_options: Any) -> None:
        for _ in range(30):
            time.sleep(0.1)
            pulse.beat()
        arguments[-1](Outcome("LABEL=one", 0, "saved", "/x", settled=True)._asdict())

    jobs(monkeypatch, job)
    assert save_to_targets(boot("one", timeout=1), console, QUIET).complete


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_job_that_was_killed_goes_on_where_it_was_with_as_little_as_can_be(
    number: int, disks: Callable[..., Path], vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    """The first one dies in the midst of its dump."""
    root = disks(one="exit 0")
    real = supervisor._at_target

    def job(*arguments: Any, can_map: bool) -> None:
        if can_map:  # (it is forked: what changes here is its own)
            faulthandler.disable()  # (pytest's: nobody needs to see where it was)
            writes = 0

            def pwritev(*writing: Any) -> int:
                nonlocal writes
                writes += 1
                if writes == 12:
                    os.kill(os.getpid(), number)
                return write(*writing)

            write, os.pwritev = os.pwritev, pwritev  # (in the job's own process)
        real(*arguments, can_map=can_map)

    monkeypatch.setattr(supervisor, "_at_target", job)
    source = vmcore_file(crashed_core(pages=os.urandom(400 << 10)))
    found = save_to_targets(boot("one"), console, QUIET, source)
    assert found.line == f"saved in LABEL=one/{CRASH}"
    assert any(f"killed by signal {int(number)}" in line and "once more" in line for line in console.lines)
    assert any("where it was cut short before" in line for line in console.lines)
    assert check_manifest(root / CRASH)["complete"]


@pytest.mark.parametrize("second", ["killed", "not mounted"])
def test_what_a_job_has_saved_that_was_killed_counts_whatever_becomes_of_the_next(
    second: str, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    def job(*arguments: Any, can_map: bool) -> None:
        if can_map:
            pulse.note_log()
        elif second == "not mounted":
            arguments[-1](Outcome("LABEL=one", 5, "not saved", reasons=("LABEL=one: not mounted",))._asdict())
            return
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(supervisor, "_at_target", job)
    found = save_to_targets(boot("one"), console, QUIET)
    assert (found.what, found.status, found.log_saved) == ("saved in part", 3, True)
    assert found.reasons[0].startswith("LABEL=one: ")


def test_where_no_process_can_be_made_that_is_the_reason(
    disks: Callable[..., Path], vmcore_file: WriteFile, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    disks(one="exit 0")
    monkeypatch.setattr(os, "fork", raising(OSError(12, "Cannot allocate memory")))
    found = save_to_targets(boot("one"), console, QUIET, vmcore_file(crashed_core()))
    assert (found.line, found.status) == ("not saved: LABEL=one: Cannot allocate memory", 5)


def test_a_job_that_is_killed_again_is_a_failure(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    jobs(monkeypatch, lambda *_arguments, **_options: os.kill(os.getpid(), signal.SIGKILL))
    found = save_to_targets(boot("one"), console, QUIET)
    assert (found.what, found.status) == ("not saved", 5)
    assert "killed by signal 9 (out of memory)" in found.line
    assert len([line for line in console.lines if "once more" in line]) == 1


def test_an_error_of_ours_is_one_line(
    monkeypatch: pytest.MonkeyPatch, vmcore_file: WriteFile, console: Console
) -> None:
    from capture.boot import save

    def broken(*_arguments: Any, **_options: Any) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr(save, "save_to_target", broken)
    found = save_to_targets(boot("one"), console, QUIET, vmcore_file(crashed_core()))
    assert found.line == "not saved: internal error: ZeroDivisionError: of ours"


class Dog(Watchdog):
    """Counts what it gets."""

    def __init__(self, console: Console) -> None:
        super().__init__([], console)
        self.fed: list[float] = []

    def feed(self) -> None:
        self.fed.append(time.monotonic())


def test_the_watchdog_is_fed_until_a_disk_is_given_up(monkeypatch: pytest.MonkeyPatch, console: Console) -> None:
    """Else it would reset the machine before the next disk is tried."""
    dog = Dog(console)
    jobs(monkeypatch, lambda *_arguments, **_options: time.sleep(600))
    save_to_targets(boot("one", timeout=1), console, QUIET, dog=dog)
    assert 0.5 < dog.fed[-1] - dog.fed[0] <= 1.1


def test_where_no_disk_is_ever_given_up_the_watchdog_is_fed_while_bytes_move_only(
    monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    def job(*_arguments: Any, **_options: Any) -> None:
        for _ in range(10):
            time.sleep(0.1)
            pulse.beat()
        time.sleep(2)

    dog = Dog(console)
    jobs(monkeypatch, job)
    started = time.monotonic()
    save_to_targets(boot("one", timeout=0), console, QUIET, dog=dog)
    assert len(dog.fed) >= 5
    assert dog.fed[-1] - started < 2
    assert time.monotonic() - started >= 3


# --- whoever wants it to end ----------------------------------------------------------------------------------------


@pytest.fixture
def saving(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that saves to a target that hangs for ever, in the midst of the job."""
    program = f"""
        import io, time
        from pathlib import Path
        from capture.boot import mounting, supervisor
        from capture.boot.config import BootConfig
        from capture.console import Console
        mounting.MOUNT_POINT = Path({str(tmp_path)!r}) / "mnt"

        def job(*_arguments, **_options):
            Path({str(tmp_path)!r}, "begun").touch()
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                Path({str(tmp_path)!r}, "asked").touch()
                time.sleep(600)

        supervisor._at_target = job
        found = supervisor.save_to_targets(BootConfig(targets=("LABEL=one", "LABEL=two")), Console())
        print(found.line)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < limit, path
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_twice_gets_the_machine_back(number: int, saving: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for(tmp_path / "begun")
    # Ctrl-C reaches the whole group, kill one process.
    end = os.killpg if number == signal.SIGINT else os.kill
    end(saving.pid, number)
    wait_for(tmp_path / "asked")
    end(saving.pid, number)
    out, _ = saving.communicate(timeout=20)
    assert out == "not saved: LABEL=one: interrupted\n"


def test_no_job_is_left_when_the_watch_is_killed(saving: subprocess.Popen[str], tmp_path: Path) -> None:
    wait_for(tmp_path / "begun")
    (job,) = Path(f"/proc/{saving.pid}/task/{saving.pid}/children").read_text().split()
    saving.kill()
    saving.wait()
    limit = time.monotonic() + 20
    while Path(f"/proc/{job}").exists() and "Z" not in Path(f"/proc/{job}/stat").read_text().split()[2]:
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_job_that_cannot_be_killed_is_left_behind(
    tools: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    """As in the kernel, waiting for a disk; here it is only not killed."""
    tools()
    monkeypatch.setattr(supervisor, "_DEATH", 0.3)
    monkeypatch.setattr(Watch, "_kill", lambda _self: None)
    with Watch(1, console) as watch:
        _, end = watch.run(lambda _tell: time.sleep(3))
    os.wait()
    assert end.hung
    assert "cannot even be killed" in end.line
