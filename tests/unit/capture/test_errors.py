"""Failures and the exit status that each one ends with."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import capture
from capture import cli
from capture.dumpfile.output import TargetFullError
from capture.errors import CaptureError, IncompleteError, SourceError, TargetError, UsageError
from capture.kernel.printk import LogUnavailable

REPOSITORY = Path(__file__).resolve().parents[3]

STATUS = {CaptureError: 1, UsageError: 2, IncompleteError: 3, SourceError: 4, TargetError: 5}
"""Scripts and stage one rely on these numbers: README, "Exit status"."""


@pytest.mark.parametrize(("kind", "status"), STATUS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_each_kind_of_failure_has_its_status(kind: type[CaptureError], status: int) -> None:
    assert kind.exit_status == status
    assert kind("why").exit_status == status


def test_a_full_disk_is_a_failure_of_the_target_and_a_missing_log_one_of_the_source() -> None:
    assert TargetFullError("x").exit_status == 5
    assert LogUnavailable("x").exit_status == 4


def test_no_failure_ends_with_success_or_with_a_status_that_is_not_documented() -> None:
    for module in pkgutil.walk_packages(capture.__path__, "capture."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

    def family(kind: type[CaptureError]) -> Iterator[type[CaptureError]]:
        yield kind
        for child in kind.__subclasses__():
            yield from family(child)

    for kind in family(CaptureError):
        assert kind.exit_status in STATUS.values(), kind


def test_the_message_is_what_was_said() -> None:
    assert str(TargetError("/mnt: no room left")) == "/mnt: no room left"


def test_help_and_readme_name_the_same_statuses() -> None:
    (line,) = re.findall(r"^Exit status: .*\n.*", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    for text in (line, cli.EPILOG):
        assert [int(number) for number in re.findall(r"\b([0-9]) [a-z]", text)] == [0, 1, 2, 3, 4, 5]
