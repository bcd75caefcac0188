"""The running interpreter's runtime, found by asking the interpreter and laid out so that it starts in the image.

The interpreter, its loader, its standard library and the system's shared objects keep their own paths; third-party
packages and ours go below one directory with their places relative to each other kept (``$ORIGIN`` run paths of wheels
point from one to the next). Modules are shipped as ``.pyc`` files without sources.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from initramfs import bytecode, tools
from initramfs.bytecode import Compilation
from initramfs.errors import ImageError, ToolError
from initramfs.imports import named_imports
from initramfs.tree import Directory, File, Tree, host_program

LIBRARY = "/usr/lib/vmcapture"
LAUNCHER = "/usr/bin/vmcapture"
BOOT_LAUNCHER = f"{LIBRARY}/boot"
BOOT_MODULE = "capture.boot"
INTERPRETER_OPTIONS = ("-OO", "-s", "-S", "-P")
"""In the image, and when what it needs is tried: no site, no path of ours. The image has no docstrings, which NumPy
1.24 takes for an error where the interpreter was not told so."""
PLACES_FOR_CODE = ("/var/tmp", "/run", "/var/lib", "/root")
"""Where else what has to be loaded once may lie for a moment: a hardened machine has /tmp mounted noexec."""
SEARCH_PATH = "/usr/bin:/usr/sbin:/bin:/sbin"

CODE_SUFFIXES = (".py", ".pyc", ".so")
# Where glibc's loader looks without being told (ld.so(8)), and Debian's multiarch directory.
LOADER_DIRECTORIES = frozenset(
    f"{base}/{name}" for base in ("", "/usr") for name in ("lib", "lib64", f"lib/{os.uname().machine}-linux-gnu")
)

Report = dict[str, Any]
"""What ``probe.py`` prints."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """What one run of the interpreter with our packages loaded."""

    executable: Path
    prefix: Path
    exec_prefix: Path
    stdlib: Path
    search_path: tuple[Path, ...]  # where third-party packages and ours were found
    modules: tuple[Path, ...]  # sources, extensions, .pyc files without source
    objects: tuple[Path, ...]  # shared objects, where the loader found them
    data: tuple[Path, ...]  # other files that packages opened
    hollow: Mapping[Path, bytes] = field(default_factory=dict)  # what stands for shared objects that nobody calls

    def in_image(self, path: Path) -> str | None:
        """Return the path in the image of something that belongs to Python; None for what is the system's."""
        packages = {"site-packages", "dist-packages"}
        if path.is_relative_to(self.stdlib) and packages.isdisjoint(path.relative_to(self.stdlib).parts):
            return str(path)
        bases = [base for base in self.search_path if path.is_relative_to(base)]
        if not bases:
            return None
        return f"{LIBRARY}/{path.relative_to(max(bases, key=lambda base: len(base.parts)))}"


def trace(roots: Sequence[str]) -> Runtime:
    """Run the interpreter once with everything of the root packages imported and note what it took."""
    locations: list[Path] = []
    for root in roots:
        spec = importlib.util.find_spec(root)
        if spec is None or not spec.submodule_search_locations:
            raise ImageError(f"{root}: no such Python package; install it for {sys.executable}")
        locations.extend(Path(location).resolve() for location in spec.submodule_search_locations)
    path = [
        entry
        for entry in dict.fromkeys((*sys.path, *(str(location.parent) for location in locations)))
        if entry and Path(entry).exists()
    ]
    request = {
        "roots": list(roots),
        "named": sorted({name for root in roots for name in named_imports(root)}),
        "path": path,
    }
    report = _probe(request)
    report, hollowed = _without_blas(request, report)
    modules = {Path(module["file"]) for module in report["modules"]}
    modules.update(main for location in locations for main in location.rglob("__main__.py"))
    # Only directories that something was found in: a mere entry of sys.path may be as wide as "/".
    found_in = {_base(module["name"], Path(module["file"])) for module in report["modules"]}
    return Runtime(
        executable=Path(report["executable"]),
        prefix=Path(report["prefix"]),
        exec_prefix=Path(report["exec_prefix"]),
        stdlib=Path(report["stdlib"]),
        search_path=tuple(Path(entry) for entry in path if Path(entry) in found_in),
        modules=tuple(sorted(modules)),
        objects=tuple(Path(name) for name in report["objects"] if Path(name) not in modules),
        data=tuple(Path(name) for name in report["opened"] if not name.endswith(CODE_SUFFIXES)),
        hollow=hollowed,
    )


def _probe(request: Mapping[str, Any], preload: Sequence[Path] = ()) -> Report:
    """Return what ``probe.py`` reports, with shared objects ``preload`` in the place of those of the same name."""
    # Started as in the capture kernel: no site, no locale, none of our environment.
    environment = {"PATH": os.environ.get("PATH", SEARCH_PATH), "OPENBLAS_NUM_THREADS": "1"}
    for name in ("LD_LIBRARY_PATH", "TMPDIR"):
        if name in os.environ:
            environment[name] = os.environ[name]
    if preload:
        environment["LD_PRELOAD"] = ":".join(map(str, preload))
    try:
        answer = tools.run(
            [sys.executable, *INTERPRETER_OPTIONS, "-B", Path(__file__).with_name("probe.py")],
            stdin=json.dumps(request),
            environment=environment,
        )
    except ToolError as error:
        raise ImageError(f"the packages {', '.join(request['roots'])} do not run on their own: {error}") from error
    report: Report = json.loads(answer)
    return report


