"""What a directory has to be like, whatever became of the job that made it: the promises of docs/format.md, checked.

Nothing is asserted here: what is wrong is returned in lines, so that a table can have them. Nothing is imported that
the capture image does not have: guests hold their own saves against it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capture.dumpfile.reader import KdumpFile
from capture.errors import CaptureError
from capture.verify import verify
from capture.vmcore import open_vmcore
from tests.outcome import FILES, listing, manifest_of, read_back, sha256_blocks

SMALL = FILES[:3]
"""What has the same bytes in every save of a crash."""
PARTLY = ".incomplete"
NAMES = re.compile("|".join([*(re.escape(name) + f"({re.escape(PARTLY)})?" for name in FILES),
                             rf"capture-log-\d+\.txt({re.escape(PARTLY)})?"]))  # fmt: skip
"""Every name that is documented; anything else is a stray file."""


OtherReader = Callable[[Path, dict[int, bytes], Collection[int]], Iterator[str]]
"""Another reader of dumps: told of one, its pages and the PFNs without data, it says what it reads otherwise."""


class Reference(NamedTuple):
    """A save that nothing disturbed: its small files, and how many pages its dump has.

    With ``other_reader`` there are ``pages``, by PFN, too; without, the source alone says what is in a page: memory is
    scarce in a capture kernel.
    """

    source: Path
    small: dict[str, bytes]
    page_count: int
    folder: str
    other_reader: OtherReader | None
    pages: dict[int, bytes]


def reference_of(source: Path, folder: Path, other_reader: OtherReader | None = None) -> Reference:
    """Take what ``folder`` has as what is right; whether it is, the tests of the job itself say."""
    small = {name: (folder / name).read_bytes() for name in SMALL}
    with KdumpFile(folder / "vmcore") as dump:
        page_count = dump.page_count()
    pages, bad = read_back(folder / "vmcore") if other_reader is not None else ({}, {})
    if bad:  # (no assert: in an image's interpreter there are none)
        raise ValueError(f"{folder}: what is to be right has pages that do not read back: {bad}")
    return Reference(source, small, page_count, folder.name, other_reader, pages)


class State(NamedTuple):
    """What a directory has: the dump, None where none opens; its pages that read back, and whether it is marked."""

    dump: Path | None
    pages: int
    marked: bool

    def text(self, reference: Reference) -> str:
        if self.dump is None:
            return "no dump yet"
        return f"{self.dump.name}, {self.pages} of {reference.page_count} pages"


NO_DUMP = State(None, 0, False)


class Seen(NamedTuple):
    """What was seen below a directory of crashes: what is not as promised at every instant, and each one's state."""

    wrong: list[str]
    states: dict[Path, State]


def directories(parent: Path) -> list[Path]:
    """The directories of crashes below ``parent``, those that were made first before the others."""
    found = sorted(parent.iterdir()) if parent.is_dir() else []
    return sorted(found, key=lambda path: (len(path.name), path.name))


def has_header(path: Path) -> bool:
    """Whether the second sync, or what comes before it, has brought a header: from there on it is a dump."""
    with path.open("rb") as file:
        return file.read(5) == b"KDUMP"


