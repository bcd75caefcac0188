"""Kernel modules for the image: what has to be loaded, in the order that the module tree itself gives.

``modules.dep``, ``modules.softdep`` and ``modules.alias`` are what depmod wrote. A tree that was unpacked and never
installed has none of them: then each module's own ``.modinfo`` section is asked, which is what depmod would have read.
"""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from initramfs import tools
from initramfs.errors import ImageError, ModuleNotThereError, ToolError

SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")


@dataclass(frozen=True, slots=True)
class KernelModule:
    """One module: its name as the kernel spells it, its file, and the names that must be loaded before."""

    name: str
    path: Path
    depends: tuple[str, ...]
    softdeps: tuple[str, ...]  # wanted before it, but it loads without them


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What to load, first to last, and which of the optional names no module of the tree answers to."""

    modules: tuple[KernelModule, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModuleTree:
    """The module directory of one kernel."""

    directory: Path
    files: dict[str, Path]
    built_in: frozenset[str]
    depends: dict[str, tuple[str, ...]] | None  # None: depmod has not seen this tree
    softdeps: dict[str, tuple[str, ...]]
    aliases: dict[str, tuple[str, ...]]
    _read: dict[str, KernelModule] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Tell whether the kernel can do this at all: as a module or built in."""
        return normal(name) in self.files or normal(name) in self.built_in

    def module(self, name: str) -> KernelModule:
        """Return the module with its dependencies."""
        if name not in self._read:
            path = self.files[name]
            if self.depends is not None:
                depends, softdeps = self.depends.get(name, ()), self.softdeps.get(name, ())
            else:
                depends, softdeps = dependencies(modinfo(path))
            self._read[name] = KernelModule(name, path, depends, softdeps)
        return self._read[name]

    def lookup(self, name: str) -> tuple[str, ...]:
        """Return the modules that a name means, through an alias if need be; nothing when there are none.

        Where several answer to an alias, modprobe loads all of them, and so do we: which of them works, the CPU says
        when they are loaded (of crc32c, Debian 12 has one for SSE 4.2 and one for all others, both as modules).
        """
        wanted = normal(name)
        if wanted in self.files or wanted in self.built_in:
            return (wanted,)
        found = self.aliases.get(wanted, ())
        inside = tuple(name for name in found if name in self.built_in)
        return inside[:1] or tuple(name for name in found if name in self.files)

    def plan(
        self,
        wanted: Sequence[str],
        optional: Sequence[str] = (),
        welcome: Sequence[str] = (),
        first: Sequence[str] = (),
    ) -> LoadPlan:
        """Return everything that the names need, each module after what it depends on; built-in ones are left out.

        ``first`` ones come before all others, then those that are wanted. ``first`` and optional names are reported
        when they are missing, welcome ones are not.
        """
        order: dict[str, KernelModule] = {}
        missing: list[str] = []
        self._add(first, order, missing)
        for name in wanted:
            found = self.lookup(name)
            if not found:
                raise ModuleNotThereError(
                    f"{self.directory}: no module {name}, and it is not built in; is this the right kernel release?"
                )
            self._visit_all(found, order, missing, ())
        self._add(optional, order, missing)
        self._add(welcome, order, [])
        return LoadPlan(tuple(order.values()), tuple(dict.fromkeys(missing)))

    def _add(self, names: Sequence[str], order: dict[str, KernelModule], missing: list[str]) -> None:
        """Add what there is of the names."""
        for name in names:
            found = self.lookup(name)
            if not found:
                missing.append(normal(name))
            self._visit_all(found, order, missing, ())

    def _visit_all(
        self, names: Sequence[str], order: dict[str, KernelModule], missing: list[str], above: tuple[str, ...]
    ) -> None:
        for name in names:
            self._visit(name, order, missing, above)

    def _visit(self, name: str, order: dict[str, KernelModule], missing: list[str], above: tuple[str, ...]) -> None:
        if name in order or name in above or name in self.built_in:
            return
        module = self.module(name)
        for softdep in module.softdeps:
            found = self.lookup(softdep)
            if not found:
                missing.append(softdep)
            self._visit_all(found, order, missing, (*above, name))
        for dependency in module.depends:
            if dependency not in self.files and dependency not in self.built_in:
                raise ModuleNotThereError(f"{module.path} needs {dependency}, which is not in {self.directory}")
            self._visit(dependency, order, missing, (*above, name))
        order[name] = module


