"""The Debian package says what the sources say: version, licence, dependencies."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from capture import __version__
from tests.unit.initramfs.conftest import program_of

REPOSITORY = Path(__file__).resolve().parents[3]
DEBIAN = REPOSITORY / "debian"
PREFIX = "python3-"


def paragraph(text: str) -> str:
    return " ".join(text.split())


def test_the_version_is_that_of_the_program() -> None:
    (found,) = re.findall(r"^vmcapture \((\S+)\)", (DEBIAN / "changelog").read_text(), re.MULTILINE)[:1]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert found == __version__ == project["version"]


def test_every_python_package_that_is_needed_is_depended_on() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    depends = (DEBIAN / "control").read_text().partition("\nDepends:")[2].partition("\nSuggests:")[0]
    for requirement in project["dependencies"]:
        name, least = re.findall(r"^([a-z]+)>=([\d.]+)", requirement)[0]
        assert re.search(rf" {PREFIX}{name}( \(>= (1:)?{re.escape(least)}\))?,", depends), requirement
    assert f"python3 (>= {project['requires-python'].removeprefix('>=')})," in depends


def test_the_licence_is_that_of_the_sources() -> None:
    licence = (DEBIAN / "copyright").read_text().partition("License: Expat\n\nLicense: Expat\n")[2]
    ours = (REPOSITORY / "LICENSE").read_text().partition("authors\n")[2]
    assert paragraph(licence.replace("\n .\n", "\n\n")) == paragraph(ours)


def test_maintainer_scripts_are_good_shell() -> None:
    for script in (*DEBIAN.glob("vmcapture.p*"), *(REPOSITORY / "packaging/kernel").rglob("post*/*")):
        subprocess.run(["sh", "-n", script], check=True)
        assert script.read_text().startswith("#!/bin/sh\n")


def maintainer_script(folder: Path, name: str, *arguments: str, active: bool = True) -> list[str]:
    """Run a maintainer script of ours on a machine that lies in a folder; what it called."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for program in ("systemctl", "deb-systemd-invoke", "vmcapture"):
        program_of(programs / program, f'echo "{program} $*" >> {folder}/calls; {"true" if active else "false"}')
    text = (DEBIAN / f"vmcapture.{name}").read_text()
    text = re.sub(r"(?<![\w.])/(run|var|sys|etc)/", rf"{folder}/\1/", text)
    (folder / "calls").write_text("")
    done = subprocess.run(
        ["sh", "-s", *arguments], input=text, env={"PATH": f"{programs}:/usr/bin:/bin"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return (folder / "calls").read_text().splitlines()


def test_an_upgrade_stops_nothing_and_has_the_new_image_loaded(tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    asked, reload = "systemctl --quiet is-active vmcapture.service", "deb-systemd-invoke reload vmcapture.service"
    assert maintainer_script(tmp_path, "postinst", "configure", "0.0.9") == [asked, reload]
    assert maintainer_script(tmp_path, "postinst", "configure", "0.0.9", active=False) == [asked]
    assert maintainer_script(tmp_path, "postinst", "configure", "") == []
    (tmp_path / "run/systemd/system").rmdir()
    assert maintainer_script(tmp_path, "postinst", "configure", "0.0.9") == []


@pytest.mark.parametrize("unit", ["vmcapture.service", "vmcapture-report.service", "vmcapture-collect.service"])
def test_debhelper_has_an_upgrade_stop_nothing(unit: str, tmp_path: Path) -> None:
    """What arms would be disarmed until an image is built; the others would be cut off until the next boot."""
    debhelper = shutil.which("dh_installsystemd")
    if debhelper is None:
        pytest.skip("debhelper is not installed: apt-get install debhelper")
    units = tmp_path / "debian/vmcapture/lib/systemd/system"
    units.mkdir(parents=True)
    for name in ("control", "changelog"):
        shutil.copy(DEBIAN / name, tmp_path / "debian")
    shutil.copy(REPOSITORY / "packaging/systemd" / unit, units)
    rules = (DEBIAN / "rules").read_text().replace('"$$unit"', "vmcapture-report.service")
    rules += rules.replace("vmcapture-report.service", "vmcapture-collect.service")
    command = re.findall(rf"(dh_installsystemd [^;)|]*{unit})", rules)[0]
    subprocess.run(command.split(), cwd=tmp_path, check=True)
    made = [path for path in (tmp_path / "debian").rglob("*") if path.name.startswith(("pre", "post", "vmcapture."))]
    actions = {
        (path.name.removeprefix("vmcapture.").partition(".")[0], action)
        for path in made
        for action in re.findall(rf"deb-systemd-invoke (\S+) '{unit}'", path.read_text())
    }
    assert actions == ({("postinst", "start"), ("prerm", "stop")} if unit == "vmcapture.service" else set())
    for path in made:
        if "invoke stop" in path.read_text():
            assert re.search(r'"\$1" = remove \].*\n\s*deb-systemd-invoke stop', path.read_text())


def test_what_is_removed_leaves_nothing_loaded_and_says_nothing_of_the_machine_any_more(tmp_path: Path) -> None:
    loaded, said = tmp_path / "run/vmcapture/loaded.json", tmp_path / "var/lib/prometheus/node-exporter/vmcapture.prom"
    dump, state = tmp_path / "var/crash/x/vmcore", tmp_path / "var/lib/vmcapture/reported.json"
    for file in (loaded, said, dump, state):
        file.parent.mkdir(parents=True)
        file.touch()
    assert maintainer_script(tmp_path, "prerm", "upgrade", "0.2") == []
    assert maintainer_script(tmp_path, "prerm", "remove") == ["vmcapture unload"]
    assert maintainer_script(tmp_path, "prerm", "remove", active=False) == ["vmcapture unload"]
    loaded.unlink()
    assert maintainer_script(tmp_path, "prerm", "remove") == []
    maintainer_script(tmp_path, "postrm", "upgrade", "0.2")
    assert said.exists()
    maintainer_script(tmp_path, "postrm", "remove")
    assert (said.exists(), state.exists()) == (False, True)
    ours = ("initramfs-6.1.img", "initramfs-6.1.img.stamp", "initramfs-6.1.img.loaded", ".initramfs-6.1.img.x8_a",
            "crash-test.json", ".reported.json.abc.new", "report.lock")  # fmt: skip
    for name in ours:
        (state.parent / name).touch()
    here = state.parent / "crash/x/vmcore"  # a target's path may be anything
    here.parent.mkdir(parents=True)
    here.touch()
    maintainer_script(tmp_path, "postrm", "purge")
    assert (dump.exists(), here.exists()) == (True, True)
    assert [path.name for path in state.parent.iterdir()] == ["crash"]
    shutil.rmtree(here.parents[1])
    maintainer_script(tmp_path, "postrm", "purge")
    assert not state.parent.exists()
    maintainer_script(tmp_path, "postrm", "purge")
