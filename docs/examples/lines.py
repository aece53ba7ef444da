"""A worker that knows nothing of merging: it loads the lines of Python's own library into a list and a dictionary.

Usage: lines.py [SECONDS]. It lives for some seconds, reads a little of its data now and then, and tells at the end whether
all of it is what it loaded.
"""

import hashlib
import pathlib
import sys
import sysconfig
import time


def digest(lines):
    total = hashlib.sha256()
    for line in lines:
        total.update(line.encode())
    return total.digest()


sources = sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
lines = [line for source in sources for line in source.read_text("utf-8", "replace").splitlines(keepends=True)]
numbers = {line: number for number, line in enumerate(lines)}
loaded = digest(lines)

end = time.monotonic() + (float(sys.argv[1]) if len(sys.argv) > 1 else 20)
while time.monotonic() < end:
    right = all(lines[numbers[lines[number]]] == lines[number] for number in range(100))
    time.sleep(0.5)
right = right and digest(lines) == loaded
sys.stdout.write(f"{len(lines)} lines, {'right' if right else 'WRONG'}\n")
sys.exit(not right)
