"""What the settings of kdump-tools and of kdump-utils mean here, one by one: a directive, or a reason why not.

The facts are those of kdump-tools.conf(5) and kdump-config(8), and of the comments in ``/etc/sysconfig/kdump``.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from capture.errors import UsageError
from initramfs import collector, kexec
from initramfs.shell_settings import Setting

if TYPE_CHECKING:
    from initramfs.config_import import Imported

_SSH_KEY = "/root/.ssh/kdump_id_rsa"
"""What kdump-tools logs in with where nobody says."""


@dataclass(slots=True)
class _Settings:
    """The settings of one file, while they are carried over."""

    file: Path
    values: dict[str, Setting]
    found: Imported

    def get(self, name: str) -> str:
        """Return a value, empty where there is none: the programs take both alike."""
        return self.values[name].value.strip() if name in self.values else ""

    def where(self, name: str) -> str:
        return f"{self.file}:{self.values[name].line}: {name}" if name in self.values else f"{self.file}: {name}"

    def add(self, name: str, directive: str, value: str) -> None:
        self.found.add(self.where(name), directive, value)

    def note(self, name: str, why: str) -> None:
        self.found.notes.append(f"{self.where(name)}: {why}")

    def lose(self, name: str, why: str) -> None:
        self.found.lost.append(f"{self.where(name)}: {why}")


Carrier = Callable[[_Settings, str], None]
"""Carries one setting over; it is asked when that has a value, and in the order of the table."""


def carry_over(values: dict[str, Setting], file: Path, table: dict[str, Carrier], found: Imported) -> None:
    """Carry over what ``file`` sets; ``table`` is KDUMP_TOOLS or KDUMP_UTILS."""
    settings = _Settings(file, values, found)
    for name, carry in table.items():
        if settings.get(name):
            carry(settings, name)
    for name in values:
        if name not in table:
            near = difflib.get_close_matches(name, table, 1)
            settings.lose(name, f"no setting of this file; is {near[0]} meant?" if near else "no setting of this file")
    if table is KDUMP_TOOLS:
        _debian_defaults(settings)


def _ignored(why: str) -> Carrier:
    return lambda settings, name: settings.note(name, why)


def _lost(why: str) -> Carrier:
    return lambda settings, name: settings.lose(name, why)


def _unless(usual: Iterable[str], why: str) -> Carrier:
    """Return what is silent on usual values."""
    known = frozenset(usual)
    return lambda settings, name: None if settings.get(name) in known else settings.lose(name, why)


_FOREIGN_KERNEL = (
    "another kernel than the running one is named when the image is built and loaded: vmcapture initramfs --kernel "
    "RELEASE, vmcapture load --kernel-image FILE"
)
_NOT_READ = ("systemd.", "rd.", "udev.", "root=", "rootflags=", "rootfstype=")


def _append(settings: _Settings, name: str) -> None:
    """Take over words for the capture kernel's command line, but those that are there anyway or that nobody reads."""
    kept, cpus = [], ""
    for word in settings.get(name).split():
        key, _, value = word.partition("=")
        if word in kexec.ADDED:
            continue
        if key in ("nr_cpus", "maxcpus") and value == "1":
            settings.note(
                name, f"{word}: there are as many CPUs as the reserved memory is enough for; `cpus 1` keeps to one"
            )
        elif key in ("nr_cpus", "maxcpus"):
            cpus = value
        elif f"{word}=".startswith(_NOT_READ) or word in ("ro", "rw"):
            settings.note(name, f"{word}: nothing in the capture image reads it")
        else:
            kept.append(word)
    if cpus:
        settings.add(name, "cpus", cpus)
    if kept:
        settings.add(name, "append", " ".join(kept))


def _remove(settings: _Settings, name: str) -> None:
    """Take over names of parameters to be left out, but those that always are."""
    keys = [word.partition("=")[0] for word in settings.get(name).split()]
    kept = [key for key in keys if not kexec.is_dropped(key)]
    if kept:
        settings.add(name, "command_line_remove", " ".join(kept))


def _base_line(settings: _Settings, name: str) -> None:
    settings.add(name, "command_line_base", settings.get(name))


