"""One machine in QEMU: its serial console read, searched and typed at, its disks plugged in while it runs."""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.guest import host

# TCG is slow, and slower when the host is busy: a hang is told from a slow guest by minutes.
BOOT_TIMEOUT = 180.0
COMMAND_TIMEOUT = 60.0

PROBE_INTERVAL = 2.0  # between two questions whether a shell is there

SHOWN_LINES = 40

# A kernel message that lands in the middle of another program's line, with the line breaks that it brings.
KERNEL_NOISE = r"(?:\n?\[ *\d+\.\d+\][^\n]*\n)*"


class GuestError(Exception):
    """The machine did not do what was waited for; the message ends with the console's last lines."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw image file that the guest sees as /dev/vd*, in the order of the list.

    ``throttle_group`` is a QEMU object that says how fast it is.
    """

    image: Path
    read_only: bool = False
    throttle_group: str = ""

    def blockdev(self, node: str) -> dict[str, Any]:
        """The disk's back end as QMP's BlockdevOptions; -blockdev takes the same as JSON."""
        # Locking is off so that two machines can share an image that both only read.
        raw: dict[str, Any] = {
            "driver": "raw",
            "read-only": self.read_only,
            # A dump of an idle machine is mostly zeros: they become holes in the image.
            "discard": "unmap",
            "detect-zeroes": "unmap",
            "file": {"driver": "file", "filename": str(self.image), "locking": "off" if self.read_only else "on"},
        }
        if self.throttle_group:
            raw = {"driver": "throttle", "throttle-group": self.throttle_group, "file": raw}
        return {"node-name": node, **raw}


@dataclass(frozen=True, slots=True)
class Card:
    """A network card at one end of a wire: a datagram socket, whose other end is another machine's."""

    wire: socket.socket
    mac: str
    model: str = "virtio-net-pci"

    def arguments(self, number: int) -> list[str]:
        """QEMU's options."""
        back = {"type": "dgram", "id": f"net{number}", "local": {"type": "fd", "str": str(self.wire.fileno())}}
        front = f"{self.model},netdev=net{number},mac={self.mac}"
        return ["-netdev", json.dumps(back), "-device", front]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What to boot, and on what."""

    kernel: Path
    initrd: Path
    append: str = "console=ttyS0"
    memory: str = "1G"
    cpus: int = 1
    cpu_model: str = "max"
    disks: tuple[Disk, ...] = ()
    arguments: tuple[str, ...] = ()  # more for QEMU: a balloon, NUMA nodes
    cards: tuple[Card, ...] = ()

    def command(self, qmp_descriptor: int) -> list[str]:
        """QEMU's command line. The PC machine's ACPI hot-plug is what Debian's cloud kernels have built in."""
        command = [str(host.find("qemu-system-x86_64"))]
        command += ["-nographic", "-no-reboot", "-nodefaults", "-machine", "pc", "-accel", "tcg,thread=multi"]
        command += ["-m", self.memory, "-smp", str(self.cpus), "-cpu", self.cpu_model]
        command += ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", self.append]
        command += ["-serial", "stdio", "-monitor", "none"]
        command += ["-chardev", f"socket,id=qmp,fd={qmp_descriptor}", "-mon", "chardev=qmp,mode=control"]
        command += self.arguments
        for number, card in enumerate(self.cards):
            command += card.arguments(number)
        for number, disk in enumerate(self.disks):
            node = f"disk{number}"
            command += ["-blockdev", json.dumps(disk.blockdev(node))]
            command += ["-device", f"virtio-blk-pci,drive={node},id={node}-device"]
        return command


