"""What systemd says: asked of a program that answers as systemctl does."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs import services, tools

from .conftest import program_of

SYSTEMCTL = """\
for unit; do :; done
case "$*" in
*is-enabled*) [ "$unit" != "$DISABLED" ] ;;
*is-active*) false ;;
show*) echo "FragmentPath=$FRAGMENT" ;;
*) exit 9 ;;
esac"""


@pytest.fixture(autouse=True)
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program_of(tmp_path / "systemctl", SYSTEMCTL)
    monkeypatch.setattr(tools, "SYSTEM_DIRECTORIES", "")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(services, "SYSTEMD", tmp_path)


def test_who_loads_a_capture_kernel_too_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLED", "kdump.service")
    monkeypatch.setenv("FRAGMENT", "/lib/systemd/system/kdump-tools.service")
    assert services.competitors() == ["kdump-tools.service"]


@pytest.mark.parametrize("fragment", ["", "/run/systemd/generator.late/kdump-tools.service"])
def test_what_a_removed_package_left_in_init_d_loads_nothing(fragment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAGMENT", fragment)
    assert services.competitors() == []


def test_without_systemd_there_is_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(services, "SYSTEMD", tmp_path / "none")
    assert services.competitors() == []
    assert not services.enabled("kdump.service")