def _kexec_arguments(settings: _Settings, name: str) -> None:
    """Take over which system call is to load the kernel."""
    ways = {"-s": "file", "--kexec-file-syscall": "file", "-c": "load", "--kexec-syscall": "load",
            "-a": "auto", "--kexec-syscall-auto": "auto"}  # fmt: skip
    asked = []
    for word in settings.get(name).split():
        if word in ways:
            asked.append(ways[word])
        elif word in ("-d", "--debug"):
            settings.note(name, f"{word}: an error is said without it")
        elif word in ("--elf64-core-headers", "--elf32-core-headers"):
            settings.note(name, f"{word}: the headers suit the machine without it")
        else:
            settings.lose(name, f"{word}: kexec is not given other options")
    if asked:
        settings.add(name, "syscall", asked[-1])


# --- kdump-tools ----------------------------------------------------------------------------------------------------


def _use_kdump(settings: _Settings, name: str) -> None:
    if settings.get(name) == "0":
        settings.note(name, "kdump-tools was switched off; vmcapture load arms the machine all the same")


def _remote(settings: _Settings) -> bool:
    return any(settings.get(name) for name in ("SSH", "NFS", "FTP"))


def _ssh(settings: _Settings, name: str) -> None:
    settings.add(name, "ssh", settings.get(name))
    if not settings.get("SSH_KEY"):
        settings.add(name, "sshkey", _SSH_KEY)
    if settings.get("NFS"):
        settings.note(
            "NFS", "kdump-tools saves to both SSH and NFS; here the next target is for when those before fail"
        )


def _nfs(settings: _Settings, name: str) -> None:
    settings.add(name, "nfs", settings.get(name))


def _ftp(settings: _Settings, name: str) -> None:
    server = settings.get(name).partition(":")[0]
    settings.lose(
        name,
        "there is no FTP: it gives no answer when all is on the disk; save there by SSH or NFS: "
        f"SSH=USER@{server} or NFS={server}:/EXPORT",
    )
    settings.found.lost_target = settings.found.lost_target or not (settings.get("SSH") or settings.get("NFS"))


def _core_directory(settings: _Settings, name: str) -> None:
    """kdump-tools mounts an export at this directory: there its crashes lie at the top."""
    if settings.get("NFS") and not settings.get("SSH"):
        return
    if settings.get("NFS"):
        settings.note(name, "on the NFS export too, crashes go below this directory; kdump-tools has them at its top")
    settings.add(name, "path", settings.get(name))


def _fail_command(settings: _Settings, name: str) -> None:
    """What is to follow a failure: the first of its commands that we have an action for, a shell above all."""
    command = settings.get(name)
    try:
        words = {word.rpartition("/")[2] for word in shlex.split(command.replace(";", " ").replace("&", " "))}
    except ValueError:
        words = set()
    actions = [action for name, action in _ACTIONS.items() if name in words]
    if actions:
        settings.add(name, "failure_action", actions[0])
    else:
        settings.lose(name, f"{command}: a command of one's own is run after the save: kdump_post SCRIPT; now: reboot")
        settings.add(name, "failure_action", "reboot")


_ACTIONS = {
    "sh": "shell", "bash": "shell", "dash": "shell", "sulogin": "shell", "reboot": "reboot", "poweroff": "poweroff",
    "shutdown": "poweroff", "halt": "halt",
}  # fmt: skip


def _dump_dmesg(settings: _Settings, name: str) -> None:
    if settings.get(name) != "1":
        settings.note(name, "the log is always saved")


def _number_of_dumps(settings: _Settings, name: str) -> None:
    number = settings.get(name)
    if _remote(settings):
        settings.note(name, "kdump-tools removes nothing on another machine; `keep N` does so here")
    elif number != "0":
        settings.add(name, "keep", number)


def _whole_file(settings: _Settings, name: str) -> None:
    settings.note(name, f"{settings.get(name)}: a dump is compressed page by page, so that crash opens it as it is")


def _makedumpfile(settings: _Settings, name: str) -> None:
    try:
        found = collector.makedumpfile(shlex.split(settings.get(name)))
    except UsageError as error:
        settings.lose(name, str(error).removeprefix("core_collector: "))
        return
    except ValueError:
        settings.lose(name, f"{settings.get(name)}: a quote is missing its other half")
        return
    packed = found.compress if found.compress != collector.NONE or not settings.get("KDUMP_COMPRESSION") else None
    settings.add(name, "level", found.levels)
    settings.add(name, "compress", packed or collector.FAST)
    for note in found.notes:
        settings.note(name, note)


