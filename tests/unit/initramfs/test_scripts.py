"""What a script needs to be started in the capture kernel."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from initramfs import scripts
from initramfs.errors import ImageError
from initramfs.scripts import interpreters, refusal

HIDDEN = scripts.HIDDEN


def script(place: Path, first_line: str, mode: int = 0o755) -> Path:
    place.write_text(f"{first_line}\nexit 0\n")
    place.chmod(mode)
    return place


@pytest.mark.parametrize("first_line", ["#!/bin/sh", "#! /bin/sh -e", "#!/usr/bin/env sh", "#!/bin/busybox sh", "true"])
def test_busybox_is_there_anyway(first_line: str, tmp_path: Path) -> None:
    assert interpreters(script(tmp_path / "x", first_line)) == ()


def test_another_interpreter_comes_along(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    assert interpreters(script(tmp_path / "x", f"#!{bash} -e")) == (Path(bash),)
    (found,) = interpreters(script(tmp_path / "x", "#!/usr/bin/env bash"))
    assert found.name == "bash"


def test_a_program_needs_none() -> None:
    program = shutil.which("ls")
    assert program is not None
    assert interpreters(Path(program)) == ()


@pytest.mark.parametrize(
    ("first_line", "mode", "what"),
    [
        ("#!/no/such/thing -x", 0o755, "its interpreter /no/such/thing was not found"),
        ("#!/usr/bin/env no-such-thing", 0o755, "its interpreter no-such-thing was not found"),
        ("#!", 0o755, "its first line names no interpreter: #!/bin/sh"),
        ("#!/bin/sh", 0o644, "it may not be executed: chmod +x "),
    ],
)
def test_what_could_not_run_is_refused(first_line: str, mode: int, what: str, tmp_path: Path) -> None:
    said = refusal(script(tmp_path / "x", first_line, mode))
    assert said is not None
    assert said.startswith(what)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == "no such file"
    assert refusal(tmp_path) == "no file"
    assert refusal(script(tmp_path / "good", "#!/bin/sh")) is None
    with pytest.raises(ImageError, match="No such file"):
        interpreters(tmp_path / "none")


def test_what_the_capture_kernel_mounts_over_hides_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage one says what that is."""
    functions = Path(scripts.__file__).with_name("functions").read_text()
    mounted = {f"/{name}" for names in re.findall(r"^    for name in (.*); do \$busybox mount", functions, re.MULTILINE)
               for name in names.split()}  # fmt: skip
    assert set(HIDDEN) == mounted
    monkeypatch.setattr(scripts, "HIDDEN", (str(tmp_path / "run"),))
    (tmp_path / "run").mkdir()
    hidden = script(tmp_path / "run/x", "#!/bin/sh")
    link = tmp_path / "link"
    link.symlink_to(hidden)
    for program in (hidden, link):
        assert refusal(program) == (
            f"{tmp_path}/run is another one in the capture kernel; put it elsewhere, into /usr/local/sbin"
        )
    assert refusal(script(tmp_path / "good", "#!/bin/sh")) is None


def test_what_nobody_may_read_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    assert refusal(script(tmp_path / "x", "#!/bin/sh", 0o111)) == "Permission denied"
