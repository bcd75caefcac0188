"""Runs in the guest of the filter's benchmark: fills memory with what a machine in use holds, says "held" and stays.

``workload.py FOLDER TMPFS`` reads and writes files in the file system FOLDER and in TMPFS. All sizes are percents of
the machine's memory; what is left is free: some in large blocks, some in small pieces. It has the few modules of the
image's Python.
"""

import mmap
import os
import random
import sys
import time

PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MIB = 1 << 20

PLAIN, HUGE, FRAGMENTED = 12, 12, 16
TMPFS_RANDOM, TMPFS_TEXT = 4, 6
WRITTEN, READ = 6, 8
KEPT_SHARE = 0.4
"""Of FRAGMENTED, in pages that stay: the others go back, a few neighbours at a time."""

held: list[mmap.mmap] = []


def total() -> int:
    """Bytes of memory that the kernel manages."""
    with open("/proc/meminfo") as lines:  # noqa: PTH123
        return int(lines.readline().split()[1]) << 10


def anonymous(size: int, advice: int) -> mmap.mmap:
    """Private anonymous memory, every page written to."""
    memory = mmap.mmap(-1, size, flags=PRIVATE_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory.madvise(advice)
    held.append(memory)
    pattern = b"".join((at * 0x9E3779B1 % (1 << 32)).to_bytes(8, "little") for at in range(128))
    for at in range(0, size, mmap.PAGESIZE):
        memory[at : at + 8] = at.to_bytes(8, "little")
        memory[at + 64 : at + 64 + len(pattern)] = pattern
    return memory


def fragmented(size: int) -> None:
    """Give back pages of a region here and there: free blocks of all small orders."""
    memory = anonymous(size, mmap.MADV_NOHUGEPAGE)
    choice = random.Random(0)
    at = 0
    while at < size:
        at += mmap.PAGESIZE * choice.randint(1, 8)
        back = min(mmap.PAGESIZE * int(choice.randint(1, 8) * (1 - KEPT_SHARE) / KEPT_SHARE), size - at)
        if back > 0:
            memory.madvise(mmap.MADV_DONTNEED, at, back)
            at += back


def write(path: str, size: int, pieces: list[bytes]) -> None:
    """Write a file, its pieces again and again."""
    with open(path, "wb", buffering=0) as file:  # noqa: PTH123
        for number in range(size // len(pieces[0])):
            file.write(pieces[number % len(pieces)])


def read(folder: str) -> int:
    """Read every file below a folder and return how many there were."""
    count = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(where, name), "rb", buffering=0) as file:  # noqa: PTH118, PTH123
                while file.read(MIB):
                    pass
            count += 1
    return count


def main() -> None:
    """Fill memory part by part."""
    folder, tmpfs = sys.argv[1:]
    percent = total() // 100 // MIB * MIB
    noise = [os.urandom(MIB) for _ in range(16)]
    text = b"".join(b"%07d the quick brown fox jumps over the lazy dog\n" % line for line in range(22000))[:MIB]
    anonymous(PLAIN * percent, mmap.MADV_NOHUGEPAGE)
    anonymous(HUGE * percent, mmap.MADV_HUGEPAGE)
    write(f"{tmpfs}/random", TMPFS_RANDOM * percent, noise)
    write(f"{tmpfs}/text", TMPFS_TEXT * percent, [text])
    write(f"{folder}/written", WRITTEN * percent, [*noise[:4], text])
    with open(f"{folder}/sparse", "wb") as file:  # noqa: PTH123
        file.truncate(READ * percent)
    files = read(folder)
    fragmented(FRAGMENTED * percent)  # the last: what comes after it would fill the gaps
    print(f"workload held, {files} files read", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
