"""What an image needs to encrypt: tried with the real age, refused with a line."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import pytest

from capture.errors import UsageError
from initramfs import cli, encryption, tools
from initramfs.encryption import Encryption
from initramfs.errors import ImageError, ToolError
from tests.encryption import Key

from .conftest import need_image_tools
from .test_image import unpack


@pytest.fixture
def fake_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``age`` of its own in a directory that is on PATH; it does nothing yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "age").write_text("#!/bin/sh\nexit 0\n")
    (folder / "age").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder / "age"


def test_the_keys_and_age_go_into_the_image(key: Key) -> None:
    found = encryption.encryption(key.recipients)
    assert found.files == (("/etc/vmcapture/recipients", key.recipients),)
    assert [path.name for path in found.binaries] == ["age"]


def test_without_recipients_nothing_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "RECIPIENTS", tmp_path / "none")
    assert encryption.encryption(None) == Encryption()


def test_those_of_this_machine_are_taken_when_nobody_names_others(
    key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image that is built again after a kernel update must not forget them; nor because they cannot be read."""
    monkeypatch.setattr(encryption, "RECIPIENTS", key.recipients)
    assert encryption.encryption(None).files == ((str(key.recipients), key.recipients),)
    monkeypatch.setattr(encryption, "RECIPIENTS", tmp_path / "link")
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(UsageError, match="the recipients cannot be read"):
        encryption.encryption(None)


def test_a_secret_key_never_gets_into_an_image(key: Key) -> None:
    with pytest.raises(UsageError, match=r"key\.txt, line 3: is a secret key"):
        encryption.encryption(key.secret)


def test_a_line_that_age_does_not_know_is_named(key: Key) -> None:
    key.recipients.write_text(key.recipients.read_text() + "age1nonsense\n")
    with pytest.raises(ImageError, match=r"recipients: age failed: .*malformed recipient at line 3$"):
        encryption.encryption(key.recipients)


def test_without_age_the_package_is_named(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "SYSTEM_DIRECTORIES", "")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ToolError, match=r"^age was not found: install age$"):
        encryption.encryption(key.recipients)


@pytest.mark.parametrize("script", ["exit 0", "cat", "echo age-encryption.org/v1; cat"])
def test_a_program_that_does_not_encrypt_is_not_taken_for_age(script: str, key: Key, fake_age: Path) -> None:
    fake_age.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{script}\n")
    with pytest.raises(ImageError, match="did not encrypt what it was given to try; is that age"):
        encryption.encryption(key.recipients)


def test_plugins_of_this_machine_are_not_tried(key: Key, fake_age: Path) -> None:
    """The image has none: what needs one would be lost."""
    fake_age.write_text('#!/bin/sh\necho "age-encryption.org/v1 $PATH"\n[ "$PATH" = /none ]\n')
    assert encryption.encryption(key.recipients).files


def test_an_age_that_lies_elsewhere_is_found_in_the_image(key: Key, fake_age: Path) -> None:
    fake_age.write_text("#!/bin/sh\necho age-encryption.org/v1\n")
    found = encryption.encryption(key.recipients)
    assert found.files == (("/etc/vmcapture/recipients", key.recipients), ("/usr/bin/age", fake_age))


def test_the_image_has_the_keys_and_an_age_that_runs(
    module_tree: Path, tmp_path_factory: pytest.TempPathFactory, key: Key, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unpacked, and used as in the capture kernel: with nothing of this machine."""
    need_image_tools()
    folder = tmp_path_factory.mktemp("image")
    arguments = ["initramfs", "-o", str(folder / "x.img"), "--modules-dir", str(module_tree), "--module", "virtio-blk"]
    assert cli.main([*arguments, "--no-squashfs", "--recipients", str(key.recipients)]) == 0
    assert f"what it saves is encrypted to the keys in {key.recipients}" in capsys.readouterr().err
    root = unpack(gzip.decompress((folder / "x.img").read_bytes()), folder / "root")
    assert (root / "etc/vmcapture/recipients").read_bytes() == key.recipients.read_bytes()
    assert b"SECRET" not in b"".join(path.read_bytes() for path in (root / "etc").rglob("*") if path.is_file())
    trial = subprocess.run(
        ["chroot", root, "/usr/bin/age", "-R", "/etc/vmcapture/recipients"],
        input=b"x", capture_output=True, check=False,
    )  # fmt: skip
    if trial.returncode and b"chroot" in trial.stderr:
        pytest.skip("chroot needs root")
    (folder / "file").write_bytes(trial.stdout)
    assert key.open(folder / "file") == (0, b"x")
