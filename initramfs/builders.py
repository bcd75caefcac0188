"""Who makes the image: this program, or the distribution's own builder with our parts in it.

The distribution's hooks (packaging/initramfs-tools, packaging/dracut) take the parts from where PARTS says, and have
them written by ``vmcapture initramfs --into`` where it says nothing: somebody has called the builder by hand.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from initramfs import services, tools
from initramfs.errors import ImageError
from initramfs.image import OWN, ImageReport, ImageRequest, build_image, written_whole
from initramfs.parts import write_parts

INITRAMFS_TOOLS, DRACUT = "initramfs-tools", "dracut"
PARTS = "VMCAPTURE_PARTS"
"""The variable of the environment that tells the hooks where the parts are."""
CONFIGURATION = Path("/usr/share/vmcapture/initramfs-tools")
"""The directory that ``mkinitramfs -d`` is given. Nothing of ours is where it looks on its own: the machine's own
initrd is none of our business."""
DRACUT_MODULE = Path("/usr/lib/dracut/modules.d/98vmcapture")
MODULES = Path("/lib/modules")
RUN = Path("/run/vmcapture")


class Builder(NamedTuple):
    """``program`` of ``package``; ``hooks`` are ours, which have to be there; ``settings`` are the machine's own.

    ``command`` returns its words, for the program, the image and the release of the kernel. ``freezes``: where systemd
    runs, it freezes the file system that it has written the image to for a moment, which is meant for /boot.
    """

    program: str
    package: str
    hooks: Path
    settings: tuple[Path, ...]
    command: Callable[[Path, Path, str], Sequence[str | Path]]
    freezes: bool = False


def _mkinitramfs(program: Path, image: Path, release: str) -> Sequence[str | Path]:
    return (program, "-d", CONFIGURATION, "-o", image, release)


def _dracut(program: Path, image: Path, release: str) -> Sequence[str | Path]:
    # As small as it can be, and without the root file system: that may be what has failed. kexec takes no unified
    # kernel image, which the machine's own settings may ask for (uefi=yes).
    own = ("--add", "vmcapture", "--omit", "plymouth resume", "--hostonly", "--no-hostonly-cmdline", "--no-uefi")
    return (program, "--force", "--quiet", *own, image, release)


DISTRIBUTIONS = {
    INITRAMFS_TOOLS: Builder(
        "mkinitramfs", INITRAMFS_TOOLS, CONFIGURATION, (Path("/etc/initramfs-tools"),), _mkinitramfs
    ),
    DRACUT: Builder(
        "dracut", "dracut (Debian: dracut-core)", DRACUT_MODULE, (Path("/etc/dracut.conf"), Path("/etc/dracut.conf.d")),
        _dracut, freezes=True,
    ),
}  # fmt: skip
"""Name → builder; with our own, they are ``initramfs.directives.BUILDERS``."""


def build(request: ImageRequest) -> ImageReport:
    """Build the image by the builder that the request names; the output appears whole or not at all.

    Raises:
        CaptureError: it cannot be built.
    """
    if request.builder == OWN:
        return build_image(request)
    builder, program = distribution(request.builder)
    if request.modules_dir.resolve() != (MODULES / request.kernel_release).resolve():
        raise ImageError(f"{request.modules_dir}: {builder.program} takes modules from {MODULES}/RELEASE alone")
    try:
        with tempfile.TemporaryDirectory(prefix="vmcapture-") as scratch:
            report = write_parts(request, Path(scratch))
            size = _run(builder, program, request, scratch)
    except OSError as error:
        raise ImageError(f"{error.filename or request.output}: {error.strerror}") from error
    more = (program, *_files(builder.hooks), *(file for place in builder.settings for file in _files(place)))
    return replace(report, path=request.output, size=size, sources=tuple(sorted({*report.sources, *more})))


def distribution(name: str) -> tuple[Builder, Path]:
    """Return one of DISTRIBUTIONS, and where its program is.

    Raises:
        CaptureError: it cannot be used on this machine.
    """
    builder = DISTRIBUTIONS[name]
    program = tools.require(builder.program, builder.package)
    if not builder.hooks.is_dir():
        raise ImageError(
            f"{builder.hooks}: no such directory, without which {builder.program} does not know of us: copy it from "
            f"packaging/{name} of the sources"
        )
    return builder, program


def _run(builder: Builder, program: Path, request: ImageRequest, parts: str) -> int:
    """Have the image made, with the parts in it; return its size."""
    with written_whole(request.output) as draft, _apart(builder, draft) as image:
        tools.run(builder.command(program, image, request.kernel_release), environment={**os.environ, PARTS: parts})
        if image != draft:
            shutil.copyfile(image, draft)
        draft.chmod(0o600)
        return draft.stat().st_size


@contextmanager
def _apart(builder: Builder, draft: Path) -> Iterator[Path]:
    """Yield where the builder is to write: a tmpfs, which nobody can freeze, rather than where all of /var may be.

    Whoever is killed in between leaves it frozen, and the machine stands still.
    """
    if not builder.freezes or not services.running():
        yield draft
        return
    RUN.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="image-", dir=RUN) as folder:
        yield Path(folder) / "image"


def _files(place: Path) -> Iterator[Path]:
    """Yield what there is below a directory, and the place itself: directories, too, because files come and go."""
    yield place
    yield from sorted(place.rglob("*")) if place.is_dir() else ()