Known = dict[tuple[bytes, ...], tuple[list[str], State]]
"""What was said of a dump that had the same name, manifest, and bytes as far as a reader sees them."""
DESCRIPTOR_WORDS = np.dtype([("offset", "<i8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])


def look(parent: Path, reference: Reference, known: Known | None = None) -> Seen:
    """Hold everything below ``parent`` against what is promised; a dump is read once, and not if it is ``known``."""
    seen = Seen([], {})
    for folder in directories(parent):
        if not folder.is_dir() or not folder.name.startswith(reference.folder):
            seen.wrong.append(f"{folder.name}: a stray file")
            continue
        seen.wrong.extend(f"{folder.name}: {line}" for line in _wrong_with_directory(folder, reference))
        seen.states[folder] = NO_DUMP
        for path in (folder / ("vmcore" + PARTLY), folder / "vmcore"):
            if path.exists():
                looked = _look_at_dump(path, reference) if known is None else _known_dump(path, reference, known)
                lines, state = looked
                seen.wrong.extend(f"{folder.name}: {path.name}: {line}" for line in lines)
                seen.states[folder] = state if state.dump is not None else seen.states[folder]
    return seen


def wrong(parent: Path, reference: Reference) -> list[str]:
    """Everything below ``parent`` that is not as promised at every instant, a line each."""
    return look(parent, reference).wrong


def _wrong_with_directory(folder: Path, reference: Reference) -> Iterator[str]:
    if (mode := stat.S_IMODE(folder.stat().st_mode)) != 0o700:
        yield f"mode {mode:o}"
    for path in sorted(folder.iterdir()):
        if (mode := stat.S_IMODE(path.stat().st_mode)) != 0o600:
            yield f"{path.name}: mode {mode:o}"
        if not NAMES.fullmatch(path.name):
            yield f"{path.name}: a stray file"
        if path.name in SMALL and path.read_bytes() != reference.small[path.name]:
            yield f"{path.name}: not what an undisturbed save has"
    if (folder / "manifest.json").exists():
        yield from _wrong_with_manifest(folder)


def _wrong_with_manifest(folder: Path) -> Iterator[str]:
    """A file that is named is there, with that size and those hashes."""
    try:
        manifest = manifest_of(folder)
    except ValueError as error:
        yield f"manifest.json: {error}"
        return
    for name, said in manifest["files"].items():
        path = folder / name
        if not path.exists():
            yield f"manifest.json: names {name}, which is not there"
            continue
        data = path.read_bytes()
        blocks = sha256_blocks(data, manifest["hash_block"])
        if said != {"size": len(data), **({"sha256": blocks[0]} if len(blocks) == 1 else {"sha256_blocks": blocks})}:
            yield f"manifest.json: size or SHA-256 of {name} differ"
    dump = manifest["dump"]
    if dump is not None and not (folder / dump["file"]).exists():
        yield f"manifest.json: the dump is {dump['file']}, which is not there"


def _known_dump(path: Path, reference: Reference, known: Known) -> tuple[list[str], State]:
    beside = path.with_name("manifest.json")
    manifest = beside.read_bytes() if beside.exists() else b""
    key = (str(path).encode(), manifest, _seen_by_readers(path, whole=bool(manifest)))
    if key not in known:
        known[key] = _look_at_dump(path, reference)
    return known[key]


def _seen_by_readers(path: Path, *, whole: bool) -> bytes:
    """SHA-256 of a dump, up to the end of the data that its descriptors point to unless ``whole``."""
    data = path.read_bytes()
    if not whole and has_header(path):
        with contextlib.suppress(CaptureError), KdumpFile(path) as dump:
            table = np.frombuffer(data, DESCRIPTOR_WORDS, dump.page_count(), dump.descriptor_table)
            data = data[: int((table["offset"] + table["size"]).max(initial=dump.descriptor_table + table.nbytes))]
    return hashlib.sha256(data).digest()


def _look_at_dump(path: Path, reference: Reference) -> tuple[list[str], State]:
    """What is wrong with a dump, and what it has."""
    finished = path.name == "vmcore"
    if not has_header(path):
        return (["no header"] if finished else []), NO_DUMP
    try:
        with KdumpFile(path) as dump, open_vmcore(str(reference.source)) as vmcore:
            report = verify(dump, vmcore.image, progress=False)
    except CaptureError as error:
        return [str(error)], NO_DUMP
    lines = []
    if report.different or report.damaged or report.extra or report.absent or report.changed:
        lines.append(report.text().splitlines()[0])
    if report.pages != reference.page_count:
        lines.append(f"{report.pages} pages, an undisturbed save has {reference.page_count}")
    if finished and report.incomplete:
        lines.append("has its name and is marked incomplete")
    if not report.incomplete and report.unwritten:
        lines.append(f"is not marked incomplete, and lacks {report.unwritten} pages")
    if reference.other_reader is not None:
        right, bad = read_back(path)
        if {pfn: reference.pages[pfn] for pfn in right} != right or len(right) + len(bad) != len(reference.pages):
            lines.append("its pages are not those of an undisturbed dump")
        if not report.damaged:  # (a reader that maps the file may die of a descriptor that points outside of it)
            lines += reference.other_reader(path, right, bad)
    return lines, State(path, report.pages - report.unwritten - report.damaged, report.incomplete)


# --- of a job that ended by itself


def wrong_in_the_end(seen: Seen, reference: Reference, status: int, said: str, *, going_on: bool = False) -> list[str]:
    """What exit status, console and manifest do not say as it is, a line each.

    A save that was ``going_on`` has another's capture log beside its own.
    """
    lines = [f"it says {word!r}" for word in ("Traceback", "internal error", "escaped") if word in said]
    found = next(iter(seen.states), None)
    names = listing(found) if found else set()
    if going_on:
        names = {name.replace("log-2", "log") for name in names}
    if status == 5:
        if names & {*FILES}:
            lines.append(f"status 5, and there is {sorted(names)}")
        return lines
    if status not in (0, 3):
        return [*lines, f"status {status} is none that is documented for a save"]
    if found is None or "manifest.json" not in names:
        if status == 0 or "manifest.json: " not in said:
            lines.append(f"status {status}, no manifest, and the console does not say why")
        return lines
    manifest = manifest_of(found)
    if status == 0 and (names != set(FILES) or manifest["failures"]):
        lines.append(f"status 0 with {sorted(names)} and failures {manifest['failures']}")
    if (
        status == 3 and manifest["complete"] and "manifest.json: " not in said
    ):  # (its own name comes after it is written)
        lines.append("status 3, and the manifest says that all is there")
    return [*lines, *_wrong_story(found, seen.states[found], manifest, names, reference, going_on=going_on)]


def _wrong_story(
    folder: Path, state: State, manifest: dict[str, Any], names: set[str], reference: Reference, *, going_on: bool
) -> Iterator[str]:
    failures, dump = manifest["failures"], manifest["dump"]
    blamed = {failure.split(":")[0].replace("log-2", "log") for failure in failures}
    for name in FILES[:-1]:
        if name not in names and name not in blamed:
            yield f"{name} is not there, and no failure names it"
    for name in blamed:
        if name not in FILES and name not in {above.name for above in folder.parents}:
            yield f"a failure of {name}, which is no step"
    unlisted = names - {name.replace("log-2", "log") for name in manifest["files"]} - {"manifest.json"}
    if going_on:
        unlisted -= {"capture-log.txt"}
    if unlisted - {name + PARTLY for name in blamed if name != "vmcore"}:
        yield f"the manifest does not list {sorted(unlisted)}"
    if dump is None:
        if state.dump is not None and not (going_on and "vmcore" in blamed):  # (nothing was added to it)
            yield f"the manifest knows of no dump, and there is {state.text(reference)}"
        return
    if state.dump is None or dump["file"] != state.dump.name:
        yield f"the manifest says {dump['file']}, there is {state.text(reference)}"
    elif dump["pages_written"] != state.pages:
        yield f"the manifest counts {dump['pages_written']} pages, there are {state.pages}"
    if dump["whole"] != (state.pages == reference.page_count and not state.marked):
        yield f"the manifest says whole: {dump['whole']}, there is {state.text(reference)}"


# --- of a save that was asked for again


def wrong_after_again(parent: Path, reference: Reference, before: dict[Path, State], status: int) -> list[str]:
    """What is wrong when a second save, undisturbed, has ended: it has to be whole, and to have gone on."""
    lines = [] if status == 0 else [f"the second save ends with status {status}"]
    seen = look(parent, reference)
    last = list(seen.states)[-1]
    unfinished = [folder for folder, state in before.items() if state.dump is not None and state.dump.name != "vmcore"]
    if unfinished and last != unfinished[-1]:
        lines.append(f"the second save did not go on in {unfinished[-1].name}")
    state = seen.states[last]
    if state.pages != reference.page_count or state.dump is None or state.dump.name != "vmcore" or state.marked:
        lines.append(f"after the second save: {state.text(reference)}")
    missing = set(FILES) - listing(last)
    if missing:
        lines.append(f"after the second save there is no {sorted(missing)}")
    else:
        manifest = json.loads((last / "manifest.json").read_bytes())
        if not manifest["complete"] or manifest["failures"]:
            lines.append("after the second save the manifest is not that of a whole one")
    if any(name.endswith(PARTLY) for name in listing(last)):
        lines.append(f"after the second save there is still {sorted(listing(last))}")
    return [*lines, *seen.wrong]
