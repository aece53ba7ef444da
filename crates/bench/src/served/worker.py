"""A worker of `bench workers`: loads the same data as its siblings and some of its own, and serves requests for both.

Started as `worker.py NUMBER`, each worker with another number. It answers one line for each line on its standard input,
and ends with it. The first line that it says is the digest of what it has loaded, and the sum that `all` says.
  small N   reads 20 entries in a row of each kind and raises 50 counters, where depends on N
  all       reads everything, and says a sum that is always the same
  check     digests everything, and says that, the sum, and whether the counters are what they must be
"""
import hashlib
import json
import sqlite3
import sys

ENTRIES = 100_000
ROWS = 30_000
COUNTERS = 20_000
TEXTS = 40
# Of its own it has a fortieth as much: a page of a sibling in its place would be told by its digest.
SHARE = 40
WORDS = "page fold share store merge worker request answer memory equal kernel digest number letter".split()


def equal_entries():
    """What all workers hold: the same numbers in the same order."""
    state = 1
    for number in range(ENTRIES):
        state = (state * 1103515245 + 12345) % 2147483648
        text = " ".join(WORDS[(state >> shift) % len(WORDS)] for shift in (3, 7, 11, 15, 19))
        yield "%d:%s" % (number, text), (number, text[:24])


def mark(worker, place):
    """What no other worker holds at that place."""
    return (worker * 1000003 + place) * 2654435761 % 1073741824


def own_entries(worker):
    """As long in every worker, so that nothing else moves by it."""
    for place in range(ENTRIES // SHARE):
        one = mark(worker, place)
        yield "%06d:%08x of one worker alone" % (place, one), (one, "%08x" % one * 3)


class Part:
    """A dictionary, texts of its keys, and a table of the database."""

    def __init__(self, entries, share, database, name):
        self.table = dict(entries)
        self.keys = list(self.table)
        self.texts = [
            json.dumps(self.keys[number * 2000:(number + 1) * 2000]).encode() for number in range(TEXTS // share)
        ]
        self.database, self.name = database, name
        database.execute("create table %s (number integer primary key, text text, words text)" % name)
        rows = ((number, key, repr(self.table[key])) for number, key in enumerate(self.keys[:ROWS // share]))
        database.executemany("insert into %s values (?, ?, ?)" % name, rows)

    def digest(self, total):
        for key, value in self.table.items():
            total.update(key.encode())
            total.update(repr(value).encode())
        for text in self.texts:
            total.update(text)
        for row in self.database.execute("select * from %s order by number" % self.name):
            total.update(repr(row).encode())

    def read_all(self):
        total = sum(len(key) + value[0] for key, value in self.table.items())
        total += sum(text.count(b"e") for text in self.texts)
        lengths = self.database.execute("select sum(length(text) + length(words)) from %s" % self.name)
        return total + lengths.fetchone()[0]


def read_all(parts):
    return sum(part.read_all() for part in parts)


def digest(parts):
    total = hashlib.sha256()
    for part in parts:
        part.digest(total)
    return "%s %d" % (total.hexdigest(), read_all(parts))


def read_some(equal, own, worker, number):
    """Whether 20 entries of either part are what they must be."""
    total = 0
    for turn in range(20):
        place = (number * 104729 + turn) % ENTRIES
        total += equal.table[equal.keys[place]][0] == place
        place %= ENTRIES // SHARE
        total += own.table[own.keys[place]][0] == mark(worker, place)
    return total == 40


def raise_some(counters, number):
    start = number * 7919 % COUNTERS
    for index in range(start, min(start + 50, COUNTERS)):
        counters[index] += 1000


def main():
    worker = int(sys.argv[1])
    database = sqlite3.connect(":memory:")
    equal = Part(equal_entries(), 1, database, "line")
    own = Part(own_entries(worker), SHARE, database, "own")
    parts = (equal, own)
    counters, served = [0] * COUNTERS, []
    print(digest(parts), flush=True)
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "small":
            number = int(number)
            right = read_some(equal, own, worker, number)
            raise_some(counters, number)
            served.append(number)
            print("ok" if right else "wrong", flush=True)
        elif word == "all":
            print(read_all(parts), flush=True)
        elif word == "check":
            expected = [0] * COUNTERS
            for number in served:
                raise_some(expected, number)
            print(digest(parts), "right" if counters == expected else "wrong", flush=True)


main()
