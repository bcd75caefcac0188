"""Files that this machine cannot read back: encrypted to public keys by the `age` program, while they are written.

The format is age-encryption.org/v1: a header with a key for each recipient, then chunks of 64 KiB, each authenticated
in its place (C2SP age, STREAM). A file that is cut short gives back all of its whole chunks, and says so at its end.

age runs beside us: plain bytes go to it through a pipe, what comes back is written by a thread here, so that the file
is ours (mode, links, digests, a full disk) and nothing plain ever gets to the target.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from pathlib import Path

from capture.dumpfile.output import OutputFile, Pieces, TargetFullError, put_all, unnamed_file
from capture.errors import TargetError, UsageError

SUFFIX = ".age"
PROGRAM = "age"
SIGNATURE = b"age-encryption.org/v1"
FULL_DISK_ROOM = 4 << 20
"""Taken on the target while a dump is written, and given back when it is full: for the descriptors of pages that are
there already, of two steps at the most, and for the files that follow."""
_CHUNK, _TAG = 1 << 16, 16
"""Plain bytes of a chunk, and what each is longer when it is encrypted."""
_READ = 1 << 18
_PATIENCE = 5.0
"""Seconds without a byte from age after which a sync does not wait for it any more."""
_TRIES, _PAUSE = 10, 0.1
_PLACES = ("/usr/local/bin", "/usr/bin", "/bin")
_MAX_SAID = 400
_REPORT = "filippo.io/age/report"
"""In the line with which age asks for reports of its errors."""


def find_program() -> str:
    """Return the path of age.

    Raises:
        TargetError: there is none.
    """
    for folder in (*os.environ.get("PATH", "").split(os.pathsep), *_PLACES):
        path = Path(folder, PROGRAM)
        # An empty or relative entry means the current directory, where root must not find a program.
        if path.is_absolute() and path.is_file() and os.access(path, os.X_OK):
            return str(path)
    raise TargetError(f"{PROGRAM} was not found: nothing can be encrypted; install age")


def check_recipients(path: Path) -> None:
    """Refuse a file that is not there, empty, or holds a secret key; the rest is for age to say.

    Raises:
        UsageError: it cannot be used, and why.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise UsageError(f"{path}: the recipients cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip().upper().startswith("AGE-SECRET-KEY-") or "PRIVATE KEY-----" in line:
            raise UsageError(
                f"{path}, line {number}: is a secret key, which opens what is saved; "
                "keep it elsewhere, and name its public line here (age-keygen -y)"
            )
    if not any(line.strip() and not line.lstrip().startswith("#") for line in lines):
        raise UsageError(f"{path}: names no recipient; put public keys into it, one a line (age1..., ssh-ed25519 ...)")


class EncryptedFile:
    """A new file that is written from its first byte to its last, encrypted to the keys in the file ``recipients``.

    With ``ballast`` some room is kept on the target for the time when it is full (FULL_DISK_ROOM): then ``full`` says
    so, and what is written after that still gets there. ``size`` and ``digests`` are of the encrypted bytes.

    Raises:
        TargetError: from every method; TargetFullError when there is no room.
    """

    def __init__(self, path: Path, recipients: Path, *, hashed: bool = True, ballast: bool = False) -> None:
        program = find_program()
        self._file = OutputFile(path, hashed=hashed)
        self._ballast = _ballast(path.parent) if ballast else -1
        self._given = 0
        self._lock = threading.Lock()
        """Around the pipe: its number must not become another file's while somebody writes to it."""
        self._changed = threading.Condition()
        self._error: TargetError | None = None
        self._finished = False
        self._said = b""
        self.full = False
        try:
            # In a session of its own: Ctrl-C is for us, who have things to finish.
            self._age = subprocess.Popen(
                [program, "-R", str(recipients)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            self._file.discard_if_empty()
            self._release()
            self._file.close()
            raise TargetError(f"{program} cannot be run: {error.strerror}; nothing is saved without it") from None
        self._storer = threading.Thread(target=self._store_all, name="storer", daemon=True)
        self._storer.start()

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return str(self._file.path)

    @property
    def size(self) -> int:
        """Encrypted bytes in the file so far."""
        return self._file.size

    def append(self, pieces: Pieces) -> int:
        """Encrypt all ``pieces``, which follow what was written before; return how many bytes they are."""
        assert self._age.stdin is not None
        try:
            with self._lock:
                pipe = self._age.stdin.fileno()
                put_all(lambda some: os.writev(pipe, some), pieces)
        except (OSError, ValueError):  # (closed: it has failed before)
            raise self._failure() from None
        length = sum(map(len, pieces))
        self._given += length
        return length

    def sync(self) -> None:
        """Bring to the disk what was written: all of it but what age holds back, a chunk of 64 KiB at the most."""
        least = max(1, max(0, self._given - 1) // _CHUNK * (_CHUNK + _TAG))  # a header, whatever was written
        with self._changed:
            while self.size < least and self._storer.is_alive() and self._error is None:
                before = self.size
                if not self._changed.wait(_PATIENCE) and self.size == before:
                    break
        ended = not self._storer.is_alive()
        if self._error is not None or (ended and (not self._finished or self._age.returncode)):
            raise self._failure()
        self._file.sync()

    def forget(self) -> None:
        """Let the page cache drop what is on the disk."""
        self._file.forget(0, 0)

    def end(self) -> None:
        """Have age write its last chunk, which tells that it is whole; nothing is written after that."""
        self._end()
        if self._error is not None or self._age.returncode:
            raise self._failure()

    def settle(self) -> None:
        """Wait for age's end: ``size`` and ``digests`` do not change any more."""
        self._end()

    def digests(self) -> list[str]:
        """Return the SHA-256 of each 64 MiB of the encrypted file, hexadecimal."""
        return self._file.digests()

    def discard_if_empty(self) -> None:
        """Remove the file when not one byte of it could be written."""
        self._end()
        self._file.discard_if_empty()

    def close(self) -> None:
        """Close the file and let age go, whatever it lacks."""
        self._end()
        self._release()
        self._file.close()

    def _end(self) -> None:
        """Let age come to its end, and wait for it."""
        assert self._age.stdin is not None
        assert self._age.stderr is not None
        with self._lock:
            if self._finished:
                return
            with contextlib.suppress(OSError):
                self._age.stdin.close()
            self._storer.join()
            self._said = self._said or self._age.stderr.read(_MAX_SAID)
            self._age.wait()
            self._age.stderr.close()
            self._finished = True

    def _failure(self) -> TargetError:
        """Return why age does not take any more, or did not come to a good end."""
        self._end()
        return self._error or TargetError(f"{self._file.path}: {how_it_ended(self._age.returncode, self._said)}")

    def _store_all(self) -> None:
        """Write what age makes of it: the one thing that the thread does."""
        assert self._age.stdout is not None
        pipe = self._age.stdout.fileno()
        try:
            while data := os.read(pipe, _READ):
                self._store(data)
                with self._changed:
                    self._changed.notify_all()
        except TargetError as error:
            self._error = error
        except Exception as error:  # (whatever it is: it must not look as if all were written)
            self._error = TargetError(f"{self._file.path}: internal error: {type(error).__name__}: {error}")
        finally:
            self._age.stdout.close()  # age ends when nobody reads, and whoever writes to it hears of that
            with self._changed:
                self._changed.notify_all()

    def _store(self, data: bytes) -> None:
        start = self._file.size
        try:
            self._file.append([data])
        except TargetFullError:
            if self._ballast < 0:
                raise
            self._release()
            self.full = True
            self._store_at_last(data, start)

    def _store_at_last(self, data: bytes, start: int) -> None:
        """Write into the room that was given back. Some file systems give it back a little later."""
        for _ in range(_TRIES):
            with contextlib.suppress(TargetFullError):
                self._file.write([data], start)
                return
            self._file.sync_file_system()
            time.sleep(_PAUSE)
        self._file.write([data], start)

    def _release(self) -> None:
        if self._ballast >= 0:
            os.close(self._ballast)
            self._ballast = -1


def _ballast(directory: Path) -> int:
    """Return a descriptor of a file without a name that takes room, -1 where there can be none."""
    try:
        fd = unnamed_file(directory)
    except OSError:
        return -1
    try:
        os.posix_fallocate(fd, 0, FULL_DISK_ROOM)
    except OSError:
        os.close(fd)
        return -1
    return fd


def how_it_ended(status: int, said: bytes) -> str:
    """Return what to say of an age that ended with ``status``, and wrote ``said`` to standard error."""
    if status < 0:
        return f"{PROGRAM} was killed by signal {-status}"
    lines = [line for line in said.decode(errors="replace").splitlines() if _REPORT not in line]
    reason = " ".join(line.removeprefix("age: error: ").strip() for line in lines).strip()
    return f"{PROGRAM} failed: {reason or f'exit status {status}'}"
