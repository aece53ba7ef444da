"""How long a task of another session waits for a CPU while this session is busy (autogroups).

Prints the longest wait of five processes that sleep for 5 ms at a time, each in a session of its own, beside one spinning
process more than there are CPUs and eight that are busy now and then, all of this session. Usage: sessions.py [SECONDS]
"""

import os
import sys
import time

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 30
END = time.monotonic() + SECONDS


def started(run, *, session):
    """The pid of a child, and the pipe that it says something into."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        if session:
            os.setsid()
        os.close(reads)
        os.write(writes, b"%d" % run())
        os._exit(0)
    os.close(writes)
    return pid, reads


def spin():
    while time.monotonic() < END:
        pass
    return 0


def busy_now_and_then():
    while time.monotonic() < END:
        time.sleep(0.001)
        sum(range(2000))
    return 0


def longest_wait_us():
    longest = 0
    while time.monotonic() < END:
        before = time.monotonic()
        time.sleep(0.005)
        longest = max(longest, time.monotonic() - before - 0.005)
    return round(longest * 1e6)


busy = [started(spin, session=False) for _ in range(os.cpu_count() + 1)]
busy += [started(busy_now_and_then, session=False) for _ in range(8)]
sleepers = [started(longest_wait_us, session=True) for _ in range(5)]
waits = [int(os.read(pipe, 32)) / 1e6 for _, pipe in sleepers]
for pid, _ in busy + sleepers:
    os.waitpid(pid, 0)
with open("/proc/sys/kernel/sched_autogroup_enabled") as enabled:
    print(f"autogroups {enabled.read().strip()}: longest waits {', '.join(f'{wait:.3f}' for wait in sorted(waits))} s")
