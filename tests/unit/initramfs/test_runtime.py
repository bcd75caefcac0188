"""The traced runtime is complete: laid out in an empty directory and entered with chroot, it runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from capture.selftest import elf_core
from initramfs import runtime, tools
from initramfs.errors import ImageError
from initramfs.runtime import Runtime
from initramfs.tree import Directory, File, Symlink, Tree
from tests.faults import tmpfs


@pytest.fixture(scope="module")
def traced() -> Runtime:
    return runtime.trace(("capture", "initramfs"))


@pytest.fixture(scope="module")
def laid_out(traced: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime as a directory, with busybox as its shell."""
    busybox = tools.find("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed: apt-get install busybox-static")
    scratch, root = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("root")
    tree = Tree()
    for name in ("bin", "sbin", "lib", "lib64"):
        tree.add(f"/usr/{name}", Directory())
        tree.add(f"/{name}", Symlink(f"usr/{name}"))
    tree.add("/tmp", Directory())
    runtime.lay_out(traced, tree, "initramfs", scratch)
    tree.add("/bin/sh", File(busybox, 0o755))
    tree.write(root)
    return root


def in_chroot(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    chroot = tools.require("chroot", "coreutils")
    return subprocess.run([chroot, root, *command], env={}, capture_output=True, text=True, check=False)


def test_the_command_runs_from_the_laid_out_tree(laid_out: Path) -> None:
    done = in_chroot(laid_out, "/usr/bin/vmcapture", "--help")

    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: vmcapture" in done.stdout
    assert "initramfs" in done.stdout


LAY_OUT = """
import sys
from pathlib import Path
from initramfs import runtime, tools
from initramfs.tree import Directory, File, Symlink, Tree
scratch, root = map(Path, sys.argv[1:])
tree = Tree()
for name in ("bin", "sbin", "lib", "lib64"):
    tree.add(f"/usr/{name}", Directory())
    tree.add(f"/{name}", Symlink(f"usr/{name}"))
tree.add("/tmp", Directory())
runtime.lay_out(runtime.trace(("capture",)), tree, "capture", scratch)
tree.add("/bin/sh", File(tools.find("busybox"), 0o755))
tree.write(root)
"""


def test_debians_own_python_and_libraries_dump_from_the_laid_out_tree(tmp_path: Path) -> None:
    """Its NumPy takes a docstring that the image lacks for an error, unless the interpreter was told so."""
    python = "/usr/bin/python3"
    needed = "import elftools, numpy, tqdm, zstandard"
    if not Path(python).exists() or subprocess.run([python, "-c", needed], capture_output=True, check=False).returncode:
        pytest.skip("needs python3-numpy, python3-pyelftools, python3-tqdm, python3-zstandard (make deb installs them)")
    scratch, root = tmp_path / "scratch", tmp_path / "root"
    scratch.mkdir()
    root.mkdir()
    subprocess.run([python, "-B", "-c", LAY_OUT, scratch, root], check=True)
    (root / "tmp/core").write_bytes(elf_core([], [(0, 0x1000, b"x" * 8192)]))

    done = in_chroot(root, "/usr/bin/vmcapture", "dump", "--threads", "1", "/tmp/core", "/tmp/dump")

    assert done.returncode == 0, done.stderr
    assert "2 of 2 pages" in done.stderr


def test_every_package_imports_without_its_sources(laid_out: Path, traced: Runtime) -> None:
    program = (
        "import sys, numpy, zstandard, tqdm, elftools.elf.elffile, capture.boot, initramfs.image\n"
        "assert numpy.arange(10).dot(numpy.arange(10)) == 285\n"
        "assert zstandard.decompress(zstandard.compress(b'x' * 4096)) == b'x' * 4096\n"
        "print(numpy.__file__, capture.__file__)"
    )

    done = in_chroot(
        laid_out, str(traced.executable), "-c", f"import sys; sys.path.append('{runtime.LIBRARY}')\n{program}"
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [f"{runtime.LIBRARY}/numpy/__init__.pyc", f"{runtime.LIBRARY}/capture/__init__.pyc"]


def test_a_whole_save_runs_in_the_laid_out_tree(laid_out: Path, traced: Runtime) -> None:
    program = f"import sys; sys.path.append('{runtime.LIBRARY}')\nimport capture.selftest; capture.selftest.run()"

    done = in_chroot(laid_out, str(traced.executable), "-S", "-c", program)

    assert done.returncode == 0, done.stderr


def test_no_source_is_shipped_and_nothing_of_the_test_tools(laid_out: Path) -> None:
    shipped = {path.name for path in laid_out.rglob("*")}

    assert not [name for name in shipped if name.endswith(".py")]
    assert shipped.isdisjoint({"pytest", "_pytest", "hypothesis", "mypy", "pip"})


def test_the_interpreter_is_the_real_one_and_not_the_link_of_a_virtual_environment(traced: Runtime) -> None:
    assert not traced.executable.is_symlink()
    assert traced.executable == Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def test_modules_imported_inside_functions_are_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sample_of_tracing"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("raise SystemExit('never imported by the trace')\n")
    (package / "lazy.py").write_text("def f():\n    import colorsys\n")
    (package / "table.txt").write_text("data")
    (package / "reader.py").write_text(
        "from pathlib import Path\nTABLE = Path(__file__).with_name('table.txt').read_text()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    traced = runtime.trace((package.name,))

    names = {path.name for path in traced.modules}
    assert {"lazy.py", "reader.py", "__main__.py", "colorsys.py"} <= names
    assert package / "table.txt" in traced.data
    assert traced.in_image(package / "table.txt") == f"{runtime.LIBRARY}/{package.name}/table.txt"


def test_a_package_that_does_not_import_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sample_of_breakage"
    package.mkdir()
    (package / "__init__.py").write_text("import does_not_exist_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ImageError, match=r"sample_of_breakage do not run on their own.*does_not_exist_anywhere"):
        runtime.trace((package.name,))


def test_a_package_that_is_not_installed_is_one_clear_line() -> None:
    with pytest.raises(ImageError, match="no such Python package"):
        runtime.trace(("not_installed_at_all",))


def test_a_program_comes_with_its_loader_and_objects(tmp_path: Path) -> None:
    tree = Tree()
    runtime.add_executable(tree, Path("/bin/ls").resolve())

    paths = {path for path, _ in tree}
    assert any(Path(path).name.startswith("libc.so") for path in paths)
    assert any(Path(path).name.startswith("ld-") for path in paths)
    out = tmp_path / "out"
    out.mkdir()
    tree.write(out)
    assert in_chroot(out, str(Path("/bin/ls").resolve()), "/").returncode == 0


def test_where_temporary_files_may_not_be_run_the_runtime_is_no_larger(
    traced: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in for BLAS is loaded once to be tried: not from a directory that is mounted noexec."""
    if not traced.hollow:
        pytest.skip("this NumPy has no BLAS that could be left out")
    with tmpfs(tmp_path / "hard", "noexec,size=64m") as hard:
        monkeypatch.setenv("TMPDIR", str(hard))
        monkeypatch.setattr(tempfile, "tempdir", None)
        assert runtime.trace(("capture",)).hollow.keys() == traced.hollow.keys()
