"""Compiling gives the same bytes each time, whatever the builder's interpreter did before."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs.bytecode import Compilation, compile_all
from initramfs.errors import ImageError

SOURCE = "NAMES = {'a', 'b', 'c'}\ndef f(x):\n    return x in {'one', 'two', 'three'} or x in NAMES\n"


def test_two_compilations_are_the_same_and_unchecked(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(SOURCE)
    outputs = [tmp_path / "1.pyc", tmp_path / "2.pyc"]

    for output in outputs:
        compile_all([Compilation(str(source), "/usr/lib/vmcapture/module.py", str(output))])

    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    # PEP 552: flags 1 is a hash-based file that is not checked against a source.
    assert int.from_bytes(outputs[0].read_bytes()[4:8], "little") == 1
    assert b"/usr/lib/vmcapture/module.py" in outputs[0].read_bytes()


def test_a_module_in_the_current_directory_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("open('was-run', 'w')\nfrom missing import anything\n")
    (tmp_path / "module.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)

    compile_all([Compilation("module.py", "/module.py", "module.pyc")])

    assert (tmp_path / "module.pyc").exists()
    assert not (tmp_path / "was-run").exists()


def test_a_source_that_does_not_compile_is_one_clear_line(tmp_path: Path) -> None:
    source = tmp_path / "broken.py"
    source.write_text("def f(:\n")

    with pytest.raises(ImageError, match="compiling the Python modules failed"):
        compile_all([Compilation(str(source), "/broken.py", str(tmp_path / "broken.pyc"))])
