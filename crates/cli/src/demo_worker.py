"""One worker of the demonstration: loads the same data as its siblings, works with it, and proves what it holds.

Started as: demo_worker.py FILE...   (the files of this machine that the data is made from)
It answers one line for each line on its standard input:
  work N   reads and writes some of the data N times
  check    digests everything that it holds, and says whether the written part is what it must be
and ends with its standard input. The first line that it says is the digest after loading.
"""
import hashlib
import sqlite3
import sys

try:
    import numpy
except ImportError:
    numpy = None

ENTRIES = 100_000
ROWS = 30_000
COUNTERS = 20_000


def load(paths):
    """A dictionary, a database and an array, all from the same files in the same order."""
    table, texts = {}, []
    for path in paths:
        with open(path, "rb") as file:
            text = file.read()
        texts.append(text)
        for number, line in enumerate(text.decode("utf-8", "replace").splitlines()):
            if len(table) == ENTRIES:
                break
            table["%d:%s" % (len(table), line)] = (number, line[:24])
    while len(table) < ENTRIES:
        table["%d:" % len(table)] = (len(table), "")
    database = sqlite3.connect(":memory:")
    database.execute("create table line (number integer primary key, text text, words text)")
    rows = ((n, key, repr(value)) for n, (key, value) in zip(range(ROWS), table.items()))
    database.executemany("insert into line values (?, ?, ?)", rows)
    array = numpy.arange(500_000, dtype="float64").reshape(1000, 500) if numpy else None
    return table, texts, database, array


def digest(table, texts, database, array):
    total = hashlib.sha256()
    for key, value in table.items():
        total.update(key.encode())
        total.update(repr(value).encode())
    for text in texts:
        total.update(text)
    for row in database.execute("select * from line order by number"):
        total.update(repr(row).encode())
    if array is not None:
        total.update(array.tobytes())
    return total.hexdigest()


def touched(step):
    """Which counters the step raises: a few neighbours, somewhere."""
    start = step * 7919 % COUNTERS
    return range(start, min(start + 50, COUNTERS))


def main():
    held = load(sys.argv[1:])
    table, _, database, _ = held
    counters = [0] * COUNTERS
    keys = list(table)
    print(digest(*held), flush=True)
    steps = 0
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "work":
            for _ in range(int(number)):
                for index in touched(steps):
                    counters[index] += 1000
                for index in range(steps % 97, 2000, 97):
                    assert table[keys[index]] is not None
                assert database.execute("select count(*) from line where number < 100").fetchone() == (100,)
                steps += 1
            print("worked", steps, flush=True)
        elif word == "check":
            expected = [0] * COUNTERS
            for step in range(steps):
                for index in touched(step):
                    expected[index] += 1000
            print(digest(*held), "right" if counters == expected else "wrong", flush=True)


main()
