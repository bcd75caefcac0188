"""What this machine knows of a configuration, each finding with its line and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from initramfs import devices, targets
from initramfs.config import ConfigError, parse
from initramfs.config_check import check, check_image
from initramfs.devices import Mount, Needed
from initramfs.errors import ImageError

from .conftest import program_of

FILE = Path("/etc/vmcapture.conf")


@pytest.fixture(autouse=True)
def disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """LABEL=good is a disk with ext4; LABEL=luks stands on something; there are no others."""

    def modules(target: str) -> Needed:
        if target == "LABEL=good":
            return Needed((), ())
        raise ImageError(f"{target} stands on something" if target == "LABEL=luks" else devices.absent(target))

    monkeypatch.setattr(targets, "needed_by", modules)
    monkeypatch.setattr(devices, "find_device", lambda target: Path("/dev/vdb") if target == "LABEL=good" else None)
    monkeypatch.setattr(devices, "filesystem_of", lambda _: "ext4")
    monkeypatch.setattr(devices, "mount_of", lambda _: Mount("/dev/vda", Path("/"), "/", "ext4"))
    monkeypatch.setattr(targets, "needed_by_mount", lambda *_: Needed((), ()))


def problems(tree: Path, *lines: str) -> list[str]:
    try:
        check(parse("\n".join(lines), FILE), tree)
    except ConfigError as error:
        return list(error.lines)
    return []


def test_a_good_one_is_good(module_tree: Path, tmp_path: Path) -> None:
    program = program_of(tmp_path / "program", "true")
    key = tmp_path / "key"
    key.touch(mode=0o600)
    assert problems(
        module_tree, "ext4 LABEL=good", f"kdump_pre {program}", f"kdump_post {program}", f"extra_bins {program}",
        "extra_modules virtio-blk ext4 crc32c", f"sshkey {key}", f"notify command {program}", "notify mail root",
    ) == []  # fmt: skip
    assert problems(module_tree, "ext3 LABEL=good") == []  # one driver mounts both


def test_each_target_that_cannot_be_saved_to_is_named(module_tree: Path) -> None:
    assert problems(module_tree, "", "ext4 LABEL=gone", "ext4 LABEL=good", "ext4 LABEL=luks", "xfs LABEL=good") == [
        "/etc/vmcapture.conf:2: LABEL=gone: no block device of this machine carries it now",
        "/etc/vmcapture.conf:4: LABEL=luks stands on something",
    ]
    assert problems(module_tree, "xfs LABEL=good") == [
        "/etc/vmcapture.conf:1: xfs LABEL=good: there is ext4 on it; write ext4 LABEL=good"
    ]


def test_without_a_target_the_directory_has_to_be_on_a_disk(module_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Mount) -> Needed:
        raise ImageError("/run is a tmpfs without a block device")

    assert problems(module_tree, "path /srv") == []
    monkeypatch.setattr(targets, "needed_by_mount", refuse)
    (said,) = problems(module_tree, "", "path /run/x")
    assert said == (
        "/etc/vmcapture.conf:2: no target is named, and /run/x is no place for a dump: "
        "/run is a tmpfs without a block device"
    )
    assert problems(module_tree, "keep 3")[0].startswith("/etc/vmcapture.conf: no target is named, and /var/crash is")
    check_image(parse("path /run/x", FILE), module_tree)  # targets are not the image's


def test_the_root_file_system_as_the_last_target(module_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("ext4 LABEL=good", "failure_action dump_to_rootfs")
    monkeypatch.setattr(targets, "named_mount", lambda _: "UUID=1")
    assert problems(module_tree, *lines) == []
    monkeypatch.setattr(devices, "mount_of", lambda _: Mount("/dev/vda", Path("/"), "/@", "btrfs"))
    (said,) = problems(module_tree, *lines)
    assert said.startswith(
        "/etc/vmcapture.conf:2: failure_action dump_to_rootfs: the root file system (/dev/vda, btrfs)"
    )
    monkeypatch.setattr(devices, "mount_of", lambda path: Mount(f"/dev/{path.name}", path, "/", "ext4"))
    monkeypatch.setattr(targets, "named_mount", lambda mount: f"UUID={mount.device}")
    (said,) = problems(module_tree, *lines[1:])
    assert said.startswith("/etc/vmcapture.conf:1: failure_action dump_to_rootfs: /var/crash is on another file system")


def test_a_builder_that_this_machine_does_not_have(module_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("initramfs.tools.find", lambda _: None)
    assert problems(module_tree, "ext4 LABEL=good", "image_builder initramfs-tools") == [
        "/etc/vmcapture.conf:2: image_builder initramfs-tools: mkinitramfs was not found: install initramfs-tools"
    ]
    assert problems(module_tree, "ext4 LABEL=good", "image_builder vmcapture") == []


def test_programs_modules_and_keys_that_are_not_there(module_tree: Path, tmp_path: Path) -> None:
    script = program_of(tmp_path / "script", "true")
    script.chmod(0o644)
    odd = tmp_path / "odd"
    odd.write_text("#!/no/such/interpreter\n")
    odd.chmod(0o755)
    key = tmp_path / "key"
    key.touch()
    key.chmod(0o640)
    found = problems(
        module_tree, "ext4 LABEL=good", f"kdump_pre {script}", f"kdump_post {odd}", "extra_bins /bin/sh /no/such",
        "extra_modules xsf", "recipients /no/such", "notify command /no/such", "extra_modules zzz",
    )  # fmt: skip
    (keys,) = [line for line in found if line.startswith(f"{FILE}:6: ")]
    assert "/no/such" in keys
    assert [line.partition(": ")[2] for line in found if line != keys] == [
        f"kdump_pre {script}: it may not be executed: chmod +x {script}",
        f"kdump_post {odd}: its interpreter /no/such/interpreter was not found",
        "extra_bins /no/such: no such file",
        f"extra_modules xsf: {module_tree} has no such module; is xfs meant?",
        f"extra_modules zzz: {module_tree} has no such module; lsmod names those in use",
        "notify command /no/such: no such file",
    ]
    assert found[3].startswith(f"{FILE}:5: ")
    assert found[4].startswith(f"{FILE}:8: ")


def test_a_key_that_ssh_would_not_take(module_tree: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    ssh = "ssh a@b"
    (said,) = [line for line in problems(module_tree, ssh, f"sshkey {key}") if "sshkey" in line]
    assert said == (
        f"{FILE}:2: sshkey {key}: no such file; make one, ssh-keygen -t ed25519 -N '' -f {key}, and send it there, "
        f"ssh-copy-id -i {key} a@b"
    )
    key.touch()
    key.chmod(0o640)
    (said,) = [line for line in problems(module_tree, ssh, f"sshkey {key}") if "sshkey" in line]
    assert said == f"{FILE}:2: sshkey {key}: others may read it: chmod 600 {key}"
    assert not [line for line in problems(module_tree, "ext4 LABEL=good", f"sshkey {key}") if "sshkey" in line]


def test_modules_of_a_kernel_that_is_not_there(tmp_path: Path) -> None:
    (said,) = problems(tmp_path / "none", "ext4 LABEL=good", "extra_modules xfs")
    assert said.startswith(f"{FILE}:2: extra_modules: {tmp_path}/none: no such module directory")
