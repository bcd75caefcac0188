"""Imports inside functions are found by reading the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs.imports import named_imports


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "sample_of_lazy_imports"
    (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / name / "__init__.py").write_text("")
    (tmp_path / name / "inner/__init__.py").write_text("from . import sibling\nfrom .. import top\n")
    (tmp_path / name / "inner/lazy.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import never_at_run_time\n"
        "def f():\n    import bz2\n    from email.mime import text\n    from ..inner.sibling import x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_function_bodies_count_and_relative_names_are_resolved(package: str) -> None:
    names = named_imports(package)

    assert {"bz2", "email.mime", "email.mime.text"} <= set(names)
    assert {f"{package}.inner.sibling", f"{package}.top", f"{package}.inner.sibling.x"} <= set(names)


def test_what_only_type_checkers_read_does_not_count(package: str) -> None:
    assert "never_at_run_time" not in named_imports(package)
