"""Fixtures: the kernels, the images made for them, and one crash for each case."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from tests.guest import cache, debian, host
from tests.guest.cache import Kernel
from tests.guest.cases import CASES, Case
from tests.guest.crash import Crashed, ImageStore, crash_with_evidence
from tests.guest.host import HostError

# Set where a skip would hide that nothing was tested (.ci/run).
REQUIRE = "VMCAPTURE_REQUIRE_GUESTS"

# A new folder to leave images, dumps and console logs in, to look at after a failure.
KEEP = "VMCAPTURE_KEEP"


REPOSITORY = Path(__file__).resolve().parents[2]

# Where all processes of a run have what they share; set by the first of them.
SHARED = "VMCAPTURE_GUESTS_FOLDER"


def pytest_configure(config: pytest.Config) -> None:
    """Make the run's folder before pytest-xdist starts its workers, which inherit the environment."""
    if SHARED in os.environ:
        return
    if keep := os.environ.get(KEEP):
        folder = Path(keep)
        folder.mkdir(parents=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="vmcapture-guests-", dir=host.SCRATCH))
        config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    os.environ[SHARED] = str(folder)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.guest)


def unavailable(why: str) -> NoReturn:
    """Skip, saying why; fail instead where $VMCAPTURE_REQUIRE_GUESTS is set."""
    if os.environ.get(REQUIRE):
        pytest.fail(f"{REQUIRE} is set, but {why}", pytrace=False)
    pytest.skip(why)


@pytest.fixture(scope="session")
def kernels() -> Callable[[str], Kernel]:
    """The kernel of a package or meta package: ``kernels("linux-image-cloud-amd64")``."""

    def kernel(package: str) -> Kernel:
        try:
            return cache.kernel(package)
        except HostError as error:
            unavailable(str(error))

    return kernel


@pytest.fixture(scope="session")
def debug_vmlinux() -> Callable[[Kernel], Path]:
    """The ELF file with the debug symbols of a kernel."""

    def vmlinux(kernel: Kernel) -> Path:
        try:
            return cache.debug_vmlinux(kernel)
        except HostError as error:
            unavailable(str(error))

    return vmlinux


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """What all processes of the run have in common."""
    return Path(os.environ[SHARED])


@pytest.fixture(scope="session")
def guest_folder(shared_folder: Path, worker_id: str) -> Path:
    """Where dumps are: gigabytes, so that none of it outlives the run unless $VMCAPTURE_KEEP is set."""
    folder = shared_folder / worker_id
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def image_store(shared_folder: Path) -> ImageStore:
    """The capture image and the healthy system of each kernel, built once a run."""
    if (line := host.missing()) is not None:
        unavailable(line)
    return ImageStore(shared_folder / "images")


@pytest.fixture(scope="session")
def crash_once(
    image_store: ImageStore, kernels: Callable[[str], Kernel], guest_folder: Path
) -> Callable[[Case], Crashed]:
    """What a case left behind; every case crashes once a session, in whatever order tests ask for it."""

    @functools.cache
    def crash(case: Case) -> Crashed:
        kernels(case.kernel)  # skips here, where it can say why
        return crash_with_evidence(case, image_store, guest_folder / case.name)

    return crash


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Debian package, built as `make deb` does, lintian included."""
    if (line := host.missing(["dpkg-buildpackage", "lintian"])) is not None:
        unavailable(line)
    folder = tmp_path_factory.mktemp("deb")
    made = subprocess.run(
        ["bash", REPOSITORY / "packaging/deb.sh", folder], capture_output=True, text=True, check=False, timeout=600
    )
    assert made.returncode == 0, made.stderr + made.stdout
    (deb,) = folder.glob("*.deb")
    (folder / "files").mkdir()
    return deb.rename(folder / "files" / deb.name).parent


@pytest.fixture(scope="module")
def debian_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the disk of a Debian machine is: the tests of a module are what happens to one machine, in their order."""
    try:
        debian.base()
    except HostError as error:
        unavailable(str(error))
    return tmp_path_factory.mktemp("debian")


@pytest.fixture(scope="session", params=CASES, ids=str)
def crashed(request: pytest.FixtureRequest, crash_once: Callable[[Case], Crashed]) -> Crashed:
    """What each case left behind."""
    return crash_once(request.param)
