"""The administrator's programs around the save: real scripts, which agree, refuse, die and hang."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot import __main__ as boot_main
from capture.boot import actions, hooks, mounting, supervisor
from capture.boot.config import BootConfig
from capture.boot.supervisor import Outcome
from capture.boot.watchdog import Watchdog
from capture.console import Console
from tests.faults import raising

Hook = Callable[..., Path]
SAVED = Outcome("LABEL=a", 0, "saved", "/var/crash/x", log_saved=True)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(supervisor, "TICK", 0.05)
    monkeypatch.setattr(hooks, "_TICK", 0.05)
    monkeypatch.setattr(hooks, "BEFORE", str(tmp_path / "pre.d"))
    monkeypatch.setattr(hooks, "AFTER", str(tmp_path / "post.d"))
    monkeypatch.setattr(mounting, "MOUNT_POINT", tmp_path / "mnt")


@pytest.fixture
def hook(tmp_path: Path) -> Hook:
    """``hook("pre", "exit 1")``: one more script for before or after the save."""

    def make(when: str, script: str, first_line: str = "#!/bin/sh") -> Path:
        folder = tmp_path / f"{when}.d"
        folder.mkdir(exist_ok=True)
        number = len(list(folder.iterdir()))
        program = tmp_path / f"{when}{number}"
        program.write_text(f"{first_line}\n{script}\n")
        program.chmod(0o755)
        (folder / f"{number:02}").symlink_to(program)
        return program

    return make


@pytest.fixture
def dog(console: Console) -> Watchdog:
    return Watchdog([], console)


def test_without_any_nothing_is_said(console: Console, dog: Watchdog) -> None:
    assert hooks.run_before(5, console, dog) is None
    hooks.run_after(SAVED, 5, console, dog)
    assert console.lines == []


def test_they_run_in_their_order_and_what_they_print_is_on_the_console(
    hook: Hook, console: Console, dog: Watchdog
) -> None:
    first, second = hook("pre", "echo one; echo two >&2; printf three"), hook("pre", "printf 'a\\033[2Jb\\n'")
    assert hooks.run_before(5, console, dog) is None
    assert console.lines == [
        f"running {first}", "pre0: one", "pre0: two", "pre0: three", f"running {second}", "pre1: a\\x1b[2Jb",
    ]  # fmt: skip


def test_the_first_that_refuses_ends_it(hook: Hook, console: Console, dog: Watchdog) -> None:
    refusing = hook("pre", "exit 3")
    hook("pre", "echo never")
    assert hooks.run_before(5, console, dog) == f"{refusing} ended with status 3: nothing is saved, as it asks"
    assert console.lines == [f"running {refusing}"]


def test_after_the_save_each_is_told_how_it_ended(hook: Hook, console: Console, dog: Watchdog) -> None:
    hook("post", 'echo "$1 $# $VMCAPTURE_OUTCOME $VMCAPTURE_TARGET $VMCAPTURE_DIRECTORY"; exit 7')
    hook("post", 'echo "status $1"')
    hooks.run_after(SAVED._replace(status=3, what="saved in part"), 5, console, dog)
    said = [line for line in console.lines if not line.startswith("running")]
    assert said[0] == "post0: 3 1 saved in part LABEL=a /var/crash/x"
    assert said[1].endswith("post0 ended with status 7")
    assert said[2] == "post1: status 3"


def test_one_that_hangs_is_killed_with_its_children_and_costs_no_save(
    hook: Hook, console: Console, dog: Watchdog, tmp_path: Path
) -> None:
    hanging = hook("pre", f"trap '' TERM INT\nsleep 60 &\necho $! > {tmp_path}/child\nwhile :; do sleep 60; done")
    begun = time.monotonic()
    assert hooks.run_before(1, console, dog) is None
    assert time.monotonic() - begun < 10
    assert console.lines[-1] == f"{hanging}: no end after 1 s (vmcapture.timeout=), killed; going on"
    child = int((tmp_path / "child").read_text())
    while lives(child):  # what was killed is not gone at once
        assert time.monotonic() - begun < 20
        time.sleep(0.05)


def test_one_that_never_stops_talking_is_killed_too_and_does_not_flood_the_console(
    hook: Hook, console: Console, dog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "MAX_LINES", 3)
    hook("pre", "while :; do echo again; done")
    assert hooks.run_before(1, console, dog) is None
    assert console.lines[1:5] == ["pre0: again"] * 3 + ["pre0: more than 3 lines: the rest is not shown"]
    assert "no end after 1 s" in console.lines[5]


def test_a_child_that_stays_behind_is_not_waited_for(hook: Hook, console: Console, dog: Watchdog) -> None:
    hook("pre", "sleep 30 & echo here")
    begun = time.monotonic()
    assert hooks.run_before(20, console, dog) is None
    assert time.monotonic() - begun < 5
    assert console.lines[1:] == ["pre0: here"]


@pytest.mark.parametrize(
    ("script", "first_line", "said"),
    [
        ("kill -9 $$", "#!/bin/sh", "was killed by signal 9"),
        ("true", "#!/no/such/interpreter", "cannot be run: No such file or directory"),
        ("true", "", "cannot be run: Exec format error"),
    ],
)
def test_one_that_gives_no_answer_has_not_said_no(
    script: str, first_line: str, said: str, hook: Hook, console: Console, dog: Watchdog
) -> None:
    program = hook("pre", script, first_line)
    assert hooks.run_before(5, console, dog) is None
    assert console.lines[-1] == f"{program}: {said}; going on"


def test_a_line_without_an_end_is_cut(hook: Hook, console: Console, dog: Watchdog) -> None:
    hook("pre", "i=0; while [ $i -lt 300 ]; do printf 0123456789; i=$((i+1)); done; echo; echo last")
    assert hooks.run_before(10, console, dog) is None
    assert all(len(line) <= hooks.MAX_LINE + len("pre0: ") for line in console.lines[1:])
    assert console.lines[-1] == "pre0: last"


def lives(process: int) -> bool:
    try:
        return not Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except OSError:
        return False


# --- around a save --------------------------------------------------------------------------------------------------


def crash_boot(console: Console, monkeypatch: pytest.MonkeyPatch, outcome: Outcome | Exception) -> list[str]:
    """Run the crash boot with a save that ends like this; return what was done at its end."""
    done: list[str] = []

    def save(*_: object, **__: object) -> Outcome:
        console.say("saving")
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(boot_main, "save_to_targets", save)
    monkeypatch.setattr(boot_main, "print_last_words", lambda *_: console.say("last words"))
    monkeypatch.setattr(actions, "perform", lambda action, *_: done.append(action))
    boot = BootConfig(targets=("LABEL=a",), final="poweroff", failure="halt", timeout=5)
    assert boot_main._save_and_act(boot, console, Watchdog([], console)) == boot_main.SHELL
    return done


def test_a_refusal_before_the_save_leads_to_the_final_action(
    hook: Hook, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook("pre", "exit 1")
    hook("post", "echo never")
    assert crash_boot(console, monkeypatch, SAVED) == ["poweroff"]
    assert "saving" not in console.lines
    assert console.lines[-2].endswith("ended with status 1: nothing is saved, as it asks")


@pytest.mark.parametrize(
    ("outcome", "status", "action"),
    [
        (SAVED, 0, "poweroff"),
        (SAVED._replace(status=3, what="saved in part"), 3, "halt"),
        (Outcome("LABEL=a", 5, "not saved", reasons=("full",), log_saved=True), 5, "halt"),
        (ValueError("oops"), 1, "halt"),
    ],
)
def test_after_any_save_comes_the_other_hook_with_its_status(
    outcome: Outcome | Exception,
    status: int,
    action: str,
    hook: Hook,
    console: Console,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook("pre", "echo before")
    hook("post", 'echo "after $1"')
    assert crash_boot(console, monkeypatch, outcome) == [action]
    said = [line for line in console.lines if not line.startswith("running")]
    assert said[:2] == ["pre0: before", "saving"]
    assert said[-2:] == [f"post0: after {status}", action]


def test_what_goes_wrong_with_the_hooks_themselves_costs_nothing(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run_before", "run_after"):
        monkeypatch.setattr(hooks, name, raising(OSError(12, os.strerror(12))))
    assert crash_boot(console, monkeypatch, SAVED) == ["poweroff"]
    assert "saving" in console.lines
    assert sum("going on" in line for line in console.lines) == 2
