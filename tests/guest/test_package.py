"""From kdump-tools to ours on a Debian 12 machine with systemd: the package is installed without a network, the machine
is armed after one reboot, crashes, and reports it when it is back.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.guest import debian, disk
from tests.guest.crash import SAVE_TIMEOUT, demand
from tests.readers import bitmaps, drgn_reader

pytestmark = pytest.mark.long

CRASHKERNEL = "crashkernel=256M"
OLD_CPU = "kvm64"
"""What many a virtual machine was given for years: of two modules for one thing (crc32c), the fast one refuses it."""
SETTINGS = 'USE_KDUMP=1\\nKDUMP_COREDIR="/var/dumps"\\nMAKEDUMP_ARGS="-c -d 17"\\nKDUMP_NUM_DUMPS=3\\n'
KDUMP_TOOLS = (
    f"mkdir /var/dumps && DEBIAN_FRONTEND=noninteractive dpkg -i /root/{debian.PEER}_*.deb"
    f" && printf '{SETTINGS}' > /etc/default/{debian.PEER}"
)


def test_it_takes_the_place_of_kdump_tools_and_says_that_no_memory_is_reserved(
    debian_folder: Path, package: Path
) -> None:
    with debian.running(debian_folder, files=package, cpu_model=OLD_CPU) as machine:
        demand(machine, KDUMP_TOOLS, debian.INSTALL_TIMEOUT)
        said = demand(machine, f"{debian.APT} install /mnt/*.deb", debian.INSTALL_TIMEOUT)
        assert "Removing kdump-tools" in said
        assert "this machine is not armed: no memory is reserved for a capture kernel. Add crashkernel=" in said
        assert demand(machine, "command -v vmcapture").strip() == "/usr/sbin/vmcapture"
        assert "vmcapture.conf" in demand(machine, "vmcapture config import")
        assert re.search(r"level +17", demand(machine, "vmcapture config check"))
        status, said = machine.run("vmcapture status")
        assert (status, "crashkernel=" in said) == (1, True)
        assert machine.run("systemctl is-active vmcapture.service")[0] != 0
        debian.power_off(machine)


def test_after_a_reboot_it_is_armed_with_the_same_meaning_and_saves_a_crash(debian_folder: Path) -> None:
    with debian.running(debian_folder, append=CRASHKERNEL, cpu_model=OLD_CPU) as machine:
        demand(machine, debian.ARMED, debian.ARM_TIMEOUT)
        assert demand(machine, "cat /sys/kernel/kexec_crash_loaded").strip() == "1"
        print(said := demand(machine, "vmcapture status"))
        assert said.startswith("armed: a crash now would be saved")
        status, said = machine.run("vmcapture test", debian.ARM_TIMEOUT)
        print(said)
        assert (status, "a file was written to /var/dumps, read back and removed" in said) == (3, True)
        assert "no guest was crashed" in said  # there is no QEMU
        print(demand(machine, "systemctl show -P ExecMainStartTimestamp,ExecMainExitTimestamp vmcapture.service"))
        words = json.loads(demand(machine, "cat /run/vmcapture/loaded.json"))["command_line"].split()
        expected = {"vmcapture.path=/var/dumps", "vmcapture.level=17", "vmcapture.keep=3", "vmcapture.compress=zlib"}
        assert expected <= set(words)
        machine.send("sync; echo c > /proc/sysrq-trigger")
        machine.expect("Kernel panic - not syncing: sysrq triggered crash", 60.0)
        machine.expect(r"^vmcapture: saved in ", SAVE_TIMEOUT)
        machine.wait_exit(120.0)  # -no-reboot: a restart is the end


def test_when_it_is_back_it_reports_the_crash_and_removed_it_leaves_that_alone(
    debian_folder: Path, package: Path
) -> None:
    with debian.running(debian_folder, append=CRASHKERNEL, cpu_model=OLD_CPU, files=package) as machine:
        demand(machine, debian.REPORTED, debian.ARM_TIMEOUT)
        said = demand(machine, "vmcapture list; journalctl -q -o cat -u vmcapture-report.service")
        assert "sysrq triggered crash" in said
        verified = demand(machine, "vmcapture verify --no-progress /var/dumps/*/vmcore", SAVE_TIMEOUT)
        assert re.search(r": \d+ pages read back well; SHA-256 as in the manifest", verified)
        demand(machine, debian.ARMED, debian.ARM_TIMEOUT)
        demand(machine, f"{debian.APT} install --reinstall /mnt/*.deb", debian.INSTALL_TIMEOUT + debian.ARM_TIMEOUT)
        said = demand(machine, "journalctl -q -b -o cat -u vmcapture.service")
        assert "Reloaded vmcapture.service" in said
        assert "Stopp" not in said, "an upgrade disarms the machine"
        assert demand(machine, "cat /sys/kernel/kexec_crash_loaded").strip() == "1"
        demand(machine, f"{debian.APT} purge vmcapture", debian.INSTALL_TIMEOUT)
        assert demand(machine, "cat /sys/kernel/kexec_crash_loaded").strip() == "0"
        left = demand(machine, "find / -xdev -iname '*vmcapture*' -not -path '/var/lib/systemd/*'").split()
        assert [path for path in left if not path.startswith(("/etc/vmcapture.conf", "/var/log/"))] == []
        debian.power_off(machine)


def test_the_dump_is_read_by_drgn(debian_folder: Path, tmp_path: Path) -> None:
    image = debian_folder / "debian.ext4"
    disk.replay(image)
    (name,) = disk.names(image, "/var/dumps")
    saved = disk.extract(image, f"/var/dumps/{name}", tmp_path / "saved")
    assert "sysrq triggered crash" in (saved / "vmcore-dmesg.txt").read_text()
    read = drgn_reader(saved / "vmcore")
    kept = bitmaps(saved / "vmcore")[1].nonzero()[0].tolist()
    assert len(kept) > 10_000
    assert len(read(kept[0] * 4096, 4096)) == len(read(kept[-1] * 4096, 4096)) == 4096
