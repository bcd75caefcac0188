"""The words on the capture kernel's command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.boot.config import BootConfig, parse
from capture.boot.room import Floor
from capture.boot.targets import patience
from capture.dumpfile.codec import codec

REPOSITORY = Path(__file__).resolve().parents[4]

DEFAULTS = BootConfig(
    targets=(),
    path="/var/crash",
    final="reboot",
    failure="shell",
    wait=None,
    timeout=300,
    levels=(31,),
    compression="zstd:auto",
    watchdog=0,
    keep=None,
    free=None,
    problems=(),
)
"""The table in README.md."""


def test_nothing_said_means_the_defaults_of_the_readme() -> None:
    assert parse("") == parse("root=/dev/vda1 ro quiet\n") == DEFAULTS
    rows = re.findall(
        r"^\| `vmcapture\.(\w+)=` \| .* \| (.*) \|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE
    )
    table = {word: default.strip("`") for word, default in rows}
    assert table == {
        "target": table["target"],  # (`vmcapture load` writes it)
        "path": DEFAULTS.path,
        "final": DEFAULTS.final,
        "failure": DEFAULTS.failure,
        "wait": f"{patience('LABEL=x', DEFAULTS.wait)}; server {patience('ssh:server', DEFAULTS.wait)}",
        "timeout": str(DEFAULTS.timeout),
        "level": ",".join(map(str, DEFAULTS.levels)),
        "compress": DEFAULTS.compression,
        "deadline": str(DEFAULTS.deadline),
        "watchdog": str(DEFAULTS.watchdog),
        "keep": "all",
        "free": "0",
    }


@pytest.mark.parametrize(
    ("word", "changed"),
    [
        ("vmcapture.target=LABEL=crash", {"targets": ("LABEL=crash",)}),
        ("vmcapture.target=UUID=0a1b-2c3d", {"targets": ("UUID=0a1b-2c3d",)}),
        ("vmcapture.target=/dev/vda1", {"targets": ("/dev/vda1",)}),
        ("vmcapture.path=/", {"path": "/"}),
        ("vmcapture.path=/srv/a=b", {"path": "/srv/a=b"}),
        ("vmcapture.path=/srv/crash..old", {"path": "/srv/crash..old"}),
        ("vmcapture.final=poweroff", {"final": "poweroff"}),
        ("vmcapture.final=halt", {"final": "halt"}),
        ("vmcapture.final=shell", {"final": "shell"}),
        ("vmcapture.failure=reboot", {"failure": "reboot"}),
        ("vmcapture.wait=0", {"wait": 0}),
        ("vmcapture.wait=007", {"wait": 7}),
        ("vmcapture.wait=3600", {"wait": 3600}),
        ("vmcapture.level=0", {"levels": (0,)}),
        ("vmcapture.level=17", {"levels": (17,)}),
        ("vmcapture.level=1,17,31", {"levels": (1, 17, 31)}),
        ("vmcapture.compress=none", {"compression": "none"}),
        ("vmcapture.compress=zlib", {"compression": "zlib"}),
        ("vmcapture.compress=zlib:9", {"compression": "zlib:9"}),
        ("vmcapture.compress=zstd:-5", {"compression": "zstd:-5"}),
        ("vmcapture.deadline=600", {"deadline": 600}),
        ("vmcapture.watchdog=10", {"watchdog": 10}),
        ("vmcapture.watchdog=3600", {"watchdog": 3600}),
        ("vmcapture.watchdog=0", {"watchdog": 0}),
        ("vmcapture.keep=1", {"keep": 1}),
        ("vmcapture.keep=09999", {"keep": 9999}),
        ("vmcapture.free=0", {"free": Floor()}),
        ("vmcapture.free=10G", {"free": Floor(size=10 << 30)}),
        ("vmcapture.free=5%", {"free": Floor(percent=5)}),
        ("elfcorehdr=0x2ff60000", {}),
    ],
)
def test_each_word_changes_one_thing(word: str, changed: dict[str, Any]) -> None:
    assert parse(word) == DEFAULTS._replace(**changed)
    assert parse(f"BOOT_IMAGE=/vmlinuz {word} quiet\n") == parse(word)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("timeout=1", "timeout=2"), ("path=/a", "path=/b"), ("final=halt", "final=shell"),
        ("failure=halt", "failure=reboot"), ("wait=1", "wait=2"), ("level=1", "level=0"),
        ("compress=zlib", "compress=none"), ("keep=1", "keep=2"), ("free=1G", "free=5%"),
    ],
)  # fmt: skip
def test_the_last_of_two_equal_words_counts(first: str, last: str) -> None:
    assert parse(f"vmcapture.{first} ro vmcapture.{last}") == parse(f"vmcapture.{last}")


def test_every_target_counts_in_its_order_and_once() -> None:
    found = parse("vmcapture.target=LABEL=b ro vmcapture.target=/dev/vda1 vmcapture.target= vmcapture.target=LABEL=b")
    assert found == DEFAULTS._replace(targets=("LABEL=b", "/dev/vda1"))


def test_nonsense_before_a_good_word_does_no_harm() -> None:
    assert parse("vmcapture.wait=soon vmcapture.wait=5") == DEFAULTS._replace(wait=5)


@pytest.mark.parametrize(
    "word",
    [
        "vmcapture.final=explode",
        "vmcapture.final=",
        "vmcapture.final=Reboot",
        "vmcapture.failure=retry",
        "vmcapture.wait=",
        "vmcapture.wait=-1",
        "vmcapture.wait=3601",
        "vmcapture.wait=1e3",
        "vmcapture.wait=5s",
        "vmcapture.wait=\u0663",  # a digit in Arabic
        "vmcapture.wait=0000000009999",
        "vmcapture.wait=99999999999999999999",
        "vmcapture.watchdog=9",
        "vmcapture.watchdog=3601",
        "vmcapture.watchdog=on",
        "vmcapture.level=32",
        "vmcapture.level=",
        "vmcapture.level=00000000031",
        "vmcapture.level=1,",
        "vmcapture.level=1,32",
        "vmcapture.level=-1",
        "vmcapture.level=\u0663",
        "vmcapture.compress=lzo",
        "vmcapture.compress=zstd:0",
        "vmcapture.compress=zlib:10",
        "vmcapture.compress=none:1",
        "vmcapture.compress=",
        "vmcapture.keep=",
        "vmcapture.keep=0",
        "vmcapture.keep=-1",
        "vmcapture.keep=10000",
        "vmcapture.keep=all",
        "vmcapture.keep=\u0663",
        "vmcapture.free=",
        "vmcapture.free=100%",
        "vmcapture.free=-1G",
        "vmcapture.free=10GB",
        "vmcapture.free=\u0663",
        "vmcapture.free=much",
        "vmcapture.path=",
        "vmcapture.path=crash",
        "vmcapture.path=/var/../../etc",
        "vmcapture.path=..",
        "vmcapture.verbose=1",
        "vmcapture.=1",
        "vmcapture.final",
        "vmcapture.target",
    ],
)
def test_nonsense_is_said_and_the_default_taken(word: str) -> None:
    found = parse(word)
    assert found._replace(problems=()) == DEFAULTS
    (problem,) = found.problems
    assert problem.startswith(word.partition("=")[0])


@pytest.mark.parametrize(
    "start", ["wait=", "wait=000000000", "level=000000000", "compress=zstd:", "compress=zlib:", "keep=", "free="]
)
def test_a_number_of_five_thousand_digits_is_nonsense_too(start: str) -> None:
    """Python refuses to convert more than 4300 digits."""
    found = parse(f"vmcapture.{start}{'9' * 5000}")
    assert found._replace(problems=()) == DEFAULTS
    assert len(found.problems) == 1


def test_each_nonsense_is_said_once_and_good_words_still_count() -> None:
    found = parse(
        "vmcapture.final=x vmcapture.wait=x vmcapture.level=x vmcapture.typo=x vmcapture.path=/srv elfcorehdr=1M"
    )
    assert found._replace(problems=()) == DEFAULTS._replace(path="/srv")
    assert sorted(problem.split("=")[0] for problem in found.problems) == [
        "vmcapture.final", "vmcapture.level", "vmcapture.typo", "vmcapture.wait",
    ]  # fmt: skip


def test_words_of_others_are_none_of_our_business() -> None:
    assert (
        parse("xvmcapture.final=halt vmcapture=1 vmcapturefinal=halt VMCAPTURE.final=halt noelfcorehdr=1") == DEFAULTS
    )


KEYS = ("target", "path", "final", "failure", "wait", "timeout", "level", "compress", "keep", "free")
VALUES = st.one_of(
    st.text(st.characters(exclude_categories=("Z", "Cc")), max_size=30),
    st.from_regex(r"-?[0-9]{1,40}", fullmatch=True),
    st.from_regex(r"(/|\.\.|[a-z])*", fullmatch=True),
    st.sampled_from(["reboot", "halt", "zstd", "zlib:6", "none", "LABEL=x", "5%", "10G"]),
)
WORDS = st.one_of(
    st.builds(lambda key, value: f"vmcapture.{key}={value}", st.sampled_from(KEYS), VALUES),
    st.builds(lambda key, value: f"vmcapture.{key}{value}", st.sampled_from(KEYS), VALUES),
    st.text(max_size=20),
)


@given(st.lists(WORDS, max_size=8).map(" ".join))
def test_no_command_line_is_too_strange(line: str) -> None:
    found = parse(line)
    actions = ("reboot", "poweroff", "halt", "shell")
    assert found.final in actions
    assert found.failure in actions
    assert 0 <= (found.wait or 0) <= 3600
    assert 0 <= found.timeout <= 3600
    assert found.levels
    assert all(0 <= level <= 31 for level in found.levels)
    assert found.path.startswith("/")
    assert ".." not in found.path.split("/")
    assert found.keep is None or 1 <= found.keep <= 9999
    assert found.free is None or (found.free.size >= 0 and 0 <= found.free.percent < 100)
    codec(found.compression)  # raises where there is no such codec
    assert all(problem.startswith("vmcapture.") for problem in found.problems)


@given(st.text(st.characters(exclude_categories=("Z", "Cc")), min_size=1, max_size=40))
def test_any_target_is_passed_on_untouched(target: str) -> None:
    assert parse(f"vmcapture.target={target}").targets == (target,)
