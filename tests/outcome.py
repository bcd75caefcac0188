"""What came out: of a command, of a save, and of a dump as our own reader has it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capture.dumpfile.reader import BATCH_PAGES, KdumpFile
from capture.options import DumpOptions


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command came to."""

    status: int
    out: str
    err: str


Run = Callable[..., Ran]
"""The fixture ``run``."""


def sha256_blocks(data: bytes, block: int) -> list[str]:
    """SHA-256 of each block of a whole file, as reports and manifests have to have them."""
    return [hashlib.sha256(data[at : at + block]).hexdigest() for at in range(0, len(data), block)]


# --- the directory of a crash ---------------------------------------------------------------------------------------

FILES = ("vmcore-dmesg.txt", "registers.txt", "registers.json", "vmcore", "capture-log.txt", "manifest.json")
"""In the order in which they are made."""
WHEN = "2023-11-14-22:13:20"
"""When the kernels of ``builders`` crashed, as in the directory's name: ``date -u -d @1700000000``."""


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def the_directory(parent: Path) -> Path:
    (found,) = parent.iterdir()
    return found


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return found


def check_manifest(folder: Path) -> dict[str, Any]:
    """Hold sizes and SHA-256 of the manifest against the files; return it."""
    manifest = manifest_of(folder)
    assert set(manifest["files"]) == listing(folder) - {"manifest.json"}
    for name, said in manifest["files"].items():
        data = (folder / name).read_bytes()
        blocks = sha256_blocks(data, manifest["hash_block"])
        assert said == {"size": len(data), **({"sha256": blocks[0]} if len(blocks) == 1 else {"sha256_blocks": blocks})}
    return manifest


# --- a dump ---------------------------------------------------------------------------------------------------------


def read_back(path: str | Path) -> tuple[dict[int, bytes], dict[int, str]]:
    """All pages of a dump, and why the others cannot be had, by PFN."""
    dump = KdumpFile(Path(path))
    try:
        good: dict[int, bytes] = {}
        bad: dict[int, str] = {}
        for batch in dump.pages():
            assert 0 < len(batch.pfns) <= BATCH_PAGES
            for index, pfn in enumerate(batch.pfns.tolist()):
                if index in batch.bad:
                    bad[pfn] = batch.bad[index]
                else:
                    good[pfn] = batch.data[index].tobytes()
        return good, bad
    finally:
        dump.close()


def dump_options(*, level: int | None = None, **options: Any) -> DumpOptions:
    """Options of a dump of one level, without a progress display."""
    if level is not None:
        options["levels"] = (level,)
    return DumpOptions(progress=False, **options)