class Machine:
    """A running machine. Use it in a ``with`` block, which ends it whatever happens.

    Everything that comes over the serial console goes to ``log`` and to ``console``; ``expect`` searches what came
    since its last match.
    """

    def __init__(self, hardware: Hardware, log: Path) -> None:
        self.hardware = hardware
        self.log = log
        self._text = ""
        self._searched = 0
        self._closed = False
        self._arrived = threading.Condition()
        self._plugged = itertools.count(len(hardware.disks))
        log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs, log.with_suffix(".qemu").open("wb") as complaints:
            self._process = subprocess.Popen(
                hardware.command(theirs.fileno()),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                pass_fds=[theirs.fileno(), *(card.wire.fileno() for card in hardware.cards)],
            )
        self._qmp = ours
        self._qmp.settimeout(COMMAND_TIMEOUT)
        self._qmp_lines = ours.makefile("rb")
        self._reader = threading.Thread(target=self._read_console, name=f"console of {log.name}", daemon=True)
        self._reader.start()
        self._qmp_ready = False
        self._events: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End the machine as a power cut does."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._qmp_lines.close()
        self._qmp.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    @property
    def console(self) -> str:
        """All that came over the serial console so far, lines ended by newlines alone."""
        with self._arrived:
            return self._text

    def expect(self, pattern: str, timeout: float) -> re.Match[str]:
        """Wait until the console shows ``pattern`` after the last match (re.MULTILINE).

        Raises:
            GuestError: it does not within ``timeout`` seconds, or the machine ends before.
        """
        wanted = re.compile(pattern, re.MULTILINE)
        deadline = time.monotonic() + timeout
        with self._arrived:
            while True:
                if found := wanted.search(self._text, self._searched):
                    self._searched = found.end()
                    return found
                if self._closed:
                    raise GuestError(self._story(f"the machine ended before {pattern!r} came"))
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GuestError(self._story(f"no {pattern!r} within {timeout:.0f} s"))
                self._arrived.wait(left)

    def send(self, line: str) -> None:
        """Type a line and the return key."""
        stdin = self._process.stdin
        if stdin is None or self._process.poll() is not None:
            raise GuestError(self._story(f"nobody is there to read {line!r}"))
        stdin.write(line.encode() + b"\n")
        stdin.flush()

    def shell(self, timeout: float = BOOT_TIMEOUT) -> None:
        """Wait until a shell answers on the console, then keep kernel messages short of a panic off it."""
        deadline = time.monotonic() + timeout
        while True:
            token = uuid.uuid4().hex[:8]
            self.send(f"T={token}; echo shell-$T-answers")
            try:
                self.expect(f"shell-{token}-answers", min(PROBE_INTERVAL, max(deadline - time.monotonic(), 0.1)))
                break
            except GuestError:
                if self._closed or time.monotonic() > deadline:
                    raise
        self.run("echo 1 > /proc/sys/kernel/printk")

    def run(self, command: str, timeout: float = COMMAND_TIMEOUT) -> tuple[int, str]:
        """Run a command at the shell prompt; its exit status and what it printed.

        The marks around the output are put together by the guest, so that the echo of the command line is not one,
        and are found with kernel messages in their midst. The command's standard input is empty.
        """
        token = uuid.uuid4().hex[:8]
        begins, ends = r"printf '{%s begins}\n' $T", r"printf '{%s ends %03d}\n' $T $?"
        self.send(f"T={token}; {begins}; {{ {command}\n}} </dev/null; {ends}")
        digits = KERNEL_NOISE.join([r"(\d)"] * 3)
        self.expect(_through_noise(f"{{{token} begins}}\n"), timeout)
        begin = self._searched
        found = self.expect(_through_noise(f"{{{token} ends ") + KERNEL_NOISE + digits, timeout)
        with self._arrived:
            return int("".join(found.groups())), self._text[begin : found.start()]

    def wait_exit(self, timeout: float) -> int:
        """Wait until the machine has powered off or, under -no-reboot, reset; QEMU's exit status.

        Raises:
            GuestError: it still runs after ``timeout`` seconds.
        """
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(self._story(f"the machine still runs after {timeout:.0f} s")) from None
        self._reader.join()
        return status

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run a QMP command and return what it returns (``system_powerdown``, ``query-status``, ``stop`` …)."""
        if not self._qmp_ready:
            self._qmp_lines.readline()  # the greeting
            self._qmp_ready = True
            self.qmp("qmp_capabilities")
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        for line in self._qmp_lines:
            answer = json.loads(line)
            if "error" in answer:
                raise GuestError(f"QMP {command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self._events.append(answer["event"])
        raise GuestError(self._story(f"the machine ended before it answered QMP {command}"))

    def events(self) -> list[str]:
        """The names of QMP's events (``WATCHDOG``, ``SHUTDOWN`` …) from its first command to the machine's end."""
        self._events += [answer["event"] for answer in map(json.loads, self._qmp_lines) if "event" in answer]
        return self._events

    def attach(self, disk: Disk) -> str:
        """Plug a disk in while the machine runs; returns the device's name for ``detach``."""
        node = f"disk{next(self._plugged)}"
        device = f"{node}-device"
        self.qmp("blockdev-add", **disk.blockdev(node))
        self.qmp("device_add", driver="virtio-blk-pci", drive=node, id=device)
        return device

    def detach(self, device: str) -> None:
        """Ask the guest to let go of a disk, as its slot's button would."""
        self.qmp("device_del", id=device)

    def _read_console(self) -> None:
        stdout = self._process.stdout
        if stdout is None:
            return
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        with self.log.open("wb") as log:
            while data := os.read(stdout.fileno(), 1 << 16):
                log.write(data)
                log.flush()
                with self._arrived:
                    self._text += decoder.decode(data).replace("\r", "")
                    self._arrived.notify_all()
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()

    def _story(self, what: str) -> str:
        lines = self._text.splitlines()[-SHOWN_LINES:]
        complaints = self.log.with_suffix(".qemu").read_text(errors="replace").splitlines()[-5:]
        return "\n".join([f"{what} (console: {self.log})", *lines, *complaints])


def _through_noise(text: str) -> str:
    """A pattern for ``text`` that also finds it where kernel messages interrupt it."""
    return KERNEL_NOISE.join(map(re.escape, text))
