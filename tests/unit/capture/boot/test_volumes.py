"""Volumes put together before the search: mdadm and lvm are scripts here, sysfs is made by the test.

Real ones, put together by a real capture kernel: tests.guest.test_storage.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from capture.boot import superblocks, targets, volumes
from capture.boot.local import find_device, look_up
from capture.boot.volumes import Assembly, lvm_uuid, tops
from capture.console import Console
from capture.errors import TargetError

Tools = Callable[..., Path]

ARRAY = "8a1b2c3d:4e5f6071:8293a4b5:c6d7e8f9"
LVM_UUID = "LVM-gF4dT2zBq8mXnYw1RkLpJh6VsC3uE9aNaB3cD5eF7gH9iJ1kL3mN5oP7qR9sT1uV"
LV_UUID = "aB3cD5-eF7g-H9iJ-1kL3-mN5o-P7qR-9sT1uV"
CALL = f"mdadm --assemble /dev/md0 --config=partitions --uuid={ARRAY}"


@pytest.fixture
def sys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(volumes, "SYS", tmp_path / "sys")
    (tmp_path / "sys/block").mkdir(parents=True)
    return tmp_path / "sys"


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sys: Path) -> Path:
    """What an image for a logical volume on an array says."""
    monkeypatch.setattr(volumes, "VOLUMES", tmp_path / "volumes")
    (tmp_path / "volumes").mkdir()
    (tmp_path / "volumes" / f"1-{LVM_UUID}").write_text(f"lvm {LVM_UUID} vg-crash\n")
    (tmp_path / "volumes" / f"0-{ARRAY}").write_text(f"md {ARRAY} md7\n")
    assert sys.is_dir()
    return tmp_path


def started(image: Path, degraded: int = 0) -> str:
    """A piece of shell that does to sysfs what starting the array does."""
    array = image / "sys/block/md0/md"
    return (
        f"/bin/mkdir -p {array}; echo clean > {array}/array_state; echo {degraded} > {array}/degraded; "
        f"echo resync > {array}/sync_action"
    )


def activated(image: Path) -> str:
    mapped = image / "sys/block/dm-0/dm"
    return f"/bin/mkdir -p {mapped}; echo {LVM_UUID} > {mapped}/uuid"


def test_an_array_and_the_volume_on_it_are_put_together_once_in_this_order(image: Path, tools: Tools) -> None:
    calls = tools(mdadm=started(image), lvm=activated(image))
    assembly = Assembly(30)
    assembly.go_on()
    assembly.go_on()
    assert calls.read_text().splitlines() == [
        f"{CALL} --no-degraded",
        f"lvm lvchange --sysinit -K -ay -S lv_uuid={LV_UUID}",
    ]
    assert assembly.line == ""
    assert (image / "sys/block/md0/md/sync_action").read_text() == "frozen", "the healthy system goes on with that"


def test_a_second_save_in_the_same_kernel_touches_them_no_more(image: Path, tools: Tools) -> None:
    calls = tools(mdadm=started(image), lvm=activated(image))
    Assembly(30).go_on()
    calls.unlink()
    Assembly(30).go_on()
    assert not calls.exists()


def test_an_array_lacks_a_disk_only_after_a_while(
    image: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch, console: Console
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    insist = f'case "$*" in *--run) {started(image, 1)};; *) echo mdadm: 1 of 2 >&2; exit 1;; esac'
    calls = tools(mdadm=insist, lvm="echo '  no such thing'")
    assembly = Assembly(30, console.say)
    assembly.go_on()
    assert assembly.line == ("array md7 cannot be assembled: mdadm: 1 of 2; logical volume vg-crash: no such thing")
    now[0] += volumes.PATIENCE - 0.1
    assembly.go_on()
    assert console.lines == []
    now[0] += 0.2
    assembly.go_on()
    assert [line for line in calls.read_text().splitlines() if line.startswith("mdadm")] == [
        f"{CALL} --no-degraded", f"{CALL} --no-degraded", f"{CALL} --run",
    ]  # fmt: skip
    assert console.lines == ["array md7 lacks 1 of its disks, and is used without"]
    assert "md7" not in assembly.line


def test_what_an_earlier_try_left_behind_is_stopped_first(image: Path, tools: Tools) -> None:
    calls = tools(mdadm="exit 1", lvm="exit 0")
    array = image / "sys/block/md0/md"
    array.mkdir(parents=True)
    (array / "array_state").write_text("inactive\n")
    Assembly(0).go_on()
    assert calls.read_text().splitlines()[:2] == ["mdadm --stop /dev/md0", f"{CALL} --run"]


def test_the_reason_is_told_when_the_target_does_not_appear(image: Path, tools: Tools, console: Console) -> None:
    assert image.is_dir()
    tools(mdadm="echo mdadm: no devices found for /dev/md0 >&2; exit 1", lvm="exit 0", findfs="exit 1")
    with pytest.raises(TargetError) as refused:
        find_device("UUID=0123", 0, console)
    assert str(refused.value) == (
        "target UUID=0123: no such file system (array md7 cannot be assembled: mdadm: no devices found for /dev/md0; "
        "logical volume vg-crash: no disk carries it); attach it and save again, or mount any other and name it: "
        "vmcapture save DIR"
    )


def test_without_the_programs_that_is_the_reason(image: Path, tools: Tools) -> None:
    assert image.is_dir()
    tools()
    assembly = Assembly(0)
    assembly.go_on()
    assert "mdadm cannot be run: No such file" in assembly.line
    assert "lvm cannot be run: No such file" in assembly.line


def test_several_targets_are_put_together_before_they_are_looked_for(image: Path, tools: Tools) -> None:
    calls = tools(mdadm=started(image), lvm=activated(image), findfs="echo /dev/mapper/vg-crash")
    assert targets.devices_of(["UUID=0123"]) == {"UUID=0123": "/dev/mapper/vg-crash"}
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["mdadm", "lvm", "findfs", "mdadm"]


def test_what_lies_below_a_volume_is_not_what_is_mounted(sys: Path, tools: Tools) -> None:
    """The leg of a mirror shows the UUID of the file system on it, and may come first."""
    holders = sys / "class/block/vdb/holders"
    (holders / "md0").mkdir(parents=True)
    (sys / "class/block/md0/holders/dm-0").mkdir(parents=True)
    (sys / "class/block/dm-0/holders").mkdir(parents=True)
    tools(findfs="echo /dev/vdb")
    assert look_up("UUID=0123") == "/dev/dm-0"


def test_of_several_volumes_on_one_disk_the_one_that_carries_it_is_taken(
    sys: Path, tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = "01234567-89ab-cdef-0123-456789abcdef"
    head = tmp_path / "head"
    head.write_bytes(b"XFSB" + bytes(28) + bytes.fromhex(identity.replace("-", "")) + bytes(500))
    monkeypatch.setattr(superblocks, "BLOCK", tmp_path)  # of the disk itself only findfs knows
    for name in ("dm-1", "dm-2"):
        (sys / "class/block/vdb/holders" / name).mkdir(parents=True)
    tools(findfs="echo /dev/vdb", dd=f"[ $1 = if=/dev/dm-2 ] && /bin/cat {head}")
    assert tops("/dev/vdb", sys) == ["/dev/dm-1", "/dev/dm-2"]
    assert look_up(f"UUID={identity}") == "/dev/dm-2"


def test_the_leg_of_an_array_that_is_not_there_is_not_mounted(image: Path, tools: Tools) -> None:
    assert image.is_dir()
    tools(findfs="echo /dev/vdb", mdadm=f"echo MD_LEVEL=raid1; echo MD_UUID={ARRAY}")
    assert look_up("UUID=0123") is None
    tools(mdadm=f"echo MD_UUID={ARRAY[::-1]}")
    assert look_up("UUID=0123") == "/dev/vdb"
    tools(mdadm="echo no superblock >&2; exit 1")
    assert look_up("UUID=0123") == "/dev/vdb"


def test_lvm_writes_uuids_with_dashes() -> None:
    assert lvm_uuid(LVM_UUID) == LV_UUID
