"""Which tests may run beside each other: pytest-xdist gives all of a group to one process."""

from __future__ import annotations

import pytest

from tests.guest.cases import Case


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file is a group, so that its fixtures are made once; of machines that crash, every case is one."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        cases = [value for value in callspec.params.values() if isinstance(value, Case)] if callspec else []
        group = str(cases[0]) if cases else item.path.relative_to(item.config.rootpath).as_posix()
        item.add_marker(pytest.mark.xdist_group(group))
