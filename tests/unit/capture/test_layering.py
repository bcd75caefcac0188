"""One way through: what a module may import, read from the sources and asked of the interpreter.

Nothing reaches back: memory → notes → kernel → dumpfile → vmcore → pagefilter, copier → dump, report, verify → boot →
cli.
"""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

LAYERS = (
    ("capture", "errors", "console", "pulse", "interruption"),
    ("progress", "levels", "footprint"),
    ("memory",),
    ("notes",),
    ("kernel",),
    ("dumpfile",),
    ("vmcore",),
    ("pagefilter", "elfdump"),
    ("copier", "options"),
    ("survey", "vmemmap"),
    ("dump", "report", "verify"),
    ("boot",),
    ("cli", "selftest"),
    ("__main__",),
)
"""From the bottom up; a module may use its own layer's package and every layer below."""

LIBRARIES = {"numpy", "zstandard", "tqdm"}
"""What the capture image carries besides the standard library."""


@cache
def modules() -> dict[str, Path]:
    """Every module of ``capture``: dotted name → file."""
    found = {}
    for path in sorted((REPOSITORY / "capture").rglob("*.py")):
        parts = path.relative_to(REPOSITORY).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, package: str, *, lazy: bool = True) -> Iterator[str]:
    """Yield what ``tree`` imports, as absolute dotted names; with ``lazy``, what functions import as well."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports(node, package, lazy=lazy)


def imports_of(name: str, *, lazy: bool = True) -> set[str]:
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imports(ast.parse(path.read_text()), package, lazy=lazy))


def part(name: str) -> str:
    """``capture.memory.image`` → ``memory``."""
    return [*name.split("."), ""][1] or name


def layer(name: str) -> int:
    (found,) = (number for number, parts in enumerate(LAYERS) if part(name) in parts)
    return found


MODULES = sorted(modules())


def test_every_module_has_its_place() -> None:
    known = [name for parts in LAYERS for name in parts]
    assert sorted({part(name) for name in MODULES}) == sorted(known)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_uses_only_what_stands_below_it(name: str) -> None:
    for used in imports_of(name):
        if used.split(".")[0] == "capture":
            assert layer(used) < layer(name) or part(used) == part(name), f"{name} reaches back to {used}"


@pytest.mark.parametrize("name", MODULES)
def test_the_capture_side_never_imports_the_set_up_side_or_its_tests(name: str) -> None:
    assert not {used.split(".")[0] for used in imports_of(name)} & {"initramfs", "tests"}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_the_standard_library_and_four_more_at_most(name: str) -> None:
    allowed = set(sys.stdlib_module_names) | LIBRARIES | {"capture"}
    assert {used.split(".")[0] for used in imports_of(name)} <= allowed


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {name: imports_of(name, lazy=False) & set(modules()) - {name} for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules outside the standard library that ``statement`` loads in a new interpreter."""
    program = (
        "import sys, json; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    return set(json.loads(answer)) - set(sys.stdlib_module_names)


def test_importing_all_of_it_loads_nothing_else() -> None:
    names = [name for name in MODULES if not name.endswith("__main__")]
    loaded = loaded_by("import " + ", ".join(names))
    # zstandard and its back end, numpy's own random and linear algebra are extension modules of these packages.
    assert {name.lstrip("_") for name in loaded} <= LIBRARIES | {"capture"} | {"cffi_backend", "cython_3", "cyutility"}


def test_the_command_line_starts_without_numpy() -> None:
    """``vmcapture status`` and ``--help`` should not wait for it."""
    assert loaded_by("import capture.cli") == {"capture"}


def test_the_job_loads_no_module_that_importing_it_has_not_loaded(corpus_file: Callable[[str], Path]) -> None:
    """The capture image has what was loaded when it was built: NumPy loads some of its modules when they are needed."""
    vmcore = corpus_file("linux-6.12")
    names = [name for name in MODULES if not name.endswith("__main__")]
    program = (
        f"import {', '.join(names)}\n"
        "import os, sys, tempfile, capture.selftest, capture.cli\n"
        "capture.selftest.run()\n"
        "before = set(sys.modules)\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        f"    status = capture.cli.main(['save', '-q', '--source', {str(vmcore)!r}, '-d', '1,31', folder])\n"
        "    from tests.kernels import busy_kernel\n"
        "    from tests.structpages import ERAS\n"
        "    before |= {name for name in sys.modules if name.startswith(('tests', 'dataclasses'))}\n"
        "    for era in ERAS:\n"
        "        kernel = busy_kernel(era)\n"
        "        kernel.array.hugetlb(0x800, 9)\n"
        "        kernel.array.poison(0x800)\n"
        "        open(folder + '/core', 'wb').write(kernel.core(free={}))\n"
        "        words = 'dump -q --force -d 31 --exclude-vmemmap'.split()\n"
        "        status |= capture.cli.main([*words, folder + '/core', folder + '/dump'])\n"
        "        status |= capture.cli.main(['verify', '-q', folder + '/dump', '--against', folder + '/core'])\n"
        "    os.truncate(folder + '/dump', os.path.getsize(folder + '/dump') // 2)\n"
        "    os.rename(folder + '/dump', folder + '/dump.incomplete')\n"
        "    status |= capture.cli.main(['dump', '-q', '--resume', folder + '/core', folder + '/dump'])\n"
        "print(status, sorted(set(sys.modules) - before))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert answer == "0 []\n"
