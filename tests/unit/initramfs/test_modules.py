"""Modules come in the order that the module tree gives, and what a kernel has inside is not looked for."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import zstandard

from initramfs.errors import ImageError, ModuleNotThereError
from initramfs.modules import LoadPlan, dependencies, modinfo, module_name, read_module, read_tree


def names(plan: LoadPlan) -> list[str]:
    return [module.name for module in plan.modules]


def test_a_module_comes_after_everything_it_depends_on(module_tree: Path) -> None:
    assert names(read_tree(module_tree).plan(("virtio_blk",))) == ["virtio_ring", "virtio", "virtio_blk"]


def test_what_two_modules_share_is_loaded_once(module_tree: Path) -> None:
    plan = read_tree(module_tree).plan(("virtio_blk", "virtio_pci", "virtio_blk"))

    assert names(plan) == ["virtio_ring", "virtio", "virtio_blk", "virtio_pci"]


def test_dashes_and_underscores_are_the_same(module_tree: Path) -> None:
    assert names(read_tree(module_tree).plan(("virtio-blk",)))[-1] == "virtio_blk"


def test_built_in_modules_are_left_out(module_tree: Path) -> None:
    assert names(read_tree(module_tree).plan(("ext4", "nvme_core", "loop"))) == ["loop"]


def test_a_soft_dependency_comes_first_and_may_be_an_alias(module_tree: Path) -> None:
    assert names(read_tree(module_tree).plan(("xfs",))) == ["crc32c_generic", "libcrc32c", "xfs"]


def test_a_soft_dependency_that_is_not_there_is_reported_only(module_tree: Path) -> None:
    (module_tree / "modules.alias").unlink()

    plan = read_tree(module_tree).plan(("xfs",))

    assert names(plan) == ["libcrc32c", "xfs"]
    assert plan.missing == ("crc32c",)


def test_a_wanted_module_that_is_not_there_is_an_error(module_tree: Path) -> None:
    with pytest.raises(ModuleNotThereError, match="no module floppy, and it is not built in"):
        read_tree(module_tree).plan(("floppy",))


def test_an_optional_module_that_is_not_there_is_reported(module_tree: Path) -> None:
    plan = read_tree(module_tree).plan(("loop",), optional=("floppy", "ext4", "virtio"))

    assert names(plan) == ["loop", "virtio_ring", "virtio"]
    assert plan.missing == ("floppy",)


def test_a_dependency_without_a_file_is_an_error(module_tree: Path) -> None:
    with (module_tree / "modules.dep").open("a") as dep:
        dep.write("kernel/fs/odd.ko: kernel/fs/gone.ko\n")

    with pytest.raises(ModuleNotThereError, match="needs gone"):
        read_tree(module_tree).plan(("odd",))


def test_modules_that_depend_on_each_other_do_not_hang(module_tree: Path) -> None:
    with (module_tree / "modules.dep").open("a") as dep:
        dep.write("kernel/a.ko: kernel/b.ko\nkernel/b.ko: kernel/a.ko\n")

    assert sorted(names(read_tree(module_tree).plan(("a",)))) == ["a", "b"]


def test_a_directory_that_is_no_module_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such module directory"):
        read_tree(tmp_path / "missing")
    with pytest.raises(ImageError, match=r"neither modules\.dep nor any module"):
        read_tree(tmp_path)


def elf_module(depends: str, softdep: str = "") -> bytes:
    """Return a relocatable ELF file with a ``.modinfo`` section, written by hand from the ELF specification."""
    content = b"license=GPL\0depends=" + depends.encode() + b"\0"
    content += b"softdep=" + softdep.encode() + b"\0" if softdep else b""
    strings = b"\0.modinfo\0.shstrtab\0"
    header_size, section_size = 64, 64
    table = header_size + len(content) + len(strings)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, table, 0, header_size, 0, 0, section_size, 3, 2
    )

    def section(name: int, kind: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, 0, 0, 1, 0)

    sections = (
        section(0, 0, 0, 0)
        + section(1, 1, header_size, len(content))
        + section(10, 3, header_size + len(content), len(strings))
    )
    return header + content + strings + sections


def test_without_modules_dep_the_modules_themselves_are_asked(tmp_path: Path) -> None:
    (tmp_path / "virtio_blk.ko.xz").write_bytes(lzma.compress(elf_module("virtio,virtio-ring")))
    (tmp_path / "virtio.ko.gz").write_bytes(gzip.compress(elf_module("virtio_ring", "pre: helper also post: later")))
    (tmp_path / "virtio_ring.ko.zst").write_bytes(zstandard.compress(elf_module("")))
    (tmp_path / "helper.ko").write_bytes(elf_module(""))

    plan = read_tree(tmp_path).plan(("virtio_blk",))

    assert names(plan) == ["helper", "virtio_ring", "virtio", "virtio_blk"]
    assert plan.missing == ("also",)


def test_modinfo_gives_every_pair(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(elf_module("b,c", "pre: d"))

    pairs = modinfo(tmp_path / "a.ko")

    assert pairs == (("license", "GPL"), ("depends", "b,c"), ("softdep", "pre: d"))
    assert dependencies(pairs) == (("b", "c"), ("d",))


def plain(data: bytes) -> bytes:
    return data


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [
        ("", plain),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.compress),
        (".zst", lambda data: zstandard.ZstdCompressor(write_content_size=False).compress(data)),
    ],
)
def test_every_compression_of_modules_is_undone(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"x.ko{suffix}"
    path.write_bytes(pack(b"module" * 1000))

    assert read_module(path) == b"module" * 1000


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_broken_module_file_is_one_clear_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.ko{suffix}"
    path.write_bytes(b"this was never compressed")

    with pytest.raises(ImageError, match=r"x\.ko.*cannot read this kernel module"):
        read_module(path)


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (("kernel/fs/nls/nls_cp437.ko", "nls-cp437.ko.xz", "a/b/nls_cp437.ko.zst"), "nls_cp437"),
        (("x/dm-mod.ko",), "dm_mod"),
    ],
)
def test_the_name_comes_from_the_file(paths: Sequence[str], name: str) -> None:
    assert {module_name(path) for path in paths} == {name}