def _without_blas(request: Mapping[str, Any], report: Report) -> tuple[Report, dict[Path, bytes]]:
    """Try the run without the body of NumPy's BLAS: the report of that run, and what stood for it.

    Where it does not work, the first report and nothing: the image is larger then, and no worse.
    """
    from initramfs import hollow  # with pyelftools

    objects = [Path(name) for name in report["objects"]]
    extensions = [Path(module["file"]) for module in report["modules"] if module["file"].endswith(".so")]
    users = [*extensions, *(path for path in objects if not hollow.is_blas(path))]
    with tempfile.TemporaryDirectory(prefix="vmcapture-", dir=_place_for_code()) as scratch:
        stands: dict[Path, bytes] = {}
        for path in filter(hollow.is_blas, objects):
            body = hollow.hollow(path, users)
            if body is not None:
                stands[path] = body
                (Path(scratch) / path.name).write_bytes(body)
        if not stands:
            return report, {}
        try:
            thin = _probe(request, [Path(scratch) / path.name for path in stands])
        except ImageError:
            return report, {}
        left = [name for name in thin["objects"] if not name.startswith(f"{scratch}/")]
        if any(hollow.is_blas(Path(name)) for name in left):
            return report, {}
        return {**thin, "objects": left}, stands


def _place_for_code() -> str:
    """Return the directory for temporary files, or another one where code from there may not be run (noexec)."""
    usual = tempfile.gettempdir()
    for place in (usual, *PLACES_FOR_CODE):
        if os.access(place, os.W_OK) and not os.statvfs(place).f_flag & os.ST_NOEXEC:
            return place
    return usual


def _base(name: str, file: Path) -> Path:
    """Return the directory of the search path that the module was found in."""
    return file.parents[name.count(".") + (file.stem == "__init__")]


def lay_out(runtime: Runtime, tree: Tree, launcher_module: str, scratch: Path) -> None:
    """Put the runtime and its two launchers into the tree; compiled modules wait in the scratch directory."""
    add_executable(tree, runtime.executable)
    tree.add(str(runtime.exec_prefix / sys.platlibdir / runtime.stdlib.name / "lib-dynload"), Directory())
    _add_modules(runtime, tree, scratch)
    system_objects = []
    for path in (*runtime.objects, *runtime.data):
        place = runtime.in_image(path)
        if place is not None:
            tree.add(place, host_program(path))
        elif path in runtime.objects:
            system_objects.append(path)
            tree.add_host(path)
    for path, body in runtime.hollow.items():
        place = runtime.in_image(path)
        if place is None:
            system_objects.append(path)
        tree.add(place or str(path), File(body))
    tree.add(LAUNCHER, File(_launcher(runtime, launcher_module, system_objects).encode(), 0o755))
    tree.add(BOOT_LAUNCHER, File(_launcher(runtime, BOOT_MODULE, system_objects).encode(), 0o755))


def _add_modules(runtime: Runtime, tree: Tree, scratch: Path) -> None:
    compilations = []
    for number, path in enumerate(runtime.modules):
        place = runtime.in_image(path)
        if place is None:
            raise ImageError(f"{path}: a Python module outside of the module search path")
        if path.suffix != ".py":
            tree.add(place, host_program(path))
            continue
        compiled = scratch / f"{number}.pyc"
        compilations.append(Compilation(str(path), place, str(compiled)))
        tree.add(f"{place}c", File(compiled))
    bytecode.compile_all(compilations)


def add_executable(tree: Tree, path: Path) -> None:
    """Put a program of the host at its own path, with its loader and the shared objects that it is linked to."""
    tree.add_host(path)
    loader = program_loader(path)
    if loader is None:
        return
    tree.add_host(Path(loader))
    for line in tools.run([loader, "--list", path]).splitlines():
        # "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x…)"; the loader and the vDSO have no arrow.
        name, arrow, found = line.strip().partition(" => ")
        if not arrow:
            continue
        if found.startswith("not found"):
            raise ImageError(f"{path}: its shared object {name} was not found")
        tree.add_host(Path(found.rsplit(" (", 1)[0]))


def program_loader(path: Path) -> str | None:
    """Return the loader that the program asks for (PT_INTERP); None for a static one or a script."""
    from elftools.common.exceptions import ELFError  # takes time to import: for those who build an image
    from elftools.elf.elffile import ELFFile
    from elftools.elf.segments import InterpSegment

    try:
        with path.open("rb") as file:
            for segment in ELFFile(file).iter_segments():
                if isinstance(segment, InterpSegment):
                    return str(segment.get_interp_name())
    except ELFError:
        return None
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from error
    return None


def _launcher(runtime: Runtime, module: str, system_objects: Sequence[Path]) -> str:
    home = str(runtime.prefix)
    if runtime.exec_prefix != runtime.prefix:
        home += f":{runtime.exec_prefix}"
    variables = {
        "PATH": SEARCH_PATH,
        "PYTHONHOME": home,
        "PYTHONPATH": LIBRARY,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "OPENBLAS_NUM_THREADS": "1",  # each of its threads would cost memory, and nothing of ours calls it
        "MALLOC_ARENA_MAX": "1",  # glibc: a heap for each thread is more memory that nobody else gets (mallopt(3))
    }
    elsewhere = sorted({str(path.parent) for path in system_objects} - LOADER_DIRECTORIES)
    if elsewhere:
        variables["LD_LIBRARY_PATH"] = ":".join(elsewhere)
    exports = "".join(f"export {name}='{value}'\n" for name, value in variables.items())
    return f"#!/bin/sh\n{exports}exec '{runtime.executable}' {' '.join(INTERPRETER_OPTIONS)} -m {module} \"$@\"\n"
