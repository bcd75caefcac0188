"""The archive is what cpio readers and the kernel understand, and the same tree gives the same bytes."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest

from initramfs import cpio, tools
from initramfs.errors import ImageError
from initramfs.tree import Device, Directory, File, Symlink, Tree


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    host = tmp_path / "host"
    host.write_bytes(b"from the host\n")
    tree = Tree()
    tree.add("/etc/odd", File(b"12345"))
    tree.add("/etc/empty", File(b""))
    tree.add("/bin/tool", File(host, 0o755))
    tree.add("/link", Symlink("bin/tool"))
    tree.add("/empty", Directory())
    tree.add("/dev/console", Device(5, 1))
    return tree


def packed(tree: Tree) -> bytes:
    output = io.BytesIO()
    assert cpio.write(tree, output) == len(output.getvalue())
    return output.getvalue()


def test_busybox_lists_every_entry_a_directory_before_its_content(tree: Tree) -> None:
    busybox = tools.find("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")

    listed = subprocess.run([busybox, "cpio", "-t"], input=packed(tree), capture_output=True, check=True).stdout

    assert listed.decode().split() == [
        "bin",
        "bin/tool",
        "dev",
        "dev/console",
        "empty",
        "etc",
        "etc/empty",
        "etc/odd",
        "link",
    ]


def test_busybox_unpacks_content_modes_and_links(tree: Tree, tmp_path: Path) -> None:
    busybox = tools.find("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed")
    out = tmp_path / "out"
    out.mkdir()
    # Device nodes need root; everything else must unpack for everyone.
    command: list[str | Path] = [busybox, "cpio", "-i", "bin*", "link", "etc*", "empty"]

    subprocess.run(command, input=packed(tree), cwd=out, capture_output=True, check=True)

    assert (out / "bin/tool").read_bytes() == b"from the host\n"
    assert (out / "bin/tool").stat().st_mode & 0o777 == 0o755
    assert (out / "etc/odd").read_bytes() == b"12345"
    assert (out / "etc/odd").stat().st_mode & 0o777 == 0o644
    assert (out / "link").readlink() == Path("bin/tool")
    assert list((out / "empty").iterdir()) == []


def test_the_order_in_which_a_tree_was_filled_does_not_show() -> None:
    one, other = Tree(), Tree()
    for path in ("/a", "/b/c", "/b.d"):
        one.add(path, File(path.encode()))
    for path in ("/b.d", "/b/c", "/a"):
        other.add(path, File(path.encode()))

    assert packed(one) == packed(other)


def test_the_archive_fills_whole_blocks(tree: Tree) -> None:
    assert len(packed(tree)) % cpio.BLOCK == 0


def test_a_file_is_read_out_of_an_archive(tree: Tree) -> None:
    archive = packed(tree) + b"what comes behind it"

    found = {path: cpio.content(io.BytesIO(archive), path) for path in ("/etc/odd", "/etc/empty", "/bin/tool")}

    assert found == {"/etc/odd": b"12345", "/etc/empty": b"", "/bin/tool": b"from the host\n"}


@pytest.mark.parametrize("path", ["/etc", "/link", "/dev/console", "/nowhere", "/TRAILER!!!"])
def test_what_is_no_regular_file_of_an_archive_has_no_content(path: str, tree: Tree) -> None:
    assert cpio.content(io.BytesIO(packed(tree)), path) is None


@pytest.mark.parametrize("size", [*range(0, 600, 7), -520])
def test_an_archive_that_is_cut_short_is_said_to_be(size: int, tree: Tree) -> None:
    with pytest.raises(ImageError):
        cpio.content(io.BytesIO(packed(tree)[:size]), "/zzz")


@pytest.mark.parametrize("wrong", [b"070707", b"\x1f\x8b", bytes(110), b"070701" + b"x" * 200, b"070701" + b"f" * 104])
def test_what_is_no_archive_is_said_to_be_none(wrong: bytes) -> None:
    with pytest.raises(ImageError, match="no cpio archive"):
        cpio.content(io.BytesIO(wrong), "/etc/odd")
