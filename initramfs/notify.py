"""Tells people of a crash that was found: programs in a directory, a mail through the local MTA, a webhook.

None of them is given what the dead kernel's memory held but the line that announced the crash: no dump, no log.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from http.client import HTTPException
from pathlib import Path
from typing import Any

from capture import __version__
from capture.console import printable
from initramfs import tools
from initramfs.errors import NotifyError, ToolError

DIRECTORY = Path("/etc/vmcapture/notify.d")
SENDMAIL = Path("/usr/sbin/sendmail")
_LEFT = re.compile(r"^[.#]|~$|\.(bak|orig|rej|swp|dpkg-\w+|rpmsave|rpmnew|rpmorig)$")
"""What editors and packages leave beside a program, with its mode."""
TIMEOUT = 30
"""Seconds that one of them may take."""
COMMAND, MAIL, WEBHOOK = "command", "mail", "webhook"


@dataclass(frozen=True, slots=True)
class Receiver:
    """Who is to be told: ``kind`` COMMAND, MAIL or WEBHOOK; ``where`` a program, an address or a URL."""

    kind: str
    where: str

    def __str__(self) -> str:
        return f"{self.kind} {self.where}"


@dataclass(frozen=True, slots=True)
class News:
    """What they are told."""

    summary: str  # one line
    directory: str
    status: int  # 0: whole; 3: not whole, what is there is right; 1: damaged
    values: dict[str, Any]  # the crash, for JSON


def receivers(configured: Sequence[tuple[str, str]], directory: Path = DIRECTORY) -> list[Receiver]:
    """Return all who are to be told: the programs in the directory in their names' order, then the configured ones."""
    found = sorted(directory.iterdir()) if directory.is_dir() else []
    programs = [path for path in found if path.is_file() and os.access(path, os.X_OK) and not _LEFT.search(path.name)]
    return [*(Receiver(COMMAND, str(path)) for path in programs), *(Receiver(kind, to) for kind, to in configured)]


def tell(receiver: Receiver, news: News) -> None:
    """Tell one of them.

    Raises:
        NotifyError: it did not work, within TIMEOUT.
    """
    try:
        {COMMAND: _hook, MAIL: _mail, WEBHOOK: _webhook}[receiver.kind](receiver.where, news)
    except ToolError as error:
        raise NotifyError(f"notify {receiver}: {error}") from None
    except subprocess.TimeoutExpired:
        raise NotifyError(f"notify {receiver}: did not end within {TIMEOUT} s") from None
    except (OSError, HTTPException, ValueError) as error:
        raise NotifyError(printable(f"notify {receiver}: {error}")) from None


def _hook(program: str, news: News) -> None:
    environment = {
        "PATH": tools.SYSTEM_DIRECTORIES,
        "VMCAPTURE_DIRECTORY": news.directory,
        "VMCAPTURE_STATUS": str(news.status),
        "VMCAPTURE_SUMMARY": news.summary,
    }
    _run([program, news.directory, str(news.status)], json.dumps(news.values), environment)


def _mail(address: str, news: News) -> None:
    if not SENDMAIL.exists():
        raise NotifyError(f"notify mail {address}: no {SENDMAIL}: install a mail server, or use a webhook")
    message = EmailMessage()
    message["To"] = address
    message["Subject"] = f"{socket.gethostname()}: {news.summary}"[:200]
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834
    lines = [news.summary, "", *(f"{name}: {value}" for name, value in news.values.items() if _is_plain(value))]
    text = "\n".join([*lines, "", f"On {socket.gethostname()}: vmcapture show {news.directory}", ""])
    message.set_content(text, cte="8bit")  # a path in two pieces cannot be copied
    _run([str(SENDMAIL), "-i", "-t"], message.as_string(), {"PATH": tools.SYSTEM_DIRECTORIES})


def _is_plain(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, (str, int)) and value != ""


def _run(command: list[str], stdin: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, errors="replace", env=environment, timeout=TIMEOUT,
        check=False,
    )  # fmt: skip
    if done.returncode:
        said = printable(tools.last_line(done.stderr or done.stdout))
        raise ToolError(f"{tools.describe_status(done.returncode)}: {said}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What was said to one server is not for another one."""

    def redirect_request(self, *_: Any) -> None:  # noqa: ANN401
        """Follow nothing: the answer counts as an error."""


def _webhook(url: str, news: News) -> None:
    body = {"summary": news.summary, "status": news.status, "reported_by": socket.gethostname(), "crash": news.values}
    request = urllib.request.Request(
        url,
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "User-Agent": f"vmcapture/{__version__}"},
        method="POST",
    )
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT):
            pass
    except urllib.error.HTTPError as error:
        error.close()
        raise NotifyError(f"notify webhook {url}: it answered {error.code} {printable(str(error.reason))}") from None
    except urllib.error.URLError as error:
        raise NotifyError(f"notify webhook {url}: {printable(str(error.reason))}") from None
