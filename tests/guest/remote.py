"""Runs in a healthy guest: what the set-up side finds out about targets on other machines, a line of JSON for each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from capture.boot import routes
from capture.errors import CaptureError
from initramfs import targets
from initramfs.wishes import Wishes


def look(target: str, path: str, key: str) -> dict[str, object]:
    """What an image for a target would hold, or why there can be none."""
    try:
        needed = targets.needed_by(target, Wishes(path, Path(key)))
    except CaptureError as error:
        return {"refused": str(error)}
    files = dict(needed.files)
    return {
        "modules": [*needed.loaded, *needed.built_in],
        "programs": [path.name for path in needed.binaries],
        "files": sorted(files),
        "routes": [
            content.decode()
            for place, content in files.items()
            if Path(place).parent == routes.PLACE and isinstance(content, bytes)
        ],
    }


if __name__ == "__main__":
    for words in sys.argv[1:]:
        print(f"looked {json.dumps(look(*words.split(',')))}")
