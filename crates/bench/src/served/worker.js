// A worker of `bench workers` for Node, which speaks as worker.py does.
'use strict';
const crypto = require('crypto');
const readline = require('readline');

const ENTRIES = 100000;
const COUNTERS = 20000;
const TEXTS = 40;
const SHARE = 40;
const WORDS = 'page fold share store merge worker request answer memory equal kernel digest number letter'.split(' ');

const worker = Number(process.argv[2]);

// What no other worker holds at that place.
function mark(place) {
  return Math.imul(worker * 1000003 + place, 2654435761) & 0x3fffffff;
}

// A map, and texts of its keys.
function part(entries, texts) {
  const table = new Map(entries);
  const keys = [...table.keys()];
  const at = (number) => Buffer.from(JSON.stringify(keys.slice(number * 2000, (number + 1) * 2000)));
  return { table, keys, texts: Array.from({ length: texts }, (_, number) => at(number)) };
}

// What all workers hold: the same numbers in the same order.
function* equalEntries() {
  let state = 1;
  for (let number = 0; number < ENTRIES; number++) {
    state = Number((BigInt(state) * 1103515245n + 12345n) % 2147483648n);
    const text = [3, 7, 11, 15, 19].map((shift) => WORDS[(state >> shift) % WORDS.length]).join(' ');
    yield [number + ':' + text, { number, text: text.slice(0, 24) }];
  }
}

// As long in every worker, so that nothing else moves by it.
function* ownEntries() {
  for (let place = 0; place < ENTRIES / SHARE; place++) {
    const number = mark(place);
    const text = number.toString(16).padStart(8, '0');
    yield [String(place).padStart(6, '0') + ':' + text + ' of one worker alone', { number, text: text.repeat(3) }];
  }
}

const equal = part(equalEntries(), TEXTS);
const own = part(ownEntries(), TEXTS / SHARE);
const counters = new Float64Array(COUNTERS);

function digest() {
  const total = crypto.createHash('sha256');
  for (const { table, texts } of [equal, own]) {
    for (const [key, value] of table) total.update(key + value.number + value.text);
    for (const text of texts) total.update(text);
  }
  return total.digest('hex') + ' ' + readAll();
}

function readAll() {
  let total = 0;
  for (const { table, texts } of [equal, own]) {
    for (const [key, value] of table) total += key.length + value.number + value.text.length;
    for (const text of texts) for (let index = 0; index < text.length; index += 64) total += text[index];
  }
  return total;
}

// Whether 20 entries of either part are what they must be.
function readSome(number) {
  let right = 0;
  for (let turn = 0; turn < 20; turn++) {
    let place = (number * 104729 + turn) % ENTRIES;
    if (equal.table.get(equal.keys[place]).number === place) right++;
    place %= ENTRIES / SHARE;
    if (own.table.get(own.keys[place]).number === mark(place)) right++;
  }
  return right === 40;
}

function raiseSome(array, number) {
  const start = (number * 7919) % COUNTERS;
  for (let index = start; index < Math.min(start + 50, COUNTERS); index++) array[index] += 1000;
}

const served = [];
console.log(digest());
readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const [word, text] = line.trim().split(' ');
  if (word === 'small') {
    const number = Number(text);
    const right = readSome(number);
    raiseSome(counters, number);
    served.push(number);
    console.log(right ? 'ok' : 'wrong');
  } else if (word === 'all') {
    console.log(String(readAll()));
  } else if (word === 'check') {
    const expected = new Float64Array(COUNTERS);
    for (const number of served) raiseSome(expected, number);
    const same = Buffer.compare(Buffer.from(counters.buffer), Buffer.from(expected.buffer)) === 0;
    console.log(digest() + ' ' + (same ? 'right' : 'wrong'));
  }
});
