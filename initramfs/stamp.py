"""What an image was made from, written beside it: whether it is still what would be built now can be told in no time.

What it is to hold stands in the request, which follows from the configuration, the target's devices and this program;
the files that it holds are known by size and time of change, as make does it. So a new kernel module, a new key, an
upgraded NumPy or libc are all seen, and nothing has to be built to see them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capture import __version__
from capture.options import RECIPIENTS
from initramfs import state
from initramfs.errors import ImageError, StateError
from initramfs.image import ImageReport, ImageRequest

SUFFIX = ".stamp"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Stamp:
    """What is known of an image."""

    release: str
    encrypted: bool
    built: float  # seconds since 1970
    version: str  # of vmcapture
    request: str  # SHA-256 of what was asked for
    image: list[int]  # size, and time of change in nanoseconds
    sources: dict[str, list[int]]  # the same of each file that it was made from


def write(request: ImageRequest, report: ImageReport) -> None:
    """Write the stamp of an image that was just built; none is left where that cannot be done.

    Raises:
        ImageError: it cannot be written.
    """
    stamp = Stamp(
        release=report.kernel_release,
        encrypted=any(place == str(RECIPIENTS) for place, _ in request.files),
        built=round(time.time(), 3),
        version=__version__,
        request=_digest(request),
        image=_identity(report.path),
        sources={str(path): _identity(path) for path in report.sources},
    )
    place = path_of(report.path)
    try:
        with contextlib.suppress(FileNotFoundError):
            place.unlink()
        state.write(place, {"format": FORMAT, **asdict(stamp)}, 0o644)
    except (OSError, StateError) as error:
        raise ImageError(str(error) if isinstance(error, StateError) else f"{place}: {error.strerror}") from None


def read(image: Path) -> Stamp | None:
    """Return the stamp of an image; None where it has none, or is another image by now."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        values = json.loads(path_of(image).read_text(encoding="utf-8"))
        if values.pop("format", None) == FORMAT:
            stamp = Stamp(**values)
            return stamp if stamp.image == _identity(image) else None
    return None


def path_of(image: Path) -> Path:
    """Return where the stamp of an image is."""
    return image.with_name(image.name + SUFFIX)


def stale(request: ImageRequest) -> str | None:
    """Return why the image of a request has to be built, in a few words; None when it is there and current."""
    image = request.output
    if not image.exists():
        return "there is none yet"
    stamp = read(image)
    if stamp is None:
        return "nobody knows what it was made from"
    if changed := outdated(stamp):
        return changed
    if stamp.request != _digest(request):
        return "configuration, target or devices have changed"
    return None


def outdated(stamp: Stamp) -> str | None:
    """Return which of the files has changed that an image was made from; None when it is none."""
    changed = [name for name, identity in stamp.sources.items() if identity != _identity(Path(name))]
    if not changed:
        return None
    more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
    return f"{changed[0]}{more} changed since it was built"


def _digest(request: ImageRequest) -> str:
    """Return the SHA-256 of what a request asks for, wherever the image goes and temporary files lie."""
    values = asdict(request)
    del values["output"]
    values["files"] = [
        (place, hashlib.sha256(content.read_bytes() if isinstance(content, Path) else content).hexdigest())
        for place, content in request.files
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> str | Sequence[Any]:  # noqa: ANN401
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _identity(path: Path) -> list[int]:
    try:
        status = os.stat(path)  # noqa: PTH116 (five hundred of them: without a Path's detours)
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]
