"""A tree on paper behaves as the file system will."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs.errors import ImageError
from initramfs.tree import Directory, File, Symlink, Tree


def test_a_path_below_a_link_lands_where_the_link_points() -> None:
    tree = Tree()
    tree.add("/usr/lib", Directory())
    tree.add("/lib", Symlink("usr/lib"))

    tree.add("/lib/libc.so.6", File(b"libc"))

    assert dict(tree)["/usr/lib/libc.so.6"] == File(b"libc")


def test_the_first_entry_of_a_path_stays() -> None:
    tree = Tree()
    tree.add("/bin/mount", File(b"real"))
    tree.add("/bin/mount", Symlink("busybox"))

    assert dict(tree)["/bin/mount"] == File(b"real")


def test_nothing_can_be_put_below_a_file() -> None:
    tree = Tree()
    tree.add("/a", File(b""))

    with pytest.raises(ImageError, match="/a is no directory"):
        tree.add("/a/b", File(b""))


def test_links_that_go_round_in_circles_are_refused() -> None:
    tree = Tree()
    tree.add("/a", Symlink("b"))
    tree.add("/b", Symlink("a"))

    with pytest.raises(ImageError, match="too many symbolic links"):
        tree.add("/a/x", File(b""))


def test_a_host_file_comes_with_every_link_that_leads_to_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/lib.so.1.2").write_bytes(b"object")
    (tmp_path / "real/lib.so.1").symlink_to("lib.so.1.2")
    (tmp_path / "alias").symlink_to("real")
    (tmp_path / "elsewhere").symlink_to("../" + tmp_path.name + "/alias/lib.so.1")
    tree = Tree()

    tree.add_host(tmp_path / "elsewhere")

    out = tmp_path / "out"
    out.mkdir()
    tree.write(out)
    copied = out / str(tmp_path)[1:]
    assert (copied / "real/lib.so.1.2").read_bytes() == b"object"
    assert (copied / "real/lib.so.1").readlink() == Path("lib.so.1.2")
    assert (copied / "alias").is_symlink()
    assert (copied / "elsewhere").readlink() == tmp_path / "alias/lib.so.1"


def test_a_missing_host_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        Tree().add_host(tmp_path / "missing")
