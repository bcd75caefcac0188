"""The man page and the README name what the program really takes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from capture.boot import config
from initramfs import directives
from initramfs.cli import main
from initramfs.config import parse
from tests.guest import host

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = (
    "dump", "dmesg", "registers", "info", "verify", "save", "initramfs", "load", "unload",
    "estimate", "arm", "status", "test", "list", "show", "report", "config", "collect",
)  # fmt: skip
BELOW: dict[str, tuple[str, ...]] = {"config": ("check", "import")}
"""Commands with commands of their own."""


def helped(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--help"])
    return capsys.readouterr().out


def manual() -> str:
    return (REPOSITORY / "docs/vmcapture.8").read_text().replace("\\-", "-")


def readme() -> str:
    return (REPOSITORY / "README.md").read_text()


def test_these_are_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(re.findall(r"^    (\w+)", helped(capsys), re.MULTILINE)) == COMMANDS
    for command, names in BELOW.items():
        assert tuple(re.findall(r"^    (\w+)", helped(capsys, command), re.MULTILINE)) == names


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_in_the_man_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    ways: list[tuple[str, ...]] = [(command, name) for name in BELOW.get(command, ())] or [(command,)]
    options = {
        option
        for way in ways
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", helped(capsys, *way).partition("options:")[2])
    }
    assert len(options) >= 5
    assert [option for option in sorted(options) if option not in manual()] == []
    assert f"\n.TP\n.B {command}\n" in manual()
    assert re.search(rf"vmcapture[^\n]*\b{command}\b", readme())


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("page", ["vmcapture.8", "vmcapture.conf.5"])
def test_a_page_is_whole_on_every_terminal(page: str, locale: str) -> None:
    if shutil.which("man") is None or shutil.which("groff") is None:
        pytest.skip("man-db and groff are not installed")
    ran = subprocess.run(
        ["man", "--warnings", "-l", REPOSITORY / "docs" / page],
        capture_output=True, check=True, timeout=60, env={**os.environ, "LC_ALL": locale, "MANWIDTH": "100"},
    )  # fmt: skip
    assert ran.stderr == b""
    assert ("UUID=..." if locale == "C" else "UUID=…").encode() in ran.stdout


def test_every_directive_is_in_its_man_page_and_no_other() -> None:
    text = (REPOSITORY / "docs/vmcapture.conf.5").read_text().replace("\\-", "-")
    tags = "\n".join(re.findall(r"^\.TP\n\.B (.*)$", text, re.MULTILINE))
    documented = set(re.findall(r"(?:^|\\fB|, )([a-z][a-z0-9_]+)(?=[ \\]|$)", tags, re.MULTILINE))
    values = {word for hint, _ in directives.DIRECTIVES.values() for word in re.findall(r"[a-z]\w+", hint)}
    assert documented - values <= directives.DIRECTIVES.keys()
    assert directives.DIRECTIVES.keys() <= documented


def test_the_configuration_in_readme_and_man_page_is_a_good_one() -> None:
    page = (REPOSITORY / "docs/vmcapture.conf.5").read_text().replace("\\-", "-")
    for text, begins, ends in ((readme(), "```\next4", "```"), (page, ".nf\n", ".fi")):
        example = begins[begins.index("\n") + 1 :] + text.partition(begins)[2].partition(ends)[0]
        found = parse(example, Path("example"))
        assert len(found.targets) >= 2
        assert (found.keep, found.levels) == (5, "1,17,31")


def test_no_word_of_the_kernel_command_line_is_missing_or_made_up() -> None:
    words = {word for text in (manual(), readme()) for word in re.findall(r"vmcapture\.([a-z]+)=", text)}
    unknown = [
        line
        for line in config.parse(" ".join(f"vmcapture.{word}=x" for word in words)).problems
        if "no such option" in line
    ]
    assert unknown == []
    documented = set(re.findall(r"``vmcapture\.([a-z]+)=", config.__doc__ or ""))
    assert len(documented) >= 7
    for text in (manual(), readme()):
        assert documented <= set(re.findall(r"vmcapture\.([a-z]+)=", text))


def test_both_lists_of_the_hosts_programs_agree() -> None:
    """tests/host-packages.sh runs before there is any Python environment; tests/guest/host.py says what is missing."""
    script = (REPOSITORY / "tests/host-packages.sh").read_text()
    listed = dict(re.findall(r"^    ([\w.-]+):([\w.-]+)$", script, re.MULTILINE))
    assert dict(host.PACKAGES).items() <= listed.items()