def read_tree(directory: Path) -> ModuleTree:
    """Read the indexes of a module directory (``…/lib/modules/RELEASE``)."""
    if not directory.is_dir():
        raise ImageError(f"{directory}: no such module directory; install that kernel, or name it with --modules-dir")
    indexed = directory / "modules.dep"
    built_in = frozenset(module_name(line) for line in _lines(directory / "modules.builtin"))
    aliases = _built_in_aliases(directory / "modules.builtin.modinfo")
    for words in _rows(directory / "modules.alias"):
        match words:
            case ["alias", alias, name, *_] if not set("*?[") & set(alias):
                _add_alias(aliases, alias, name)
    if indexed.is_file():
        files: dict[str, Path] = {}
        depends: dict[str, tuple[str, ...]] = {}
        for line in _lines(indexed):
            path, _, needs = line.partition(":")
            files[module_name(path)] = directory / path
            # The line lists the whole closure, the one to load first at its end.
            depends[module_name(path)] = tuple(module_name(need) for need in reversed(needs.split()))
        softdeps: dict[str, tuple[str, ...]] = {}
        for words in _rows(directory / "modules.softdep"):
            match words:
                case ["softdep", name, *rest]:  # a module may have several such lines
                    softdeps[normal(name)] = (*softdeps.get(normal(name), ()), *_before(rest))
        return ModuleTree(directory, files, built_in, depends, softdeps, aliases)
    files = {module_name(str(path)): path for path in sorted(directory.rglob("*.ko*")) if path.name.endswith(SUFFIXES)}
    if not files and not built_in:
        raise ImageError(f"{directory}: neither modules.dep nor any module in it")
    return ModuleTree(directory, files, built_in, None, {}, aliases)


def normal(name: str) -> str:
    """Spell a module's name as the kernel does: dashes and underscores are the same thing."""
    return name.replace("-", "_")


def module_name(path: str) -> str:
    """Return the module's name from the name of its file."""
    return normal(path.strip().rpartition("/")[2].partition(".ko")[0])


def read_module(path: Path) -> bytes:
    """Return the module as the kernel loads it, decompressed."""
    try:
        packed = path.read_bytes()
        match path.suffix:
            case ".xz":
                return lzma.decompress(packed)
            case ".gz":
                return gzip.decompress(packed)
            case ".zst":
                return zstandard.ZstdDecompressor().decompressobj().decompress(packed)
            case _:
                return packed
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise ImageError(f"{path}: cannot read this kernel module: {error}") from error


def modinfo(path: Path) -> tuple[tuple[str, str], ...]:
    """Return the (key, value) pairs of the module's ``.modinfo`` section."""
    section = _section(path, ".modinfo")
    content = section.data() if section is not None else b""
    pairs = (entry.decode(errors="replace").partition("=") for entry in content.split(b"\0") if entry)
    return tuple((key, value) for key, _, value in pairs)


def uses(path: Path) -> tuple[str, ...]:
    """Return the symbols that a module takes from the kernel and from others; nothing where it has no symbol table."""
    table = _section(path, ".symtab")
    symbols = table.iter_symbols() if table is not None else ()
    return tuple(symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name)


def _section(path: Path, name: str) -> Any:  # noqa: ANN401
    from elftools.common.exceptions import ELFError  # takes time to import: for those who build an image
    from elftools.elf.elffile import ELFFile

    try:
        return ELFFile(io.BytesIO(read_module(path))).get_section_by_name(name)
    except ELFError as error:
        raise ImageError(f"{path}: not a kernel module: {error}") from error


def dependencies(pairs: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what a module depends on and what it wants loaded before, from its own information."""
    depends = [normal(name) for key, value in pairs if key == "depends" for name in value.split(",") if name]
    softdeps = [name for key, value in pairs if key == "softdep" for name in _before(value.split())]
    return tuple(depends), tuple(softdeps)


def firmware(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Return the firmware files that a module may ask for, from its own information."""
    return tuple(value for key, value in pairs if key == "firmware")


def host_options() -> tuple[tuple[str, str], ...]:
    """Return the options that modprobe gives to modules on this machine, as ``parse_options`` does.

    They are those of modprobe.d(5), then those of the running kernel's command line.
    """
    modprobe = tools.find("modprobe")
    if modprobe is None:
        return ()
    try:
        return parse_options(tools.run([modprobe, "-c"]))
    except ToolError:  # busybox's has no -c
        return ()


def parse_options(text: str) -> tuple[tuple[str, str], ...]:
    """Return (module, ``key=value …``) for each ``options`` line; a module may have several."""
    rows = (line.split(maxsplit=2) for line in text.splitlines())
    return tuple((normal(row[1]), row[2].rstrip()) for row in rows if row[:1] == ["options"] and len(row) == 3)


def _before(words: Sequence[str]) -> tuple[str, ...]:
    """Return the names behind ``pre:`` of a soft dependency: ``pre: a b post: c``."""
    names, section = [], ""
    for word in words:
        if word.endswith(":"):
            section = word
        elif section == "pre:":
            names.append(normal(word))
    return tuple(names)


def _lines(path: Path) -> Iterator[str]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip()


def _rows(path: Path) -> Iterator[list[str]]:
    return (line.split() for line in _lines(path))


def _built_in_aliases(path: Path) -> dict[str, tuple[str, ...]]:
    """Return alias → built-in modules from ``name.alias=value`` records."""
    aliases: dict[str, tuple[str, ...]] = {}
    content = path.read_bytes() if path.is_file() else b""
    for record in content.split(b"\0"):
        key, _, value = record.decode(errors="replace").partition("=")
        name, _, what = key.partition(".")
        if what == "alias":
            _add_alias(aliases, value, name)
    return aliases


def _add_alias(aliases: dict[str, tuple[str, ...]], alias: str, name: str) -> None:
    there = aliases.get(normal(alias), ())
    if normal(name) not in there:
        aliases[normal(alias)] = (*there, normal(name))
