"""The rehearsal: real files on the target, and a guest that is this machine as far as one can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import zstandard

from capture.errors import CaptureError
from initramfs import measure, places, qemu, targets
from initramfs.errors import ImageError, MeasureError, NotSavedError, ToolError
from initramfs.image import ImageRequest
from initramfs.kexec import CrashKernel, Loaded
from initramfs.measure import Run
from initramfs.reach import Target
from initramfs.rehearsal import Request, options_of, rehearse
from initramfs.status import BAD, DOUBT, GOOD, Check, Status, Wanted
from initramfs.wishes import Wishes
from tests.faults import tmpfs

LINE = (
    "console=ttyS0 nr_cpus=4 vmcapture.target=/dev/vdz vmcapture.path=/crash vmcapture.final=reboot "
    "vmcapture.failure=shell vmcapture.level=17,31 vmcapture.keep=3 vmcapture.wait=90"
)


REAL_LABORATORY = measure.Laboratory


class Laboratory:
    """Stands in for the guests: keeps what was asked for."""

    asked: measure.Request
    outcome: Run | CaptureError = Run(256 << 20, 200 << 20, 90 << 20, 40 << 20)
    drivers = ("megaraid_sas",)
    accelerators = ("tcg",)

    def __init__(self, request: measure.Request, _scratch: Path, _say: Callable[[str], object]) -> None:
        Laboratory.asked = request

    def crash(self, reservation: int) -> Run:
        assert reservation == 256 << 20
        if isinstance(self.outcome, CaptureError):
            raise self.outcome
        return self.outcome


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """A machine that is armed, whose target is a directory."""
    for name in ("vmlinuz", "image"):
        (tmp_path / name).write_bytes(b"x" * 100)
    (tmp_path / "target").mkdir()
    monkeypatch.setattr(measure, "Laboratory", Laboratory)
    monkeypatch.setattr(Laboratory, "outcome", Run(256 << 20, 200 << 20, 90 << 20, 40 << 20))
    monkeypatch.setattr("initramfs.devices.find_device", lambda _: Path("/dev/vdz"))
    monkeypatch.setattr(places, "mounted", lambda _device, path: tmp_path / "target" / path.lstrip("/"))
    state = Status(
        armed=True,
        reservation=256 << 20,
        loaded=Loaded(str(tmp_path / "vmlinuz"), str(tmp_path / "image"), LINE, "file"),
        checks=(Check("reservation", GOOD, "enough"), Check("service", DOUBT, "not enabled", "enable it")),
        targets=(Target("/dev/vdz", True, "/dev/vdz"),),
    )
    image = ImageRequest(tmp_path / "image", "6.1", tmp_path, ())
    kernel = CrashKernel(tmp_path / "vmlinuz", tmp_path / "image", LINE)
    return Request(state, Wanted(lambda _: image, lambda: kernel), wishes=Wishes(ssh_key=tmp_path / "key"))


def checks(request: Request) -> dict[str, Check]:
    return {check.name: check for check in rehearse(request, lambda _: None).checks}


def test_all_that_can_be_tried_is_tried(request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "accelerators", lambda: ("tcg",))
    found = checks(request_)
    assert {name: check.state for name, check in found.items()} == {
        "service": DOUBT, "image": GOOD, "target": GOOD, "guest": GOOD,
    }  # fmt: skip
    assert found["target"].what == "/dev/vdz: a file was written to /crash, read back and removed"
    assert list((tmp_path / "target").iterdir()) == [], "what was made is gone again"
    assert found["guest"].what.endswith("90 MiB were left at the least; without the devices of megaraid_sas")
    asked = Laboratory.asked
    assert (asked.kernel, asked.image, asked.first, asked.cpus) == (
        tmp_path / "vmlinuz", tmp_path / "image", 256 << 20, 1,
    )  # fmt: skip
    assert asked.append == "vmcapture.level=17,31 vmcapture.keep=3"
    monkeypatch.setattr(qemu, "accelerators", lambda: ("kvm", "tcg"))
    rehearse(request_, lambda _: None)
    assert Laboratory.asked.cpus == 4, "as on this machine, where that does not take hours"
    result = rehearse(request_, lambda _: None)
    assert result.exit_status == 3
    assert result.lines()[0] == "what could be tried went well; not all could"


def test_when_all_went_well_it_says_so(request_: Request) -> None:
    request = replace(request_, state=replace(request_.state, checks=()))
    assert rehearse(request, lambda _: None).lines()[0] == "the rehearsal went well"


def test_a_directory_that_was_there_stays(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "target/crash").mkdir()
    assert checks(request_)["target"].state == GOOD
    assert list((tmp_path / "target/crash").iterdir()) == []


def test_a_machine_without_a_target_does_not_pass(request_: Request) -> None:
    none = Check("target", BAD, "no target is named: the capture kernel would not know where to save", "vmcapture arm")
    request = replace(request_, state=replace(request_.state, targets=(), checks=(none,)))
    assert checks(request)["target"] == none
    assert rehearse(request, lambda _: None).exit_status == 1


def test_directories_that_were_made_for_a_file_that_cannot_be_are_gone(request_: Request, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "target", "size=64k,nr_inodes=2") as full:  # its root, and one directory
        check = checks(request_)["target"]
        assert (check.state, check.what) == (BAD, "/dev/vdz: No space left on device")
        assert list(full.iterdir()) == []


def test_a_target_that_cannot_be_written_is_bad(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "target/crash").write_text("a file")
    result = rehearse(request_, lambda _: None)
    (check,) = [check for check in result.checks if check.name == "target"]
    assert check.state == BAD
    assert check.what.startswith("/dev/vdz: ")
    assert result.exit_status == 1
    assert result.lines()[0] == "a crash would not be saved"


def test_a_disk_that_is_not_there_is_bad(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("initramfs.devices.find_device", lambda _: None)
    assert checks(request_)["target"].state == BAD


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        (NotSavedError("out of memory"), BAD),
        (MeasureError("the guest did not come to its crash"), DOUBT),
        (ToolError("qemu-system-x86_64 was not found: install qemu-system-x86"), DOUBT),
    ],
)
def test_a_guest_that_saved_nothing_is_bad_and_none_at_all_a_doubt(
    outcome: CaptureError, state: str, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Laboratory, "outcome", outcome)
    check = checks(request_)["guest"]
    assert check.state == state
    assert check.what.endswith(str(outcome))


def test_an_image_of_a_distribution_is_a_doubt_that_says_what_to_do(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "Laboratory", REAL_LABORATORY)
    (tmp_path / "image").write_bytes(zstandard.compress(b"070701"))
    check = checks(request_)["guest"]
    assert (check.state, check.what) == (DOUBT, f"no guest was crashed: {measure.OTHER_BUILDER}")


def test_without_a_guest_there_is_none(request_: Request) -> None:
    assert "guest" not in checks(replace(request_, guest=False))


def test_an_image_that_could_not_be_built_now_is_bad(request_: Request) -> None:
    def fail(_: Path) -> NoReturn:
        raise ImageError("ssh:kdump@server: the server's host key is not the one that was pinned")

    found = checks(replace(request_, wanted=replace(request_.wanted, image=fail)))
    assert found["image"].state == BAD
    assert "host key" in found["image"].what
    assert found["guest"].state == GOOD, "what is loaded is tried all the same"


def test_a_machine_that_is_not_armed_has_nothing_to_rehearse(request_: Request) -> None:
    bare = Status(False, 0, None, (Check("reservation", BAD, "no memory is reserved"),))
    assert [check.name for check in rehearse(replace(request_, state=bare), lambda _: None).checks] == ["reservation"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nfs:server:/export", "a file was written to /crash and removed"),
        ("virtiofs:dumps", "a file was written to it and removed"),
        ("raw:/dev/vdz1", "it is there, and nothing is on it that would be lost; nothing was written"),
    ],
)
def test_what_is_on_no_local_file_system_is_tried_as_when_an_image_is_built(
    target: str, said: str, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(targets, "needed_by", lambda *asked: tried.append(asked))
    request = replace(request_, state=replace(request_.state, targets=(Target(target, True, ""),)))
    assert checks(request)["target"].what == f"{target}: {said}"
    assert tried == [(target, Wishes("/crash", tmp_path / "key", check=True))]


def test_a_target_that_fails_its_trial_is_bad(request_: Request) -> None:
    state = replace(request_.state, targets=(Target("ssh:kdump@127.0.0.1:1", True, ""),))
    check = checks(replace(request_, state=state))["target"]
    assert (check.state, check.what.count("ssh:kdump@127.0.0.1:1")) == (BAD, 1)


def test_a_link_that_the_capture_kernel_would_not_follow_is_bad(request_: Request, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target/crash").symlink_to(tmp_path / "elsewhere")
    check = checks(request_)["target"]
    assert check.state == BAD
    assert f"crash is a symbolic link to {tmp_path}/elsewhere, which is not followed" in check.what
    (tmp_path / "target/crash").unlink()
    (tmp_path / "target/crash").symlink_to("there")
    (tmp_path / "target/there").mkdir()
    assert checks(request_)["target"].state == GOOD


def test_a_guest_is_told_what_is_not_the_machines_own() -> None:
    assert options_of("quiet vmcapture.target=a vmcapture.compress=zlib vmcapture.deadline=60") == (
        "vmcapture.compress=zlib vmcapture.deadline=60"
    )
