"""Runs inside the interpreter that will be packed and reports what a run really needs: modules, objects, data files.

A script of its own (``python -S probe.py``; request on stdin, report on stdout, both JSON). Whatever it imports lands
in the image, so until the snapshot is taken it imports only what ``python -m`` and the job import anyway.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pkgutil
import runpy  # the launcher starts our package with -m
import sys
from pathlib import Path
from types import ModuleType


def main() -> None:
    """Do what the request says and report."""
    request = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the rehearsal prints is no part of the report
    opened: set[str] = set()

    def note_open(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith("/"):
            opened.add(os.path.normpath(arguments[0]))

    sys.path[:] = request["path"]
    sys.addaudithook(note_open)
    for root in request["roots"]:
        import_all(root)
    for name in request["named"]:
        import_if_there(name)
    for root in request["roots"]:
        rehearse(root)
    modules = [
        describe(name, module)
        for name, module in sorted(sys.modules.items())
        if name != "__main__" and isinstance(module, ModuleType)
    ]  # not everything in there is one: typing.io
    data = sorted(path for path in opened.copy() if Path(path).is_file())
    json.dump(
        {
            "executable": os.path.realpath("/proc/self/exe"),
            "prefix": sys.base_prefix,
            "exec_prefix": sys.base_exec_prefix,
            "stdlib": str(Path(runpy.__file__).parent),
            "modules": [module for module in modules if module["file"]],
            "objects": loaded_objects(mapped_files()),
            "opened": data,
        },
        answer,
    )
    answer.close()


def import_all(name: str) -> None:
    """Import a package and everything in it; ``__main__`` is left to the launcher."""
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
        if module.name != "__main__":
            import_all(f"{name}.{module.name}")


def import_if_there(name: str) -> None:
    """Import what a function body names: not everything that stands behind ``import`` is a module, or installed."""
    try:
        importlib.import_module(name)
    except (ImportError, ValueError):
        return


def rehearse(root: str) -> None:
    """Run the package's self-test and its ``--help``: the standard library imports much only while it works."""
    if importlib.util.find_spec(f"{root}.selftest"):
        importlib.import_module(f"{root}.selftest").run()
    if importlib.util.find_spec(f"{root}.cli"):
        try:
            importlib.import_module(f"{root}.cli").main(["--help"])
        except SystemExit:
            return


def describe(name: str, module: ModuleType) -> dict[str, str]:
    """Return a module's name and file; the file is empty for what the interpreter has inside."""
    spec = getattr(module, "__spec__", None)
    file = getattr(module, "__file__", None) or ""
    if spec is not None and spec.origin == "frozen":
        file = getattr(spec.loader_state, "filename", None) or file
    return {"name": spec.name if spec is not None else name, "file": str(Path(file).absolute()) if file else ""}


def mapped_files() -> set[str]:
    """Return the real path of every file that is mapped now."""
    columns = 6  # /proc/PID/maps: the path is the last one, and may hold spaces
    with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123
        rows = [line.rstrip("\n").split(None, columns - 1) for line in maps]
    return {row[-1] for row in rows if len(row) == columns}


def loaded_objects(mapped: set[str]) -> list[str]:
    """Return the shared objects among the mapped files, each under the path where the loader found it."""
    import ctypes

    class Info(ctypes.Structure):  # the first members of struct dl_phdr_info (glibc, link.h)
        _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))

    names: list[str] = []

    def visit(info: ctypes._Pointer[Info], _size: int, _data: int | None) -> int:
        names.append(os.fsdecode(info.contents.name or b""))
        return 0

    # glibc opens this one by name when a thread ends (pthread_exit), long after the imports.
    thread_end = "libgcc_s.so.1"
    try:
        ctypes.CDLL(thread_end)
    except OSError:
        thread_end = ""
    visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(visitor(visit), None)
    return sorted(
        {
            os.path.normpath(name)
            for name in names
            if name.startswith("/") and (os.path.realpath(name) in mapped or Path(name).name == thread_end)
        }
    )


if __name__ == "__main__":
    main()
