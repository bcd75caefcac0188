"""What other programs were told, made into vmcapture.conf: each setting carried over, or named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from initramfs import config_import
from initramfs.config import Config, ConfigError, parse
from initramfs.config_import import Imported, import_files, usual_files
from initramfs.peer_settings import KDUMP_TOOLS, KDUMP_UTILS

from .conftest import program_of

DEBIAN_12 = """\
USE_KDUMP=1
KDUMP_KERNEL=/var/lib/kdump/vmlinuz
KDUMP_INITRD=/var/lib/kdump/initrd.img
KDUMP_COREDIR="/var/crash"
#KDUMP_FAIL_CMD="reboot -f"
#KDUMP_NUM_DUMPS=
"""
"""What Debian 12's /etc/default/kdump-tools sets."""
FEDORA = """\
KDUMP_KERNELVER=""
KDUMP_COMMANDLINE=""
KDUMP_COMMANDLINE_REMOVE="hugepages hugepagesz slub_debug quiet log_buf_len swiotlb hugetlb_cma ignition.firstboot"
KDUMP_COMMANDLINE_APPEND="novmcoredd hugetlb_cma=0 irqpoll nr_cpus=1 reset_devices cgroup_disable=memory mce=off \
numa=off udev.children-max=2 panic=10 acpi_no_memhotplug transparent_hugepage=never nokaslr hest_disable cma=0"
KEXEC_ARGS="-s"
#KDUMP_BOOTDIR="/boot"
KDUMP_IMG="vmlinuz"
KDUMP_IMG_EXT=""
VMCORE_CREATION_NOTIFICATION="yes"
"""
"""What Fedora's /etc/sysconfig/kdump sets on x86_64, shortened."""


def taken(tmp_path: Path, text: str, name: str = "kdump-tools") -> tuple[Imported, Config]:
    file = tmp_path / name
    file.write_text(text)
    found = import_files([file], tmp_path / "hooks")
    return found, parse(found.text(), Path("new"))


def test_debians_file_as_it_is_delivered(tmp_path: Path) -> None:
    found, config = taken(tmp_path, DEBIAN_12)
    assert found.lost == []
    assert config.path == "/var/crash"
    assert (config.failure, config.final, config.targets, config.keep) == ("reboot", "reboot", (), None)
    (note,) = found.notes
    assert "MAKEDUMP_ARGS is not set" in note


def test_fedoras_files_as_they_are_delivered(tmp_path: Path) -> None:
    found, config = taken(tmp_path, FEDORA, "kdump")
    assert found.lost == []
    assert config.remove == ("ignition.firstboot",)
    assert config.append == "hugetlb_cma=0 nokaslr hest_disable cma=0"
    assert config.syscall == "file"
    assert [note.split(": ")[2] for note in found.notes] == [
        "nr_cpus=1",
        "udev.children-max=2",
        "whom to tell of a crash is `notify`",
    ]


@pytest.mark.parametrize(
    ("line", "directives"),
    [
        ('KDUMP_COREDIR="/srv//crash/"', ["path /srv//crash/"]),
        ("KDUMP_NUM_DUMPS=5", ["keep 5"]),
        ("KDUMP_NUM_DUMPS=0", []),
        ('MAKEDUMP_ARGS="-c -d 31"', ["level 31", "compress zlib"]),
        ('MAKEDUMP_ARGS="-d 17,31"\nKDUMP_COMPRESSION=gzip', ["level 17,31", "compress zstd:auto"]),
        ('MAKEDUMP_ARGS="-d 17"', ["level 17", "compress none"]),
        ('KDUMP_CMDLINE_APPEND="reset_devices irqpoll nr_cpus=1 usbcore.nousb"', ["append usbcore.nousb"]),
        ('KDUMP_CMDLINE_APPEND="nr_cpus=4 maxcpus=4"', ["cpus 4"]),
        ('KDUMP_CMDLINE="console=ttyS0 ro"', ["command_line_base console=ttyS0 ro"]),
        ('KDUMP_KEXEC_ARGS="-c"', ["syscall load"]),
        ("SSH=root@db", ["ssh root@db", "sshkey /root/.ssh/kdump_id_rsa"]),
        ("SSH=root@db\nSSH_KEY=/k", ["ssh root@db", "sshkey /k"]),
        ("NFS=db:/srv\nKDUMP_COREDIR=/var/crash", ["nfs db:/srv", "path /"]),
        ("NFS=db:/srv\nSSH=a@b\nSSH_KEY=/k\nKDUMP_COREDIR=/x", ["ssh a@b", "sshkey /k", "nfs db:/srv", "path /x"]),
        ("export SSH_KEY=/k", ["sshkey /k"]),
    ],
)  # fmt: skip
def test_what_kdump_tools_settings_come_to(line: str, directives: list[str], tmp_path: Path) -> None:
    found, _ = taken(tmp_path, f"USE_KDUMP=1\n{line}\n")
    assert found.lost == []
    assert sorted(found.directives) == sorted([*directives, "failure_action reboot"])


