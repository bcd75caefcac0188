"""The Debian package on a Debian 12 machine with systemd: installed without a network, armed, crashed, and read."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.guest import debian, disk, host
from tests.guest.conftest import unavailable
from tests.guest.crash import SAVE_TIMEOUT, demand
from tests.guest.host import HostError
from tests.guest.qemu import Machine
from tests.readers import bitmaps, drgn_reader

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).resolve().parents[2]
CRASHKERNEL = "crashkernel=256M"
INSTALL = "DEBIAN_FRONTEND=noninteractive apt-get -q -y install /mnt/*.deb"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, built as `make deb` does."""
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
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the machine's disk is: the tests here are what happens to one machine, in this order."""
    try:
        debian.base()
    except HostError as error:
        unavailable(str(error))
    return tmp_path_factory.mktemp("debian")


def test_a_machine_without_a_reservation_is_told_so_when_the_package_is_installed(workdir: Path, package: Path) -> None:
    with debian.running(workdir, files=package) as machine:
        said = demand(machine, INSTALL, debian.INSTALL_TIMEOUT)
        assert "this machine is not armed: no memory is reserved for a capture kernel. Add crashkernel=" in said
        assert demand(machine, "command -v vmcapture").strip() == "/usr/sbin/vmcapture"
        assert machine.run("vmcapture status")[0] == 1
        man = demand(machine, "zcat /usr/share/man/man8/vmcapture.8.gz")
        assert "save what is left of a crashed Linux kernel" in man
        debian.power_off(machine)


def test_armed_it_crashes_and_has_the_dump_when_it_is_back(workdir: Path) -> None:
    with debian.running(workdir, append=CRASHKERNEL) as machine:
        built = demand(machine, "vmcapture initramfs", debian.INSTALL_TIMEOUT)
        assert re.search(r"initramfs-\S+\.img: [\d.]+ MiB \(squashfs\)", built)
        demand(machine, "vmcapture load", debian.INSTALL_TIMEOUT)
        assert demand(machine, "cat /sys/kernel/kexec_crash_loaded").strip() == "1"
        crash(machine)
    with debian.running(workdir, append=CRASHKERNEL) as machine:
        folder = demand(machine, "ls -d /var/crash/*").strip()
        assert demand(machine, f"ls {folder}").split() == [
            "capture-log.txt", "manifest.json", "registers.json", "registers.txt", "vmcore", "vmcore-dmesg.txt",
        ]  # fmt: skip
        verified = demand(machine, f"vmcapture verify --no-progress {folder}/vmcore", SAVE_TIMEOUT)
        assert re.search(r": \d+ pages read back well; SHA-256 as in the manifest", verified)
        debian.power_off(machine)


def test_the_dump_is_read_by_drgn(workdir: Path, tmp_path: Path) -> None:
    image = workdir / "debian.ext4"
    disk.replay(image)
    (name,) = disk.names(image, "/var/crash")
    saved = disk.extract(image, f"/var/crash/{name}", tmp_path / "saved")
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["kernel"]["release"] == debian.base().release
    assert "sysrq triggered crash" in (saved / "vmcore-dmesg.txt").read_text()
    read = drgn_reader(saved / "vmcore")
    kept = bitmaps(saved / "vmcore")[1].nonzero()[0].tolist()
    assert len(kept) > 10_000
    assert len(read(kept[0] * 4096, 4096)) == len(read(kept[-1] * 4096, 4096)) == 4096


def test_when_it_is_purged_nothing_is_left_but_what_was_saved(workdir: Path) -> None:
    with debian.running(workdir, append=CRASHKERNEL) as machine:
        demand(machine, "DEBIAN_FRONTEND=noninteractive apt-get -q -y purge vmcapture", debian.INSTALL_TIMEOUT)
        left = demand(machine, "find / -xdev -iname '*vmcapture*' -not -path '/proc/*' -not -path '/var/lib/apt/*'")
        assert [path for path in left.split() if not path.startswith(("/var/crash/", "/var/log/", "/tmp/"))] == []
        assert demand(machine, "ls /var/crash/*/vmcore")
        debian.power_off(machine)


def crash(machine: Machine) -> None:
    """Crash it, and wait until its capture kernel is done: under -no-reboot a restart is the end."""
    machine.send("sync; echo c > /proc/sysrq-trigger")
    machine.expect("Kernel panic - not syncing: sysrq triggered crash", 60.0)
    machine.expect(r"^vmcapture: saved in ", SAVE_TIMEOUT)
    machine.wait_exit(120.0)
