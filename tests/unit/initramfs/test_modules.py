"""Modules come in the order that the module tree gives, and what a kernel has inside is not looked for."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import zstandard

from initramfs.errors import ImageError, ModuleNotThereError
from initramfs.modules import (
    LoadPlan,
    dependencies,
    firmware,
    host_options,
    modinfo,
    module_name,
    parse_options,
    read_module,
    read_tree,
)

from .conftest import elf_module


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


def test_soft_dependencies_on_several_lines_add_up(module_tree: Path) -> None:
    # As btrfs has them.
    (module_tree / "modules.softdep").write_text(
        "softdep xfs pre: loop\nsoftdep xfs pre: virtio-ring\nsoftdep xfs post: later\nsoftdep\n"
    )

    assert names(read_tree(module_tree).plan(("xfs",))) == ["loop", "virtio_ring", "libcrc32c", "xfs"]


def test_an_alias_line_that_is_cut_short_says_nothing(module_tree: Path) -> None:
    with (module_tree / "modules.alias").open("a") as aliases:
        aliases.write("alias fs-odd\nalias\n")

    tree = read_tree(module_tree)

    assert tree.lookup("fs-odd") == ()
    assert tree.lookup("fs-xfs") == ("xfs",)


def test_all_modules_that_answer_to_an_alias_are_taken_as_modprobe_does(module_tree: Path) -> None:
    """The first may be for another CPU (crc32c_intel). A built-in one is enough, one that is gone is no answer."""
    for name in ("crc32c_intel", "sha256_ssse3"):
        (module_tree / f"kernel/crypto/{name}.ko").write_bytes(elf_module())
    with (module_tree / "modules.dep").open("a") as dep:
        dep.write("kernel/crypto/crc32c_intel.ko:\nkernel/crypto/sha256_ssse3.ko:\n")
    (module_tree / "modules.alias").write_text(
        "alias crc32c crc32c_gone\nalias crc32c crc32c_intel\nalias crc32c crc32c_generic\nalias sha256 sha256_ssse3\n"
    )
    with (module_tree / "modules.builtin").open("a") as built_in:
        built_in.write("kernel/crypto/sha256_generic.ko\n")
    with (module_tree / "modules.builtin.modinfo").open("ab") as modinfo:
        modinfo.write(b"sha256_generic.alias=sha256\0")

    tree = read_tree(module_tree)

    assert names(tree.plan(("xfs",))) == ["crc32c_intel", "crc32c_generic", "libcrc32c", "xfs"]
    assert names(tree.plan(("sha256",))) == []


def test_a_wanted_module_that_is_not_there_is_an_error(module_tree: Path) -> None:
    with pytest.raises(ModuleNotThereError, match="no module floppy, and it is not built in"):
        read_tree(module_tree).plan(("floppy",))


def test_an_optional_module_that_is_not_there_is_reported(module_tree: Path) -> None:
    plan = read_tree(module_tree).plan(("loop",), optional=("floppy", "ext4", "virtio"))

    assert names(plan) == ["loop", "virtio_ring", "virtio"]
    assert plan.missing == ("floppy",)


def test_a_welcome_module_comes_last_and_is_not_missed(module_tree: Path) -> None:
    plan = read_tree(module_tree).plan(("loop",), optional=("virtio",), welcome=("floppy", "virtio_pci", "ext4"))

    assert names(plan) == ["loop", "virtio_ring", "virtio", "virtio_pci"]
    assert plan.missing == ()


def test_a_watchdogs_driver_comes_first_with_what_it_needs(module_tree: Path) -> None:
    plan = read_tree(module_tree).plan(("loop",), first=("virtio_blk", "iTCO_wdt", "ext4"))

    assert names(plan) == ["virtio_ring", "virtio", "virtio_blk", "loop"]
    assert plan.missing == ("iTCO_wdt",)


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


def depending(depends: str, *more: str) -> bytes:
    return elf_module("license=GPL", f"depends={depends}", *more)


def test_without_modules_dep_the_modules_themselves_are_asked(tmp_path: Path) -> None:
    (tmp_path / "virtio_blk.ko.xz").write_bytes(lzma.compress(depending("virtio,virtio-ring")))
    (tmp_path / "virtio.ko.gz").write_bytes(
        gzip.compress(depending("virtio_ring", "softdep=pre: helper also post: later"))
    )
    (tmp_path / "virtio_ring.ko.zst").write_bytes(zstandard.compress(depending("")))
    (tmp_path / "helper.ko").write_bytes(depending(""))

    plan = read_tree(tmp_path).plan(("virtio_blk",))

    assert names(plan) == ["helper", "virtio_ring", "virtio", "virtio_blk"]
    assert plan.missing == ("also",)


def test_modinfo_gives_every_pair(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(depending("b,c", "softdep=pre: d"))

    pairs = modinfo(tmp_path / "a.ko")

    assert pairs == (("license", "GPL"), ("depends", "b,c"), ("softdep", "pre: d"))
    assert dependencies(pairs) == (("b", "c"), ("d",))


def test_firmware_is_every_file_that_the_module_names(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(elf_module("firmware=vendor/one.bin", "license=GPL", "firmware=two.fw"))

    assert firmware(modinfo(tmp_path / "a.ko")) == ("vendor/one.bin", "two.fw")


def test_options_are_those_of_each_line_in_their_order() -> None:
    configuration = (
        "blacklist pcspkr\n"
        "options virtio-blk queue_depth=64\n"
        'options dyn dyndbg="file a.c +p"  other=1\n'
        "alias options xfs\n"
        "options virtio_blk num_request_queues=1\n"
        "options empty\n"
    )

    assert parse_options(configuration) == (
        ("virtio_blk", "queue_depth=64"),
        ("dyn", 'dyndbg="file a.c +p"  other=1'),
        ("virtio_blk", "num_request_queues=1"),
    )


@pytest.fixture
def modprobe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("initramfs.tools.SYSTEM_DIRECTORIES", "")
    return tmp_path / "modprobe"


def test_modprobe_tells_the_options_of_this_machine(modprobe: Path) -> None:
    modprobe.write_text('#!/bin/sh\n[ "$*" = -c ] && echo "options loop max_loop=8"\n')
    modprobe.chmod(0o755)

    assert host_options() == (("loop", "max_loop=8"),)


def test_without_a_modprobe_that_tells_there_are_no_options(modprobe: Path) -> None:
    assert host_options() == ()
    modprobe.write_text("#!/bin/sh\nexit 1\n")
    modprobe.chmod(0o755)
    assert host_options() == ()


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


def test_a_module_file_that_is_damaged_inside_is_one_clear_line(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"module" * 1000))
    packed[12] ^= 0xFF  # behind the header: zlib sees it
    (tmp_path / "x.ko.gz").write_bytes(packed)

    with pytest.raises(ImageError, match=r"x\.ko\.gz: cannot read this kernel module"):
        read_module(tmp_path / "x.ko.gz")


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (("kernel/fs/nls/nls_cp437.ko", "nls-cp437.ko.xz", "a/b/nls_cp437.ko.zst"), "nls_cp437"),
        (("x/dm-mod.ko",), "dm_mod"),
    ],
)
def test_the_name_comes_from_the_file(paths: Sequence[str], name: str) -> None:
    assert {module_name(path) for path in paths} == {name}
