"""Which tests may run beside each other: pytest-xdist gives all of a group to one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.guest import cases

_CASES = sorted(
    (
        str(case)
        for value in vars(cases).values()
        for case in (value if isinstance(value, tuple) else (value,))
        if isinstance(case, cases.Case)
    ),
    key=len,
    reverse=True,
)


def group(nodeid: str) -> str:
    """Return the group of a test: its file, so that fixtures are made once; of machines that crash, the case."""
    path, _, name = nodeid.partition("::")
    parameters = name.partition("[")[2]
    return next((case for case in _CASES if path.startswith("tests/guest/") and case in parameters), path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """(Its own groups are marks, which it writes into the names of tests: pytest 9.2 lets nobody do so.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return Groups(config, log) if config.getvalue("dist") == "loadscope" else None
