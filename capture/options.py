"""How to dump: what the command line, or the capture kernel's, may say of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from capture.errors import UsageError
from capture.levels import parse_levels

DUMP_COMPRESSION = "zstd"
SAVE_COMPRESSION = "zstd:auto"
"""What ``vmcapture dump`` and ``save`` compress with when nobody says; spelt as in capture.dumpfile.codec."""
RECIPIENTS = Path("/etc/vmcapture/recipients")
"""Whom a save encrypts to, where nobody says anything else: in the capture image, and on the machine that builds it."""


class DumpOptions(NamedTuple):
    """How to dump. ``threads`` None means as many as there are CPUs and memory for; ``replace`` an existing file, or
    ``resume`` an unfinished one of the same crash.

    ``levels`` are dump levels, the first one that fits on the target is made, else the last. ``trust_filter`` makes
    that level even when the filter fails its checks; ``exclude_vmemmap`` leaves out mem_map of pages left out.
    """

    levels: tuple[int, ...] = (1,)
    compression: str = DUMP_COMPRESSION
    threads: int | None = None
    replace: bool = False
    resume: bool = False
    progress: bool = True
    trust_filter: bool = False
    exclude_vmemmap: bool = False
    deadline: float | None = None
    """When to end in an orderly way with what there is, on ``time.monotonic``'s clock."""
    hashed: bool = True
    """Whether SHA-256 of the dump is taken while it is written."""
    recipients: Path | None = None
    """A file of public keys: what is written is encrypted to them."""
    elf: bool = False
    """An ELF core, not compressed, instead of a kdump-compressed dump."""

    def check(self) -> None:
        """Refuse what cannot be made, before anything is opened.

        Raises:
            UsageError: level or compression are wrong, or two things do not go together.
        """
        from capture.dumpfile import codec as codecs  # a boot that nobody gave options needs no codec yet

        parse_levels(",".join(map(str, self.levels)))
        codecs.codec(self.compression)
        if self.elf and self.resume:
            raise UsageError("an ELF file cannot be gone on with: it does not tell what is in it yet; use --force")
        if self.recipients is not None:
            from capture.dumpfile.encrypted import check_recipients  # nor that

            check_recipients(self.recipients)
            if self.resume:
                raise UsageError("an encrypted dump cannot be gone on with: this machine cannot read it back")
