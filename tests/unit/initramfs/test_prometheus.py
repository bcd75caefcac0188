"""The file for node_exporter is what Prometheus's own parser reads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from initramfs import crashes, prometheus
from initramfs.places import Place
from initramfs.predict import Prediction
from initramfs.reach import Target
from initramfs.status import BAD, DOUBT, GOOD, Check, Status
from tests.saved import FIRST, save_crash

CHECKS = (Check("target", GOOD, "a"), Check("target", BAD, "b"), Check("image", DOUBT, "c"), Check("room", GOOD, "d"))
FOUND = Status(
    armed=True,
    reservation=256 << 20,
    loaded=None,
    checks=CHECKS,
    needed=97 << 20,
    targets=(
        Target("UUID=1", True, "", free=5, total=9),
        Target('/dev/"\\\n', False, ""),
        Target("virtiofs:x", None, ""),
    ),
    predicted=Prediction(31, 1 << 30),
    image_built=1700000000.25,
    encrypted=False,
)


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_everything_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "crash").mkdir()
    for when in (FIRST, FIRST + 60):
        directory = save_crash(tmp_path / "crash", when)
    (directory / "manifest.json").unlink()
    values = parsed(prometheus.metrics(FOUND, crashes.find([Place(tmp_path / "crash", "/var/crash")])))
    assert values["vmcapture_survives", ()] == 0
    assert values["vmcapture_armed", ()] == 1
    assert values["vmcapture_check", (("check", "target"),)] == 0, "the worse of two"
    assert values["vmcapture_check", (("check", "image"),)] == 1
    assert values["vmcapture_check", (("check", "room"),)] == 2
    assert values["vmcapture_reservation_bytes", ()] == 256 << 20
    assert values["vmcapture_image_built_timestamp_seconds", ()] == 1700000000.25
    assert values["vmcapture_target_reached", (("target", "UUID=1"),)] == 1
    assert values["vmcapture_target_reached", (("target", '/dev/"\\\n'),)] == 0
    assert ("vmcapture_target_reached", (("target", "virtiofs:x"),)) not in values
    assert values["vmcapture_target_free_bytes", (("target", "UUID=1"),)] == 5
    assert values["vmcapture_predicted_dump_bytes", ()] == 1 << 30
    assert values["vmcapture_encrypted", ()] == 0
    assert values["vmcapture_crashes", (("encrypted", "false"), ("state", "whole"))] == 1
    assert values["vmcapture_crashes", (("encrypted", "false"), ("state", "incomplete"))] == 1
    assert values["vmcapture_last_crash_timestamp_seconds", ()] == FIRST + 60


def test_without_a_crash_there_are_none() -> None:
    values = parsed(prometheus.metrics(FOUND, []))
    assert values["vmcapture_crashes", (("encrypted", "false"), ("state", "whole"))] == 0
    assert ("vmcapture_last_crash_timestamp_seconds", ()) not in values


def test_the_exporter_may_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "collector/vmcapture.prom"
    prometheus.write(file, "x 1\n")
    assert file.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in file.parent.iterdir()] == ["vmcapture.prom"]
    prometheus.write(Path("-"), "x 1\n")
    assert capsys.readouterr().out == "x 1\n"


def test_a_link_that_the_exporters_user_has_laid_leads_nowhere(tmp_path: Path) -> None:
    file, precious = tmp_path / "vmcapture.prom", tmp_path / "shadow"
    precious.write_text("root:x\n")
    for link in (file, tmp_path / f".vmcapture.prom.{os.getpid()}.new"):
        link.symlink_to(precious)
    prometheus.write(file, "vmcapture_armed 1\n")
    assert precious.read_text() == "root:x\n"
    assert (file.read_text(), file.is_symlink(), file.stat().st_mode & 0o777) == ("vmcapture_armed 1\n", False, 0o644)
