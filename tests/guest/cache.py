"""Debian kernels and their debug symbols, fetched once with apt and kept unpacked in a cache.

Layout::

    ROOT/kernels/PACKAGE/      an unpacked package with its modules.dep; renamed here when it is whole
    ROOT/resolved/META         the package that a meta package stood for when it was last looked up
    ROOT/debug/PACKAGE/        vmlinux-RELEASE, the kernel with its debug symbols
    ROOT/trees/NAME-HASH/      several packages unpacked into one tree, nothing configured; the hash is of their names
    ROOT/apt/                  package lists of our own, where the system has none and we may not write them
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.guest import host
from tests.guest.host import HostError

VERSION_FILE = "package-version"


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package."""

    package: str
    version: str  # of the package; the debug symbols must be of the very same build
    release: str  # uname -r
    vmlinuz: Path
    modules_dir: Path  # .../lib/modules/RELEASE, with modules.dep


def root() -> Path:
    """Where the cache is: $VMCAPTURE_CACHE, else the user's cache directory."""
    if override := os.environ.get("VMCAPTURE_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vmcapture"


def kernel(name: str) -> Kernel:
    """The newest kernel that a package or meta package stands for, from the cache or else fetched with apt.

    Raises:
        HostError: it is neither in the cache nor can it be fetched.
    """
    package = _resolve(name)
    unpacked = root() / "kernels" / package
    if not unpacked.is_dir():
        try:
            _unpack_kernel(package, unpacked)
        except HostError:
            # The lists know a newer kernel than we have, and there is no network: the one that we have will do.
            package = _resolved_before(name) or package
            unpacked = root() / "kernels" / package
            if not unpacked.is_dir():
                raise
    resolved = root() / "resolved" / name
    resolved.parent.mkdir(parents=True, exist_ok=True)
    with _written_whole(resolved) as draft:
        draft.write_text(package + "\n")
    return _describe(package, unpacked)


def tree(name: str, packages: Sequence[str]) -> Path:
    """A root directory with these packages unpacked in it and none of their scripts run.

    Raises:
        HostError: it is neither in the cache nor can they be fetched.
    """
    unpacked = root() / "trees" / f"{name}-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:8]}"
    if not unpacked.is_dir():
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder() as scratch:
            draft = scratch / "tree"
            draft.mkdir()
            for deb in download(packages, scratch):
                host.run("dpkg", "-x", deb, draft)
            rename_into_place(draft, unpacked)
    return unpacked


def debug_vmlinux(of: Kernel) -> Path:
    """The kernel's ELF file with its debug symbols: 300 MB to fetch, the first time.

    Raises:
        HostError: it is neither in the cache nor can it be fetched.
    """
    vmlinux = root() / "debug" / of.package / f"vmlinux-{of.release}"
    if vmlinux.exists():
        return vmlinux
    vmlinux.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch, _written_whole(vmlinux) as draft:
        (deb,) = download([f"{of.package}-dbg={of.version}"], scratch)
        _extract_member(deb, f"./usr/lib/debug/boot/vmlinux-{of.release}", draft)
    return vmlinux


def _resolve(name: str) -> str:
    """The concrete package: itself, or what the meta package's newest version depends on."""
    try:
        package = _newest_dependency(name) or _resolved_before(name)
        if package is None:
            _update_lists()
            package = _newest_dependency(name)
    except HostError as error:
        package = _resolved_before(name)
        if package is None:
            raise HostError(f"cannot look up {name}, and the cache {root()} has none ({error})") from error
    if package is None:
        raise HostError(f"apt knows no {name}: add Debian 12's main and security archives to its sources")
    return package


def _resolved_before(name: str) -> str | None:
    try:
        return (root() / "resolved" / name).read_text().strip()
    except FileNotFoundError:
        return None


def _newest_dependency(name: str) -> str | None:
    """What apt's lists say now; None where they don't know the package."""
    # --no-all-versions shows the candidate alone: the newest one that apt would install.
    shown = host.run("apt-cache", *_apt_options(), "show", "--no-all-versions", name, good=(0, 100)).output
    depends = re.search(r"^Depends: (linux-image-[^ ,]+)", shown, re.MULTILINE)
    if depends:
        return depends[1]
    return name if re.search(r"^Package: ", shown, re.MULTILINE) else None


def _update_lists() -> None:
    """Run apt-get update: on the system's lists as root, else on lists of our own."""
    if os.geteuid() != 0:
        for folder in ("lists/partial", "cache/archives/partial"):
            (root() / "apt" / folder).mkdir(parents=True, exist_ok=True)
    host.run("apt-get", *_apt_options(), "update")


def _apt_options() -> list[str]:
    options = ["-q", "-o", "APT::Sandbox::User=root"]  # else apt warns that its user cannot write to our cache
    own = root() / "apt"
    if own.is_dir():
        options += ["-o", f"Dir::State::lists={own}/lists", "-o", f"Dir::Cache={own}/cache"]
    return options


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """Fetch packages (``name`` or ``name=version``); apt's lists are refreshed when they are stale."""
    try:
        host.run("apt-get", *_apt_options(), "download", *packages, cwd=folder)
    except HostError:
        _update_lists()
        try:
            host.run("apt-get", *_apt_options(), "download", *packages, cwd=folder)
        except HostError as error:
            raise HostError(
                f"cannot download {' '.join(packages)}: check the network, or copy a filled cache to {root()} ({error})"
            ) from error
    return sorted(folder.glob("*.deb"))


def _unpack_kernel(package: str, unpacked: Path) -> None:
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder() as scratch:
        (deb,) = download([package], scratch)
        tree = scratch / "tree"
        host.run("dpkg", "-x", deb, tree)
        (release,) = (path.name for path in (tree / "lib/modules").iterdir())
        host.run("depmod", "-b", tree, release)
        (tree / VERSION_FILE).write_text(host.run("dpkg", "--field", deb, "Version").output)
        rename_into_place(tree, unpacked)


def _describe(package: str, unpacked: Path) -> Kernel:
    (modules_dir,) = (unpacked / "lib/modules").iterdir()
    release = modules_dir.name
    version = (unpacked / VERSION_FILE).read_text().strip()
    return Kernel(package, version, release, unpacked / "boot" / f"vmlinuz-{release}", modules_dir)


def _extract_member(deb: Path, member: str, output: Path) -> None:
    """Stream one file out of a package; the gigabyte beside it is never written."""
    with (
        output.open("wb") as stream,
        subprocess.Popen([host.find("dpkg"), "--fsys-tarfile", deb], stdout=subprocess.PIPE) as tree,
    ):
        # Without --occurrence tar reads on to the archive's end, so that dpkg never meets a closed pipe.
        command = [str(host.find("tar")), "-x", "-O", "-f", "-", member]
        taken = subprocess.run(command, stdin=tree.stdout, stdout=stream, check=False)
    if tree.returncode or taken.returncode:
        raise HostError(f"{deb.name} has no readable {member}: is the disk of {root()} full?")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder on the cache's own file system, removed at the end with all that was not renamed out of it."""
    root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=root()) as folder:
        yield Path(folder)


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of ``path`` only when the block ends well."""
    with scratch_folder() as scratch:
        draft = scratch / path.name
        yield draft
        draft.replace(path)


def rename_into_place(tree: Path, place: Path) -> None:
    """Move a finished folder into place; when another process was faster, its copy is as good."""
    try:
        tree.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        shutil.rmtree(tree)