def _host_tag(settings: _Settings, name: str) -> None:
    if settings.get(name) != "hostname":
        settings.note(name, "a crash's directory begins with the host's name, not with its address")


def _debian_defaults(settings: _Settings) -> None:
    """What kdump-tools does where its file says nothing, and we would do otherwise."""
    if not settings.get("KDUMP_FAIL_CMD"):
        settings.found.directives.append("failure_action reboot")
    if settings.get("NFS") and not settings.get("SSH"):
        settings.found.directives.append("path /")
    if not settings.get("MAKEDUMP_ARGS"):
        settings.found.notes.append(
            f"{settings.file}: MAKEDUMP_ARGS is not set: level 31 as before, and zstd instead of zlib; `compress zlib` "
            "is for a reader without zstd, as Debian 12's makedumpfile"
        )


_DEADLINES = "how long a target may give no answer is `timeout SECONDS`, for all of them"
KDUMP_TOOLS: dict[str, Carrier] = {
    "USE_KDUMP": _use_kdump,
    "KDUMP_KERNEL": _unless(["/var/lib/kdump/vmlinuz"], _FOREIGN_KERNEL),
    "KDUMP_INITRD": _unless(["/var/lib/kdump/initrd.img"], "the image is our own: vmcapture initramfs"),
    "KDUMP_SYSCTL": _ignored("no sysctl is set in the capture kernel"),
    "SSH": _ssh,
    "SSH_KEY": lambda settings, name: settings.add(name, "sshkey", settings.get(name)),
    "SSH_KDUMP_RETRY": _ignored("how long to wait for a target is `wait SECONDS`"),
    "NFS": _nfs,
    "NFS_TIMEO": _ignored(_DEADLINES),
    "NFS_RETRANS": _ignored(_DEADLINES),
    "NFS_MOUNT_RETRY": _ignored("how long to wait for a target is `wait SECONDS`"),
    "FTP": _ftp,
    "FTP_USER": _ignored("there is no FTP"),
    "FTP_PASSWORD": _ignored("there is no FTP"),
    "FTP_PORT": _ignored("there is no FTP"),
    "HOSTTAG": _host_tag,
    "KDUMP_COREDIR": _core_directory,
    "KDUMP_FAIL_CMD": _fail_command,
    "KDUMP_DUMP_DMESG": _dump_dmesg,
    "KDUMP_NUM_DUMPS": _number_of_dumps,
    "KDUMP_COMPRESSION": _whole_file,
    "MAKEDUMP_ARGS": _makedumpfile,
    "KDUMP_KEXEC_ARGS": _kexec_arguments,
    "KDUMP_CMDLINE": _base_line,
    "KDUMP_CMDLINE_APPEND": _append,
    "KDUMP_CONFIG": _ignored("a kernel of today runs at any address"),
    "DEBUG_KERNEL": _ignored("the kernel's own notes are enough"),
}
_LOG_LEVEL = _ignored("-q prints errors only")
KDUMP_UTILS: dict[str, Carrier] = {
    "KDUMP_KERNELVER": _lost(_FOREIGN_KERNEL),
    "KDUMP_COMMANDLINE": _base_line,
    "KDUMP_COMMANDLINE_REMOVE": _remove,
    "KDUMP_COMMANDLINE_APPEND": _append,
    "FADUMP_COMMANDLINE_APPEND": _ignored("fadump is for POWER, where vmcapture does not run"),
    "KEXEC_ARGS": _kexec_arguments,
    "KDUMP_BOOTDIR": _unless(["/boot"], _FOREIGN_KERNEL),
    "KDUMP_IMG": _unless(["vmlinuz"], _FOREIGN_KERNEL),
    "KDUMP_IMG_EXT": _lost(_FOREIGN_KERNEL),
    "VMCORE_CREATION_NOTIFICATION": _ignored("whom to tell of a crash is `notify`"),
    "KDUMP_STDLOGLVL": _LOG_LEVEL,
    "KDUMP_SYSLOGLVL": _LOG_LEVEL,
    "KDUMP_KMSGLOGLVL": _LOG_LEVEL,
}
