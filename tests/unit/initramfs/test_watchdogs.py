"""What sysfs says of watchdogs becomes modules and lines; the trees are made the way the kernel makes them."""

from __future__ import annotations

from pathlib import Path

from initramfs import cpio, watchdogs
from initramfs.devices import Needed
from initramfs.image import LOAD_ORDER
from initramfs.tree import File, Tree
from initramfs.watchdogs import doubt, lacking_driver, running

from .conftest import Sysfs

TCO = "pci0000:00/0000:00:1f.4/iTCO_wdt"


def add(sysfs: Sysfs, name: str, state: str, device: str | None = None) -> None:
    place = sysfs.root / "devices" / (device or "virtual") / "watchdog" / name
    place.mkdir(parents=True)
    (place / "state").write_text(f"{state}\n")
    if device is not None:
        (place / "device").symlink_to(sysfs.root / "devices" / device)
    entry = sysfs.root / "class/watchdog" / name
    entry.parent.mkdir(parents=True, exist_ok=True)
    entry.symlink_to(place)


def tco(sysfs: Sysfs, state: str = "inactive", *, loaded: bool = True) -> None:
    """The watchdog of most Intel boards: a platform device that the SMBus driver makes."""
    sysfs.driver("pci0000:00/0000:00:1f.4", "i2c_i801", loaded=loaded)
    sysfs.driver(TCO, "iTCO_wdt", loaded=loaded)
    add(sysfs, "watchdog0", state, TCO)


def ipmi(sysfs: Sysfs, *names: str) -> None:
    for name in names:
        (sysfs.root / "module" / name).mkdir(parents=True)
        (sysfs.root / "module" / name / "initstate").write_text("live\n")


def held_open(proc: Path, device: str) -> Path:
    (proc / "1/fd").mkdir(parents=True)
    (proc / "1/fd/5").symlink_to(device)
    return proc


def image(folder: Path, *modules: str) -> Path:
    tree = Tree()
    tree.add(LOAD_ORDER, File("".join(f"{name}.ko\n" for name in modules).encode()))
    path = folder / "image"
    with path.open("wb") as file:
        cpio.write(tree, file)
    return path


def test_a_watchdog_needs_every_driver_between_the_bus_and_it(sysfs: Sysfs) -> None:
    tco(sysfs)
    assert watchdogs.modules(sysfs.root) == Needed(("i2c_i801", "iTCO_wdt"), ())


def test_a_driver_inside_the_kernel_is_told_apart(sysfs: Sysfs) -> None:
    tco(sysfs, loaded=False)
    assert watchdogs.modules(sysfs.root) == Needed((), ("i2c_i801", "iTCO_wdt"))


def test_software_has_no_driver_that_outlives_a_crash(sysfs: Sysfs) -> None:
    add(sysfs, "watchdog0", "active")
    assert watchdogs.modules(sysfs.root) == Needed((), ())
    assert running(sysfs.root) == ("watchdog0",)  # somebody wants one


def test_a_machine_without_a_watchdog_needs_nothing(sysfs: Sysfs) -> None:
    assert watchdogs.modules(sysfs.root) == Needed((), ())
    assert running(sysfs.root) == ()


def test_the_management_controllers_watchdog_needs_a_way_to_the_controller(sysfs: Sysfs) -> None:
    ipmi(sysfs, "ipmi_msghandler", "ipmi_si")
    assert watchdogs.modules(sysfs.root) == Needed((), ())
    ipmi(sysfs, "ipmi_watchdog")
    assert watchdogs.modules(sysfs.root) == Needed(("ipmi_si", "ipmi_watchdog"), ())


def test_only_what_was_armed_runs(sysfs: Sysfs, tmp_path: Path) -> None:
    tco(sysfs)
    assert running(sysfs.root, tmp_path / "proc") == ()
    (sysfs.root / "class/watchdog/watchdog0/state").write_text("active\n")
    assert running(sysfs.root, tmp_path / "proc") == ("watchdog0",)


def test_the_management_controllers_watchdog_runs_when_somebody_holds_it(sysfs: Sysfs, tmp_path: Path) -> None:
    ipmi(sysfs, "ipmi_watchdog")
    assert running(sysfs.root, tmp_path / "proc") == ()
    assert running(sysfs.root, held_open(tmp_path / "proc", "/dev/watchdog")) == ("ipmi_watchdog",)


def test_an_image_without_the_driver_is_doubted_while_the_watchdog_runs(sysfs: Sysfs, tmp_path: Path) -> None:
    tco(sysfs, "active")
    lacking = image(tmp_path, "i2c_i801", "ext4")
    said = lacking_driver(lacking, sysfs.root)
    assert said is not None
    assert said.startswith(f"watchdog0 runs now, and {lacking} has no iTCO_wdt: it may reset the machine")
    assert doubt("vmcapture.watchdog=60", lacking, sysfs.root) == said

    (sysfs.root / "class/watchdog/watchdog0/state").write_text("inactive\n")
    assert lacking_driver(lacking, sysfs.root) is None


def test_one_that_runs_and_is_not_to_be_fed_is_said_in_the_status(sysfs: Sysfs, tmp_path: Path) -> None:
    tco(sysfs, "active")
    whole = image(tmp_path, "i2c_i801", "iTCO_wdt", "ext4")
    assert lacking_driver(whole, sysfs.root) is None
    assert "vmcapture load --watchdog 180" in (doubt("vmcapture.watchdog=0", whole, sysfs.root) or "")
    assert doubt("vmcapture.watchdog=60", whole, sysfs.root) is None


def test_an_image_that_is_gone_or_not_ours_is_not_judged(sysfs: Sysfs, tmp_path: Path) -> None:
    tco(sysfs, "active")
    (tmp_path / "other").write_bytes(b"x" * 1000)
    assert lacking_driver(tmp_path / "other", sysfs.root) is None
    assert lacking_driver(tmp_path / "none", sysfs.root) is None
