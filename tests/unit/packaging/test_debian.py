"""The Debian package says what the sources say: version, licence, dependencies."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from capture import __version__

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
    for script in (*DEBIAN.glob("vmcapture.post*"), *(REPOSITORY / "packaging/kernel").rglob("post*/*")):
        subprocess.run(["sh", "-n", script], check=True)
        assert script.read_text().startswith("#!/bin/sh\n")
