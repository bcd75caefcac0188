"""Runs a program, and prints its PID, once it is there; then its exit status, wall, user and system time in seconds,
and its peak memory in KiB.

A script of its own, with few imports: Linux counts into the peak memory of a program what the process that started it
had (``getrusage(2)``: RUSAGE_SELF survives execve), which would be all of the benchmark's. So the least that is seen
is the memory of this one, about 9 MiB. Standard output is for the numbers: what the program prints goes to standard
error.
"""

import os
import sys
import time


def main() -> None:
    """Run ``sys.argv[1:]``, whose first is a path."""
    program, *arguments = sys.argv[1:]
    to_stderr = [(os.POSIX_SPAWN_DUP2, 2, 1)]
    began = time.perf_counter()
    child = os.posix_spawn(program, [program, *arguments], os.environ, file_actions=to_stderr)
    print(child, flush=True)
    _, status, usage = os.wait4(child, 0)
    wall = time.perf_counter() - began
    print(os.waitstatus_to_exitcode(status), wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss)


if __name__ == "__main__":
    main()