@pytest.mark.parametrize(
    ("command", "action"),
    [
        ("reboot -f", "reboot"),
        ("/sbin/halt", "halt"),
        ("poweroff -f", "poweroff"),
        ("echo 'makedumpfile FAILED.'; /bin/bash; reboot -f", "shell"),
    ],
)
def test_what_follows_a_failure(command: str, action: str, tmp_path: Path) -> None:
    found, config = taken(tmp_path, f'KDUMP_FAIL_CMD="{command}"\n')
    assert config.failure == action
    assert found.lost == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("KDUMP_KERNEL=/boot/vmlinuz-debug", "KDUMP_KERNEL: another kernel than the running one"),
        ("KDUMP_INITRD=/boot/initrd", "KDUMP_INITRD: the image is our own"),
        ("KDUMP_FAIL_CMD=page-me", "KDUMP_FAIL_CMD: page-me: a command of one's own"),
        ("KDUMP_COREDIR=crash", "KDUMP_COREDIR: path crash: a directory is named from / on"),
        ("KDUMP_NUM_DUMPS=many", "KDUMP_NUM_DUMPS: keep many: a number from 1"),
        ('MAKEDUMP_ARGS="-E -d 31"', "MAKEDUMP_ARGS: makedumpfile -E:"),
        ('MAKEDUMP_ARGS="-d 31 \'"', "MAKEDUMP_ARGS: -d 31 ': a quote is missing its other half"),
        ('KDUMP_KEXEC_ARGS="--reuse-cmdline"', "KDUMP_KEXEC_ARGS: --reuse-cmdline: kexec is not given other options"),
        ("KDUMP_COREDIRR=/x", "KDUMP_COREDIRR: no setting of this file; is KDUMP_COREDIR meant?"),
        ("MINE=1", "MINE: no setting of this file"),
        ("FTP=ftp.example.org:/up\nFTP_PASSWORD=secret\nSSH=a@b", "FTP: there is no FTP"),
        ("KDUMP_CMDLINE_APPEND='a#b'", "KDUMP_CMDLINE_APPEND: append a#b: # begins a comment"),
    ],
)
def test_what_means_something_and_cannot_be_had_is_lost_by_name(line: str, what: str, tmp_path: Path) -> None:
    found, _ = taken(tmp_path, f"USE_KDUMP=1\n{line}\n")
    (lost,) = found.lost
    assert lost.startswith(f"{tmp_path}/kdump-tools:2: {what}")
    assert f"#   {lost}" in found.text()
    assert "secret" not in found.text()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("HOSTTAG=ip", "HOSTTAG: a crash's directory begins with the host's name"),
        ("KDUMP_DUMP_DMESG=0", "KDUMP_DUMP_DMESG: the log is always saved"),
        ("USE_KDUMP=0", "USE_KDUMP: kdump-tools was switched off"),
        ("NFS_TIMEO=600", "NFS_TIMEO: how long a target may give no answer is `timeout SECONDS`"),
        ("SSH=a@b\nKDUMP_NUM_DUMPS=3", "KDUMP_NUM_DUMPS: kdump-tools removes nothing on another machine"),
        ("KDUMP_CMDLINE_APPEND=systemd.unit=x.service", "KDUMP_CMDLINE_APPEND: systemd.unit=x.service: nothing in the"),
    ],
)
def test_what_needs_nothing_is_said(line: str, what: str, tmp_path: Path) -> None:
    found, _ = taken(tmp_path, f"KDUMP_COREDIR=/x\n{line}\n")
    assert found.lost == []
    assert any(f": {what}" in note for note in found.notes)


def test_no_dump_goes_to_another_place_than_before(tmp_path: Path) -> None:
    for text, what in (
        ("FTP=ftp.example.org:/up\n", "SSH=USER@ftp.example.org"),
        ("SSH=root@\n", "named USER@HOST"),
        ("NFS=db\n", "named SERVER:/EXPORT"),
    ):
        with pytest.raises(ConfigError) as refused:
            taken(tmp_path, text)
        assert what in refused.value.lines[0]
        assert refused.value.lines[-1].startswith("nothing was written")
    with pytest.raises(ConfigError, match="nothing was written"):
        taken(tmp_path, "path /x\nraw LABEL=x\n", "kdump.conf")


