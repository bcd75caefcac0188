"""vmcapture.conf: kdump.conf's syntax and meaning, and every mistake in it named at once."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capture.boot.config import parse as parse_words
from initramfs import config, directives
from initramfs.config import Config, ConfigError, parse, read_config
from initramfs.directives import DIRECTIVES, REPEATED
from initramfs.kexec import capture_command_line

FILE = Path("/etc/vmcapture.conf")


def parsed(*lines: str) -> Config:
    return parse("\n".join(lines), FILE)


def refused(*lines: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parsed(*lines)
    assert caught.value.exit_status == 2
    return caught.value.lines


# --- what is understood ---------------------------------------------------------------------------------------------


def test_a_usual_kdump_conf_works_as_it_is() -> None:
    """The directives that kdump-utils delivers uncommented, and those that people switch on."""
    found = parsed(
        "# a comment",
        "   # another one",
        "auto_reset_crashkernel yes",
        "path /var/crash",
        "core_collector makedumpfile -l --message-level 7 -d 31",
        "ext4 UUID=03138356-5e61-4ab3-b58e-27507ac41937   # the disk",
        "kdump_post /var/crash/scripts/kdump-post.sh",
        "kdump_pre /var/crash/scripts/kdump-pre.sh",
        "extra_bins /usr/bin/lftp /usr/bin/tar",
        "extra_modules gfs2 nvme-tcp",
        "failure_action shell",
        "force_rebuild 1",
        'dracut_args --omit-drivers "cfg80211 snd" --add-drivers "ext2 ext3"',
        "fence_kdump_args -p 7410 -f auto -c 0 -i 10",
    )
    assert found.targets == ("UUID=03138356-5e61-4ab3-b58e-27507ac41937",)
    assert found.filesystems == {found.targets[0]: "ext4"}
    assert (found.path, found.levels, found.compress) == ("/var/crash", "31", "zstd:auto")
    assert (found.failure, found.final) == ("shell", "reboot")
    assert found.pre == (Path("/var/crash/scripts/kdump-pre.sh"),)
    assert found.post == (Path("/var/crash/scripts/kdump-post.sh"),)
    assert found.extra_bins == (Path("/usr/bin/lftp"), Path("/usr/bin/tar"))
    assert found.extra_modules == ("gfs2", "nvme-tcp", "ext2", "ext3")
    assert [note.split(": ")[1].split()[0] for note in found.notes if "core_collector" not in note] == [
        "auto_reset_crashkernel", "force_rebuild", "dracut_args", "fence_kdump_args",
    ]  # fmt: skip
    assert found.where("path") == "/etc/vmcapture.conf:4"
    assert found.where("extra_modules", "ext3") == "/etc/vmcapture.conf:13"
    assert found.where("target", found.targets[0]) == "/etc/vmcapture.conf:6"


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("xfs LABEL=/boot", "LABEL=/boot"),
        ("ext4 /dev/vg/lv_kdump", "/dev/vg/lv_kdump"),
        ('btrfs UUID="12"', "UUID=12"),
        ("minix /dev/fd0", "/dev/fd0"),
        ("raw /dev/vg/lv_kdump", "raw:/dev/vg/lv_kdump"),
        ("raw PARTUUID=12-34", "raw:PARTUUID=12-34"),
        ("nfs my.server.com:/export/tmp", "nfs:my.server.com:/export/tmp"),
        ("nfs [2001:db8::1:2:3:4]:/export/tmp", "nfs:[2001:db8::1:2:3:4]:/export/tmp"),
        ("ssh user@my.server.com", "ssh:user@my.server.com"),
        ("ssh user@2001:db8::1:2:3:4", "ssh:user@[2001:db8::1:2:3:4]"),
        ("ssh user@[2001:db8::1]:2222", "ssh:user@[2001:db8::1]:2222"),
        ("ssh user@host:22", "ssh:user@host"),
        ("ssh user@host:2222", "ssh:user@host:2222"),
        ("virtiofs myfs", "virtiofs:myfs"),
        ("target LABEL=crash", "LABEL=crash"),
        ("target nfs:a:/b", "nfs:a:/b"),
        ("target ssh:u@h", "ssh:u@h"),
        ("target raw:PARTUUID=1", "raw:PARTUUID=1"),
        ("target virtiofs:t", "virtiofs:t"),
        ('dracut_args --mount "/dev/sda1 /mnt/dump ext4 defaults"', "/dev/sda1"),
        ('dracut_args --mount "h:/e /mnt nfs4 defaults"', "nfs:h:/e"),
    ],
)
def test_each_kind_of_target_gets_its_word(line: str, target: str) -> None:
    assert parsed(line).targets == (target,)


def test_several_targets_keep_their_order() -> None:
    found = parsed("ssh a@b", "nfs c:/d", "ext4 LABEL=e", "nfs c:/d")
    assert found.targets == ("ssh:a@b", "nfs:c:/d", "LABEL=e")
    assert found.notes == ("/etc/vmcapture.conf:4: target nfs:c:/d: there already",)
    assert found.sshkey is None
    assert parsed("ssh a@b", "sshkey /root/.ssh/id").sshkey == Path("/root/.ssh/id")


def test_our_own_directives() -> None:
    found = parsed(
        "level 1,17,31", "compress zlib:9", "keep 5", "free 10%", "wait 60", "timeout 0", "deadline 3600",
        "watchdog 0", "cpus 4", "syscall load", "recipients /etc/keys", "append a b=1", "append c", "final_action halt",
        "command_line_base console=ttyS0 ro", "command_line_remove hugepages quiet", "notify mail root",
        "notify webhook https://example.org/hook?a=1", "notify command /usr/local/bin/tell",
        "image_builder dracut",
    )  # fmt: skip
    assert (found.levels, found.compress, found.keep, found.free) == ("1,17,31", "zlib:9", 5, "10%")
    assert (found.wait, found.timeout, found.deadline, found.watchdog, found.cpus) == (60, 0, 3600, 0, 4)
    assert (found.syscall, found.recipients, found.append, found.final) == (
        "load",
        Path("/etc/keys"),
        "a b=1 c",
        "halt",
    )
    assert found.image_builder == "dracut"
    assert (found.base_line, found.remove) == ("console=ttyS0 ro", ("hugepages", "quiet"))
    assert found.notify == (
        ("mail", "root"), ("webhook", "https://example.org/hook?a=1"), ("command", "/usr/local/bin/tell"),
    )  # fmt: skip
    assert found.where("notify", "root") == "/etc/vmcapture.conf:17"


def test_what_kdump_does_after_a_failure_where_nobody_says() -> None:
    assert (parsed("path /x").failure, parsed("path /x").final) == ("reboot", "reboot")
    assert parsed("default halt").failure == "halt"
    last = parsed("ext4 LABEL=a", "failure_action dump_to_rootfs", "final_action poweroff")
    assert (last.root_is_last_target, last.failure) == (True, "poweroff")


def test_no_file_says_nothing(no_configuration: Path) -> None:
    assert read_config() == Config()
    no_configuration.write_text("keep 3\n")
    assert read_config().keep == 3
    assert read_config().file == no_configuration


def test_quotes_blanks_tabs_and_line_ends() -> None:
    found = parsed('\tcore_collector\t"makedumpfile -c -d 31" \r', "path   /a//b/ # c\r", "append x=#y")
    assert (found.compress, found.path, found.append) == ("zlib", "/a/b", "x=")
    assert parsed("path /").path == "/"


# --- what is not ----------------------------------------------------------------------------------------------------

MISTAKES = {
    "ext2": ("ext2 sda1", "named UUID=…, LABEL=… or /dev/…"),
    "ext3": ("ext3 UUID=", "UUID of which file system?"),
    "ext4": ('ext4 LABEL="my disk"', "blanks and quotes do not survive"),
    "xfs": ("xfs /dev/../x", "named UUID=…, LABEL=… or /dev/…"),
    "btrfs": ("btrfs PARTUUID=1", "named UUID=…, LABEL=… or /dev/…"),
    "minix": ("minix", "its value is missing: minix UUID=…|LABEL=…|/dev/…"),
    "target": ("target nsf:a:/b", "no such kind of target; is nfs: meant?"),
    "raw": ("raw LABEL=a", "named PARTUUID=… or /dev/…"),
    "nfs": ("nfs server", "named SERVER:/EXPORT"),
    "ssh": ("ssh server", "named USER@HOST"),
    "sshkey": ("sshkey id_rsa", "named from / on"),
    "virtiofs": ("virtiofs a,b", "no blank, comma or slash"),
    "path": ("path var/crash", "named from / on"),
    "core_collector": ("core_collector makedumpfile -x", "-x: its value is missing"),
    "level": ("level 32", "a dump level is a number from 0 to 31"),
    "compress": ("compress lzo", "no such compression"),
    "failure_action": ("failure_action rebot", "is reboot meant?"),
    "default": ("default ignore", "not one of reboot, poweroff, halt, shell, dump_to_rootfs"),
    "final_action": ("final_action dump_to_rootfs", "not one of reboot, poweroff, halt, shell"),
    "kdump_pre": ("kdump_pre /bin/sh -c true", "without arguments"),
    "kdump_post": ("kdump_post post.sh", "named from / on"),
    "extra_bins": ("extra_bins /bin/ls tar", "extra_bins tar: a file is named from / on"),
    "extra_modules": ("extra_modules /lib/x.ko", "no name of a kernel module"),
    "keep": ("keep 0", "a number from 1 to 9999 is needed"),
    "free": ("free lots", "lots"),
    "wait": ("wait 3601", "a number from 0 to 3600 is needed"),
    "timeout": ("timeout -1", "a number from 0 to 3600 is needed"),
    "deadline": ("deadline 1h", "a number from 0 to 604800 is needed"),
    "watchdog": ("watchdog 5", "0, or a number from 10 to 3600 is needed"),
    "cpus": ("cpus 0", "a number from 1 to 8192 is needed"),
    "syscall": ("syscall kexec_load", "not one of file, load, auto"),
    "image_builder": ("image_builder mkinitrd", "not one of vmcapture, initramfs-tools, dracut"),
    "recipients": ("recipients age1abc", "named from / on"),
    "append": ("append", "its value is missing"),
    "command_line_base": ("command_line_base", "its value is missing"),
    "command_line_remove": ("command_line_remove", "its value is missing"),
    "notify": ("notify email root", "not one of mail, webhook, command; is mail meant?"),
    "auto_reset_crashkernel": ("auto_reset_crashkernel 1", "not one of yes, no"),
    "force_rebuild": ("force_rebuild yes", "not one of 0, 1"),
    "force_no_rebuild": ("force_no_rebuild yes", "not one of 0, 1"),
    "dracut_args": ("dracut_args --xz", "dracut's options are not taken over"),
    "fence_kdump_args": ("fence_kdump_args", "its value is missing"),
    "fence_kdump_nodes": ("fence_kdump_nodes a b", "call fence_kdump_send from a script"),
    "kdump_emergency": ("kdump_emergency /x", "use kdump_post"),
    "net": ("net a@b", "write nfs SERVER:/EXPORT, or ssh USER@HOST"),
    "options": ("options loop max_loop=1", "modprobe.d(5)"),
    "link_delay": ("link_delay 60", "write wait SECONDS"),
    "disk_timeout": ("disk_timeout 60", "write wait SECONDS"),
    "debug_mem_level": ("debug_mem_level 3", "manifest.json"),
    "blacklist": ("blacklist a b", "module_blacklist="),
}


def test_there_is_a_mistake_for_each_directive() -> None:
    assert MISTAKES.keys() == DIRECTIVES.keys()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_each_directive_is_one_clear_line(name: str) -> None:
    line, what = MISTAKES[name]
    (said,) = refused("", line)
    assert said.startswith(f"/etc/vmcapture.conf:2: {name}")
    assert what in said


@pytest.mark.parametrize("name", DIRECTIVES)
def test_a_typing_mistake_in_each_name_is_answered_with_the_name(name: str) -> None:
    typo = name[:-1] if len(name) > 5 else name + name[-1]
    (said,) = refused(f"{typo} x")
    assert re.fullmatch(rf"/etc/vmcapture\.conf:1: {typo}: no such directive; is \w+ meant\?", said)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("ssh root@", "named USER@HOST"),
        ("ssh root@a b", "blanks and quotes do not survive a kernel command line; write USER@HOST[:PORT]"),
        ("ssh @host", "named USER@HOST"),
        ("ssh -oProxyCommand=x@host", "named USER@HOST"),
        ("ssh root@-x", "no name or address"),
        ("ssh root@host:0", "from 1 to 65535"),
        ("ssh root@[fe80::1%eth0]:2222", "stands in brackets"),
        ("ssh root@[::::]", "no name or address"),
        ("nfs [1.2.3.4]:/x", "named SERVER:/EXPORT"),
        ("nfs a:/b,c", "named SERVER:/EXPORT"),
        ("nfs a:b", "named SERVER:/EXPORT"),
        ("nfs a:/b c", "blanks and quotes do not survive a kernel command line; write SERVER:/EXPORT"),
        ("path /a/../b", "without .."),
        ("path /my crash", "blanks and quotes do not survive"),
        ("compress zstd:99", "zstd:99"),
        ("notify mail -oX", "an address is needed"),
        ("notify mail a b", "an address is needed"),
        ("notify webhook ftp://x", "an address is needed"),
        ("notify command tell", "named from / on"),
        ("extra_bins /a/../b", "without .."),
        ('dracut_args --mount "x"', "name the target by its own directive"),
        ("dracut_args --add-drivers", "its value is missing"),
        ('dracut_args "x', "a quote is missing its other half"),
        ("path /x\x1b[2J", "cannot be printed"),
        ("PATH=/var/crash", "vmcapture config import"),
        ("keep=3", "a blank stands between a directive and its value: keep N"),
        ("flurb", "vmcapture.conf(5) names them all"),
        ("Keep 3", "is keep meant?"),
        ("failure-action reboot", "is failure_action meant?"),
    ],
)
def test_other_mistakes(line: str, what: str) -> None:
    (said,) = refused(line)
    assert said.startswith("/etc/vmcapture.conf:1: ")
    assert what in said


def test_all_mistakes_are_named_in_one_go_in_the_order_of_the_file() -> None:
    said = refused("pth /x", "keep 3", "keep 0", "level 31", "core_collector makedumpfile -c", "ssh x", "default halt",
                   "failure_action halt", "force_rebuild 1", "force_no_rebuild 1", "compress none")  # fmt: skip
    assert [line.split(": ")[0].rpartition(":")[2] for line in said] == ["1", "3", "5", "6", "8", "10", "11"]
    assert said[1].endswith("keep: already on line 2; leave one of them")
    assert "level and core_collector: both name the dump level" in said[2]
    assert "failure_action and default: they are the same directive" in said[4]
    assert "they forbid one another" in said[5]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for place, what in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=what) as caught:
            read_config(place)
        assert str(caught.value).endswith("; name another file")
    (tmp_path / "large").write_bytes(b"#" * (config.MAX_SIZE + 1))
    with pytest.raises(ConfigError, match="no configuration file"):
        read_config(tmp_path / "large")
    (tmp_path / "binary").write_bytes(b"path /\xff\xfe\nkeep 3\n")
    with pytest.raises(ConfigError, match="binary:1: path: a character in its value cannot be printed"):
        read_config(tmp_path / "binary")


# --- properties -----------------------------------------------------------------------------------------------------

LINES = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=30),
        st.builds("{} {}".format, st.sampled_from(sorted(DIRECTIVES)), st.text(max_size=20)),
        st.sampled_from([line for line, _ in MISTAKES.values()]),
    ),
    max_size=8,
)


@settings(deadline=None)
@given(LINES)
def test_any_text_is_a_configuration_or_lines_that_name_their_place(lines: list[str]) -> None:
    text = "\n".join(lines)
    try:
        found = parse(text, FILE)
    except ConfigError as error:
        count = text.count("\n") + 1
        for line in error.lines:
            place = re.match(r"/etc/vmcapture\.conf:(\d+): .", line)
            assert place is not None
            assert 1 <= int(place[1]) <= count
    else:
        assert all(number <= text.count("\n") + 1 for number in found.places.values())


def good_lines() -> st.SearchStrategy[list[tuple[str, str]]]:
    word = st.from_regex(r"[a-z][a-z0-9]{0,6}", fullmatch=True)
    path = st.lists(word, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
    single = {
        "path": path,
        "sshkey": path,
        "recipients": path,
        "level": st.lists(st.integers(0, 31).map(str), min_size=1, max_size=4).map(",".join),
        "compress": st.sampled_from(["zstd:auto", "zstd", "zstd:3", "zlib:6", "none"]),
        "failure_action": st.sampled_from(["reboot", "halt", "poweroff", "shell"]),
        "final_action": st.sampled_from(["reboot", "halt", "poweroff", "shell"]),
        "keep": st.integers(1, 9999).map(str),
        "free": st.one_of(st.integers(0, 99).map("{}%".format), st.integers(0, 10**6).map("{}G".format)),
        "wait": st.integers(0, 3600).map(str),
        "timeout": st.integers(0, 3600).map(str),
        "deadline": st.integers(0, 604800).map(str),
        "watchdog": st.integers(10, 3600).map(str),
    }
    several = {
        "target": st.one_of(
            word.map("LABEL={}".format), st.uuids().map("UUID={}".format), path.map("/dev{}".format),
            st.builds("nfs:{}:{}".format, word, path), st.builds("ssh:{}@{}".format, word, word),
            word.map("virtiofs:{}".format), word.map("raw:PARTUUID={}".format),
        ),
        "extra_modules": st.lists(word, min_size=1, max_size=3).map(" ".join),
        "kdump_pre": path,
        "kdump_post": path,
    }  # fmt: skip
    assert several.keys() <= REPEATED
    assert single.keys() <= DIRECTIVES.keys() - REPEATED
    once = [st.tuples(st.just(name), values) for name, values in single.items()]
    more = [st.tuples(st.just(name), values) for name, values in several.items()]
    return st.tuples(
        st.lists(st.one_of(once), unique_by=lambda line: line[0]), st.lists(st.one_of(more), max_size=6)
    ).map(lambda both: [*both[0], *both[1]])


@settings(deadline=None)
@given(good_lines(), st.randoms(use_true_random=False))
@example([("target", "LABEL=a"), ("path", "/x")], Random(0))
def test_what_was_written_is_what_is_read_whatever_stands_around_it(
    lines: list[tuple[str, str]],
    random: Random,
) -> None:
    plain = parse("".join(f"{name} {value}\n" for name, value in lines), FILE)
    dressed = "".join(
        random.choice(["", " ", "\t", "# x\n", "\n"])
        + name
        + random.choice([" ", "\t", "  \t"])
        + random.choice([value, f'"{value}"'])
        + random.choice(["", " ", " # y", "\r"])
        + "\n"
        for name, value in lines
    )
    assert parse(dressed, FILE) == replace(plain, notes=parse(dressed, FILE).notes)
    assert set(plain.targets) == {value for name, value in lines if name == "target"}
    assert len(plain.targets) == len(set(plain.targets))


@settings(deadline=None)
@given(good_lines())
def test_the_capture_kernel_understands_what_the_file_says(lines: list[tuple[str, str]]) -> None:
    """From the file through the command line to the capture side's own parser."""
    found = parse("".join(f"{name} {value}\n" for name, value in lines), FILE)
    more = {
        "level": found.levels, "compress": found.compress, "wait": found.wait, "timeout": found.timeout,
        "deadline": found.deadline,
    }  # fmt: skip
    line = capture_command_line(
        "", found.targets, found.path or "/var/crash", found.final or "", found.failure or "", keep=found.keep,
        free=found.free, watchdog=found.watchdog or 0,
        more={name: str(value) for name, value in more.items() if value is not None},
    )  # fmt: skip
    boot = parse_words(line)
    assert boot.problems == ()
    assert boot.targets == found.targets
    assert (boot.final, boot.failure, boot.keep) == (found.final, found.failure, found.keep)
    for asked, got in ((found.wait, boot.wait), (found.timeout, boot.timeout), (found.deadline, boot.deadline)):
        assert asked in (None, got)
    assert found.levels in (None, ",".join(map(str, boot.levels)))
    assert found.compress in (None, boot.compression)


def test_every_field_is_filled_by_some_directive() -> None:
    """A field that nobody can set would be a promise without a directive."""
    source = Path(directives.__file__).read_text()
    for field in fields(Config):
        if field.name not in ("file", "notes", "filesystems", "places"):
            assert f'"{field.name}"' in source, field.name
