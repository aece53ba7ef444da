"""A worker that loads data into memory of its own and marks it mergeable.

Usage: worker.py [SECONDS]. It loads the sources of Python's library, lives for some seconds, and then tells whether its
memory still holds what it loaded.
"""

import hashlib
import mmap
import pathlib
import sys
import sysconfig
import time

sources = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
data = b"".join(source.read_bytes() for source in sources)
digest = hashlib.sha256(data).digest()

memory = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = data
del data
memory.madvise(mmap.MADV_MERGEABLE)

time.sleep(float(sys.argv[1]) if len(sys.argv) > 1 else 10)
right = hashlib.sha256(memory).digest() == digest
sys.stdout.write(f"{len(memory) >> 20} MiB, {'right' if right else 'WRONG'}\n")
sys.exit(not right)