def test_a_kdump_conf_is_taken_line_by_line(tmp_path: Path) -> None:
    for folder, name in (("pre.d", "10-a"), ("post.d", "b"), ("emergency.d", "c")):
        (tmp_path / "hooks" / folder).mkdir(parents=True)
        program_of(tmp_path / "hooks" / folder / name, "true")
    found, config = taken(
        tmp_path,
        "auto_reset_crashkernel yes\nxfs UUID=1 # disk\ncore_collector makedumpfile -l -d 31\nkdump_post /post\n"
        "kdump_pre /pre\nkdump_emergency /x\ndefault shell\nflurb\n",
        "kdump.conf",
    )  # fmt: skip
    assert config.targets == ("UUID=1",)
    assert config.filesystems == {"UUID=1": "xfs"}
    assert config.pre == (Path("/pre"), tmp_path / "hooks/pre.d/10-a")
    assert config.post == (tmp_path / "hooks/post.d/b", Path("/post"))
    assert config.failure == "shell"
    assert [line.split(": ")[0].rpartition(":")[2] for line in found.lost[:2]] == ["6", "8"]
    assert "emergency.d/c" in found.lost[2]
    assert any("auto_reset_crashkernel" in note for note in found.notes)
    assert taken(tmp_path, "path /x\n", "kdump.conf")[1].failure == "reboot"


def test_both_of_fedoras_files_together(tmp_path: Path) -> None:
    (tmp_path / "kdump").write_text(FEDORA)
    (tmp_path / "kdump.conf").write_text("path /srv\next4 LABEL=x\n")
    found = import_files([tmp_path / "kdump", tmp_path / "kdump.conf"], tmp_path / "none")
    config = parse(found.text(), Path("new"))
    assert (config.path, config.targets, config.syscall) == ("/srv", ("LABEL=x",), "file")
    assert found.text().startswith(
        f"# Made by vmcapture config import from {tmp_path}/kdump and {tmp_path}/kdump.conf."
    )


def test_what_would_run_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kdump-tools:1: the value is computed when the file is run"):
        taken(tmp_path, f"KDUMP_COREDIR=$(touch {tmp_path}/made)\n")
    assert not (tmp_path / "made").exists()


def test_which_files_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from capture.errors import UsageError

    for name in ("DEBIAN", "SYSCONFIG", "KDUMP_CONF"):
        monkeypatch.setattr(config_import, name, tmp_path / name)
    with pytest.raises(UsageError, match="neither"):
        usual_files()
    (tmp_path / "KDUMP_CONF").touch()
    (tmp_path / "SYSCONFIG").touch()
    assert usual_files() == [tmp_path / "SYSCONFIG", tmp_path / "KDUMP_CONF"]
    (tmp_path / "DEBIAN").touch()
    with pytest.raises(UsageError, match="name the file that counts"):
        usual_files()


def test_suses_file_of_the_same_name_is_refused_for_its_target_would_be_lost(tmp_path: Path) -> None:
    file = tmp_path / "kdump"
    file.write_text('KDUMP_SAVEDIR="ssh://dumps.example/crash"\nKDUMP_COMMANDLINE_APPEND="x"\nKDUMP_COMMANDLINE=""\n')
    with pytest.raises(ConfigError, match=f"{file}: KDUMP_SAVEDIR is SUSE's, .*write its target into"):
        import_files([file])


def test_a_file_of_nobodys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a file of kdump-tools"):
        taken(tmp_path, "Hello\n", "letter")
    with pytest.raises(ConfigError, match="No such file"):
        import_files([tmp_path / "none"])


VALUE = st.text("abc/:@ .-#\"'$;=1\\\n", max_size=10)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.dictionaries(st.sampled_from(sorted(KDUMP_TOOLS) + sorted(KDUMP_UTILS)), VALUE, min_size=1, max_size=6)
)
def test_whatever_is_set_is_a_directive_or_is_named(values: dict[str, str], tmp_path: Path) -> None:
    """No value of any setting makes a file that the parser refuses; each has left something behind, or is usual."""
    text = "".join("{}='{}'\n".format(name, value.replace("'", "'\\''")) for name, value in values.items())
    try:
        found, _ = taken(tmp_path, text)
    except ConfigError as error:
        assert not any("the new file" in line for line in error.lines)  # noqa: PT017
        return
    assert not any("\n" in line for line in found.directives)
    uncommented = [line for line in found.text().splitlines() if not line.startswith("#")]
    assert uncommented == found.directives


def test_what_nobody_has_written_is_no_configuration(tmp_path: Path) -> None:
    """/dev/zero has no end, and a program has lines that look like directives."""
    with pytest.raises(ConfigError, match="/dev/zero: more than 1 MiB"):
        import_files([Path("/dev/zero")])
    (tmp_path / "program").write_bytes(b"\x7fELF\0\nappend a\n")
    with pytest.raises(ConfigError, match="/program: not a text"):
        import_files([tmp_path / "program"])
