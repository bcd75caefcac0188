"""What an input reaches: a count for each branch of ``capture``, put into its code while it is imported.

Quick enough to be on for every input of a run, which no tracer is: each branch begins with one increment. Branches are
the bodies of functions, loops and handlers, both ways of every ``if``, and what the right sides of ``and``, ``or`` and
``... if ... else ...`` evaluate. (The figures that people read are coverage.py's: tests/fuzz/figures.py.)
"""

from __future__ import annotations

import ast
import enum
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_Node = TypeVar("_Node", bound=ast.AST)

_COUNTS = "__branches_taken__"
_TAKE = "__take_branch__"
_CLASSES = np.array([0, *(1 << min(7, count.bit_length() - 1) for count in range(1, 256))], dtype=np.uint8)
"""Counts told apart: 1, 2 and 3, 4 to 7, ...: that a loop was gone through more often is something new as well."""


class Reach:
    """Counts of branches. ``install`` before ``capture`` is imported."""

    def __init__(self) -> None:
        self._counts = array("I")

    def install(self, package: str = "capture") -> None:
        """Count the branches of all modules of a package that are imported from now on."""
        sys.meta_path.insert(0, _Finder(package, self))

    @property
    def branches(self) -> int:
        """How many there are in what was imported so far."""
        return len(self._counts)

    def clear(self) -> None:
        """Forget all counts."""
        np.frombuffer(self._counts, dtype=np.uint32)[:] = 0

    def found(self) -> NDArray[np.uint8]:
        """Return, by branch, the class of its count as one bit; 0 where it was not taken."""
        found: NDArray[np.uint8] = _CLASSES[np.minimum(np.frombuffer(self._counts, dtype=np.uint32), 255)]
        return found

    def instrument(self, source: bytes, path: str) -> CodeType:
        """Return the code of a module, with counters."""
        tree = _Instrument(self._counts).visit(ast.parse(source, path))
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)
        return code

    def prepare(self, module: ModuleType) -> None:
        """Give a module the counters that its code speaks of."""
        counts = self._counts

        def take(number: int) -> None:
            counts[number] += 1

        vars(module)[_COUNTS], vars(module)[_TAKE] = counts, take


class Novelty(enum.IntEnum):
    """What an input reached that none before it did: a branch, or one so often."""

    NOTHING = 0
    COUNT = 1
    BRANCH = 2


class Seen:
    """What the inputs of one target have reached so far."""

    def __init__(self) -> None:
        self._bits = np.zeros(0, dtype=np.uint8)

    def add(self, found: NDArray[np.uint8]) -> Novelty:
        """Add what one input reached; return what of it is new."""
        if len(found) > len(self._bits):  # a module was imported since
            self._bits = np.concatenate([self._bits, np.zeros(len(found) - len(self._bits), dtype=np.uint8)])
        known = self._bits[: len(found)]
        fresh = found & ~known
        if not fresh.any():
            return Novelty.NOTHING
        branch = bool((fresh.astype(np.bool_) & (known == 0)).any())
        known |= found
        return Novelty.BRANCH if branch else Novelty.COUNT

    @property
    def branches(self) -> int:
        """How many branches were taken."""
        return int(np.count_nonzero(self._bits))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, package: str, reach: Reach) -> None:
        self._package = package
        self._reach = reach

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != self._package:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        spec.loader = _Loader(name, spec.origin, self._reach)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, path: str, reach: Reach) -> None:
        super().__init__(name, path)
        self._reach = reach

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002  (compiled anew: the cache on the disk has no counters)
        return self._reach.instrument(Path(self.path).read_bytes(), str(self.path))

    def exec_module(self, module: ModuleType) -> None:
        self._reach.prepare(module)
        super().exec_module(module)


class _Instrument(ast.NodeTransformer):
    def __init__(self, counts: array[int]) -> None:
        self._counts = counts

    def _number(self) -> int:
        self._counts.append(0)
        return len(self._counts) - 1

    def _count(self, before: ast.AST) -> ast.stmt:
        """Return ``counts[number] += 1``, on the line of what it stands before."""
        (statement,) = ast.parse(f"{_COUNTS}[{self._number()}] += 1").body
        return _on_the_line_of(before, statement)

    def _counted(self, body: list[ast.stmt], owner: ast.AST) -> list[ast.stmt]:
        return [self._count(body[0] if body else owner), *body]

    def _evaluated(self, value: ast.expr) -> ast.expr:
        """Return ``take(number) or value``: what it evaluates to, and counted."""
        call = ast.parse(f"{_TAKE}({self._number()})", mode="eval").body
        return _on_the_line_of(value, ast.BoolOp(ast.Or(), [call, value]))

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        self.generic_visit(node)
        first = 1 if ast.get_docstring(node, clean=False) is not None else 0
        node.body[first:] = self._counted(node.body[first:], node.body[0])
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def _two_ways(self, node: ast.If | ast.For | ast.While) -> ast.AST:
        self.generic_visit(node)
        node.body = self._counted(node.body, node)
        node.orelse = self._counted(node.orelse, node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        return self._two_ways(node)

    def visit_For(self, node: ast.For) -> ast.AST:
        return self._two_ways(node)

    def visit_While(self, node: ast.While) -> ast.AST:
        return self._two_ways(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        self.generic_visit(node)
        node.body = self._counted(node.body, node)
        return node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        self.generic_visit(node)
        node.body, node.orelse = self._evaluated(node.body), self._evaluated(node.orelse)
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        self.generic_visit(node)
        node.values[1:] = [self._evaluated(value) for value in node.values[1:]]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node


def _on_the_line_of(place: ast.AST, node: _Node) -> _Node:
    for each in ast.walk(node):
        ast.copy_location(each, place)
    return node
