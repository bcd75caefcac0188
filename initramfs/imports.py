"""Which modules a package imports inside its functions: the ones that merely importing the package does not show."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path


def named_imports(root: str) -> tuple[str, ...]:
    """Return every module name behind ``import`` and ``from`` in the package's sources, type-checking blocks left out.

    ``from a import b`` gives ``a`` and ``a.b``: only an import can tell whether ``b`` is a module.
    """
    names: set[str] = set()
    for module, source in _sources(root):
        package = module if source.name == "__init__.py" else module.rpartition(".")[0]
        for node in _walk(ast.parse(source.read_bytes(), filename=str(source))):
            match node:
                case ast.Import():
                    names.update(alias.name for alias in node.names)
                case ast.ImportFrom():
                    base = _absolute(node, package)
                    names.add(base)
                    names.update(f"{base}.{alias.name}" for alias in node.names)
    return tuple(sorted(names))


def _sources(root: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(root)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        base = Path(location)
        for source in sorted(base.rglob("*.py")):
            parts = source.relative_to(base).with_suffix("").parts
            yield ".".join((root, *(part for part in parts if part != "__init__"))), source


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _walk(child)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    above = parts[: len(parts) - (node.level - 1)]
    return ".".join((*above, node.module) if node.module else above)
