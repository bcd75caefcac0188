"""Our parts for an image that the distribution's own builder makes: dracut, initramfs-tools (see initramfs.builders).

They lie in one directory of that image, PLACE; the distribution's PID 1 starts ``hand-over`` there::

    /vmcapture/
        busybox         a static one
        functions       what stage one of our own image has as well (initramfs/functions)
        hand-over       the script that the distribution's hooks run
        modules         kernel modules to load, first to last, with their options; the distribution puts them in
        root.squashfs   the system that the job runs in; or, in tree/, the same as a plain tree
        newroot/        where it is mounted
"""

from __future__ import annotations

from pathlib import Path

from initramfs.image import SCRIPTS, ImageReport, ImageRequest, prepared
from initramfs.tree import Directory, File, Tree, host_program

PLACE = "/vmcapture"


def write_parts(request: ImageRequest, directory: Path) -> ImageReport:
    """Write the parts below ``directory``, the root of the image that is being made.

    Raises:
        CaptureError: something is missing, or they cannot be written there: they may be there already.
    """
    with prepared(request) as parts:
        tree = Tree()
        tree.add(PLACE, Directory(0o700))  # there may be a secret key in the plain tree
        if parts.squashfs:
            tree.add(f"{PLACE}/root.squashfs", File(parts.packed_root(), 0o600))
        else:
            for path, entry in parts.root:
                tree.add(f"{PLACE}/tree{path}", entry)
        tree.add(f"{PLACE}/newroot", Directory())
        tree.add(f"{PLACE}/busybox", host_program(parts.busybox))
        tree.add(f"{PLACE}/functions", File(SCRIPTS / "functions"))
        tree.add(f"{PLACE}/hand-over", File(SCRIPTS / "hand-over"))
        tree.add(f"{PLACE}/modules", File(parts.module_lines()))
        tree.write(directory)
        return parts.report(tree, directory / PLACE[1:], tree.size())
