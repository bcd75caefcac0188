"""The capture image is the distribution's, made by mkinitramfs and by dracut: a Debian 12 machine is armed with it,
crashes, and finds the dump on its disk.
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
BUILDERS = ("initramfs-tools", "dracut")
DUMPS = "/var/dumps"
IMAGES = "/var/lib/vmcapture"
BUILD_TIMEOUT = 2700.0
"""dracut asks for each file on its own, and an emulated CPU takes its time."""
PATIENT = "/etc/systemd/system/vmcapture.service.d/patient.conf"
"""What gives the service more than the quarter of an hour that mkinitramfs may take on a real CPU."""


def configured(builder: str) -> str:
    return f"printf 'path {DUMPS}\\nimage_builder {builder}\\n' > /etc/vmcapture.conf"


def test_the_package_is_installed_and_the_machines_own_initrd_has_nothing_of_it(
    debian_folder: Path, package: Path
) -> None:
    with debian.running(debian_folder, files=package) as machine:
        demand(machine, f"mkdir {DUMPS}; {configured(BUILDERS[0])}")
        time_out = f"[Service]\\nTimeoutStartSec={BUILD_TIMEOUT:.0f}\\n"
        demand(machine, f"mkdir -p {Path(PATIENT).parent}; printf '{time_out}' > {PATIENT}")
        demand(machine, f"{debian.APT} install /mnt/*.deb", debian.INSTALL_TIMEOUT)
        demand(machine, "update-initramfs -u", BUILD_TIMEOUT)
        assert "vmcapture" not in demand(machine, "lsinitramfs /boot/initrd.img-$(uname -r)", BUILD_TIMEOUT)
        debian.power_off(machine)


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_machine_that_is_armed_with_the_builders_image_saves_its_crash(debian_folder: Path, builder: str) -> None:
    with debian.running(debian_folder, append=CRASHKERNEL) as machine:
        demand(machine, debian.ARMED, BUILD_TIMEOUT)  # (with the image of the one before)
        said = demand(machine, f"{configured(builder)}; vmcapture arm", BUILD_TIMEOUT)
        assert builder == BUILDERS[0] or re.search(r"MiB \(made by dracut, squashfs in it\), for ", said)
        state = json.loads(demand(machine, "vmcapture status --json || [ $? = 3 ]"))
        checks = {check["name"]: check for check in state["checks"]}
        assert {name: checks[name]["state"] for name in ("kernel", "image", "target", "reservation")} == dict.fromkeys(
            ("kernel", "image", "target", "reservation"), "good"
        )
        image = state["loaded"]["image"]
        listing = {"initramfs-tools": f"lsinitramfs {image}", "dracut": f"lsinitrd {image}"}[builder]
        names = demand(machine, listing, BUILD_TIMEOUT)
        assert {"vmcapture/hand-over", "vmcapture/root.squashfs"} <= set(re.findall(r"vmcapture/[a-z.-]+", names))
        assert re.search(r"udevd", names)
        assert re.search(r"/virtio_blk\.ko", names)
        assert demand(machine, f"stat -c %a {image}").strip() == "600"
        machine.send("sync; echo c > /proc/sysrq-trigger")
        machine.expect("Kernel panic - not syncing: sysrq triggered crash", 60.0)
        machine.expect(r"^vmcapture: saving to ", SAVE_TIMEOUT)
        machine.expect(r"^vmcapture: saved in ", SAVE_TIMEOUT)
        machine.wait_exit(120.0)  # -no-reboot: a restart is the end


def test_a_failure_of_ours_is_one_of_the_builders(debian_folder: Path) -> None:
    with debian.running(debian_folder) as machine:
        each = f"for dump in {DUMPS}/*/vmcore; do vmcapture verify --no-progress $dump || exit 1; done"
        verified = demand(machine, f"( {each} )", SAVE_TIMEOUT)
        assert len(re.findall(r": \d+ pages read back well; SHA-256 as in the manifest", verified)) == len(BUILDERS)
        demand(machine, "echo 'extra_bins /none' >> /etc/vmcapture.conf")
        for command in (
            "mkinitramfs -d /usr/share/vmcapture/initramfs-tools -o /root/image",
            "dracut --quiet --force --modules vmcapture /root/image",
        ):
            status, said = machine.run(command, BUILD_TIMEOUT)
            assert status != 0, said
            assert "extra_bins /none: no such file" in said
        debian.power_off(machine)


def test_the_dumps_are_read_by_drgn(debian_folder: Path, tmp_path: Path) -> None:
    image = debian_folder / "debian.ext4"
    disk.replay(image)
    names = disk.names(image, DUMPS)
    assert len(names) == len(BUILDERS)
    for name in names:
        saved = disk.extract(image, f"{DUMPS}/{name}", tmp_path / name)
        assert "sysrq triggered crash" in (saved / "vmcore-dmesg.txt").read_text()
        read = drgn_reader(saved / "vmcore")
        kept = bitmaps(saved / "vmcore")[1].nonzero()[0].tolist()
        assert len(kept) > 1000
        assert len(read(kept[0] * 4096, 4096)) == len(read(kept[-1] * 4096, 4096)) == 4096
