"""Whether an image is still what would be built now, told without building it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from capture.options import RECIPIENTS
from initramfs import stamp
from initramfs.image import ImageReport, ImageRequest, build_image

from .conftest import RELEASE, need_image_tools


@pytest.fixture
def made(tmp_path: Path) -> tuple[ImageRequest, ImageReport]:
    """What an image was asked for and came to; it was made from three files."""
    for name in ("image", "module.ko", "libc.so", "key"):
        (tmp_path / name).write_text(name)
    request = ImageRequest(
        output=tmp_path / "image",
        kernel_release=RELEASE,
        modules_dir=tmp_path,
        modules=("virtio_blk",),
        files=(("/etc/key", tmp_path / "key"), ("/etc/hosts", b"127.0.0.1")),
    )
    sources = tuple(tmp_path / name for name in ("module.ko", "libc.so", "key"))
    return request, ImageReport(request.output, 5, True, RELEASE, (), (), 1, sources)


def test_what_was_just_built_is_current(made: tuple[ImageRequest, ImageReport]) -> None:
    request, report = made
    assert stamp.stale(request) == "nobody knows what it was made from"
    stamp.write(request, report)
    assert stamp.stale(request) is None
    found = stamp.read(request.output)
    assert found is not None
    assert (found.release, found.encrypted) == (RELEASE, False)
    assert [path.name for path in request.output.parent.glob("*.stamp*")] == ["image.stamp"]


def test_a_file_that_changed_or_went_away_makes_it_stale(made: tuple[ImageRequest, ImageReport]) -> None:
    request, report = made
    stamp.write(request, report)
    library = report.sources[1]
    os.utime(library, ns=(1, 1))
    assert stamp.stale(request) == f"{library} changed since it was built"
    library.unlink()
    report.sources[0].write_text("rebuilt by dkms")
    assert stamp.stale(request) == f"{report.sources[0]} and 1 more changed since it was built"


def test_another_request_makes_it_stale(made: tuple[ImageRequest, ImageReport], tmp_path: Path) -> None:
    request, report = made
    stamp.write(request, report)
    others = (
        replace(request, modules=("virtio_blk", "nvme")),
        replace(request, files=(("/etc/key", tmp_path / "libc.so"), *request.files[1:])),
        replace(request, files=(*request.files[:1], ("/etc/hosts", b"10.0.0.1"))),
        replace(request, module_options=(("virtio_blk", "queue_depth=1"),)),
    )
    for other in others:
        assert stamp.stale(other) == "configuration, target or devices have changed"


def test_a_file_of_the_same_content_elsewhere_is_the_same(
    made: tuple[ImageRequest, ImageReport], tmp_path: Path
) -> None:
    """What is made for each build lies in a new place each time."""
    request, report = made
    stamp.write(request, report)
    (tmp_path / "copy").write_text("key")
    assert stamp.stale(replace(request, files=(("/etc/key", tmp_path / "copy"), *request.files[1:]))) is None


def test_a_stamp_is_of_one_image(made: tuple[ImageRequest, ImageReport]) -> None:
    request, report = made
    stamp.write(request, report)
    request.output.write_text("put there by somebody")
    assert stamp.read(request.output) is None
    assert stamp.stale(request) == "nobody knows what it was made from"
    request.output.unlink()
    assert stamp.stale(request) == "there is none yet"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "odd": 2}'])
def test_a_damaged_stamp_is_none(text: str, made: tuple[ImageRequest, ImageReport]) -> None:
    stamp.path_of(made[0].output).write_text(text)
    assert stamp.read(made[0].output) is None


def test_it_says_whether_saves_are_encrypted(made: tuple[ImageRequest, ImageReport], tmp_path: Path) -> None:
    request, report = made
    stamp.write(replace(request, files=((str(RECIPIENTS), tmp_path / "key"),)), report)
    found = stamp.read(request.output)
    assert found is not None
    assert found.encrypted


def test_a_real_image_knows_all_that_it_was_made_from(tmp_path: Path, module_tree: Path) -> None:
    need_image_tools()
    extra = tmp_path / "extra.txt"
    extra.write_text("extra")
    request = ImageRequest(
        output=tmp_path / "x.img", kernel_release=RELEASE, modules_dir=module_tree, modules=("virtio_blk",),
        files=(("/etc/extra", extra),),
    )  # fmt: skip
    report = build_image(request)
    stamp.write(request, report)
    assert stamp.stale(request) is None
    sources = {str(path) for path in report.sources}
    assert {str(extra), str(module_tree / "modules.dep")} <= sources
    assert any(name.endswith("/virtio_blk.ko") for name in sources)
    assert any(name.endswith("capture/boot/job.py") for name in sources)
    assert any("/libc.so" in name for name in sources)
    assert any("zstandard" in name for name in sources)
    assert any(name.endswith("/busybox") for name in sources)
    assert all(Path(name).exists() for name in sources), "nothing that was only there while it was built"
    assert json.loads(stamp.path_of(request.output).read_text())["sources"].keys() == sources
    with (module_tree / "modules.dep").open("a") as file:
        file.write("kernel/new.ko:\n")
    assert stamp.stale(request) == f"{module_tree}/modules.dep changed since it was built"
