"""A worker of `bench workers`: loads the same data as its siblings, and serves requests for it.

It answers one line for each line on its standard input, and ends with it. The first line that it says is the digest of
what it has loaded.
  small N   reads 20 entries in a row and raises 50 counters, where depends on N
  all       reads everything, and says a sum that is always the same
  check     digests everything, and says whether the counters are what they must be
"""
import hashlib
import json
import sqlite3
import sys

ENTRIES = 100_000
ROWS = 30_000
COUNTERS = 20_000
TEXTS = 40
WORDS = "page fold share store merge worker request answer memory equal kernel digest number letter".split()


def load():
    """A dictionary, texts and a database, from the same numbers in the same order."""
    state, table = 1, {}
    for number in range(ENTRIES):
        state = (state * 1103515245 + 12345) % 2147483648
        text = " ".join(WORDS[(state >> shift) % len(WORDS)] for shift in (3, 7, 11, 15, 19))
        table["%d:%s" % (number, text)] = (number, text[:24])
    keys = list(table)
    texts = [json.dumps(keys[number * 2000:(number + 1) * 2000]).encode() for number in range(TEXTS)]
    database = sqlite3.connect(":memory:")
    database.execute("create table line (number integer primary key, text text, words text)")
    rows = ((number, key, repr(table[key])) for number, key in enumerate(keys[:ROWS]))
    database.executemany("insert into line values (?, ?, ?)", rows)
    return table, keys, texts, database


def digest(table, texts, database):
    total = hashlib.sha256()
    for key, value in table.items():
        total.update(key.encode())
        total.update(repr(value).encode())
    for text in texts:
        total.update(text)
    for row in database.execute("select * from line order by number"):
        total.update(repr(row).encode())
    return total.hexdigest()


def read_all(table, texts, database):
    total = sum(len(key) + value[0] for key, value in table.items())
    total += sum(text.count(b"e") for text in texts)
    return total + database.execute("select sum(length(text) + length(words)) from line").fetchone()[0]


def raise_some(counters, number):
    start = number * 7919 % COUNTERS
    for index in range(start, min(start + 50, COUNTERS)):
        counters[index] += 1000


def main():
    table, keys, texts, database = load()
    counters, served = [0] * COUNTERS, []
    print(digest(table, texts, database), flush=True)
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "small":
            number = int(number)
            total = 0
            for turn in range(20):
                place = (number * 104729 + turn) % ENTRIES
                value = table[keys[place]]
                total += value[0] == place
            raise_some(counters, number)
            served.append(number)
            print("ok" if total == 20 else "wrong", flush=True)
        elif word == "all":
            print(read_all(table, texts, database), flush=True)
        elif word == "check":
            expected = [0] * COUNTERS
            for number in served:
                raise_some(expected, number)
            print(digest(table, texts, database), "right" if counters == expected else "wrong", flush=True)


main()
