// A worker of `bench workers` for Node, which speaks as worker.py does.
'use strict';
const crypto = require('crypto');
const readline = require('readline');

const ENTRIES = 100000;
const COUNTERS = 20000;
const TEXTS = 40;
const WORDS = 'page fold share store merge worker request answer memory equal kernel digest number letter'.split(' ');

const table = new Map();
let state = 1;
for (let number = 0; number < ENTRIES; number++) {
  state = Number((BigInt(state) * 1103515245n + 12345n) % 2147483648n);
  const text = [3, 7, 11, 15, 19].map((shift) => WORDS[(state >> shift) % WORDS.length]).join(' ');
  table.set(number + ':' + text, { number, text: text.slice(0, 24) });
}
const keys = [...table.keys()];
const texts = [];
for (let number = 0; number < TEXTS; number++) {
  texts.push(Buffer.from(JSON.stringify(keys.slice(number * 2000, (number + 1) * 2000))));
}
const counters = new Float64Array(COUNTERS);

function digest() {
  const total = crypto.createHash('sha256');
  for (const [key, value] of table) total.update(key + value.number + value.text);
  for (const text of texts) total.update(text);
  return total.digest('hex');
}

function readAll() {
  let total = 0;
  for (const [key, value] of table) total += key.length + value.number + value.text.length;
  for (const text of texts) for (let index = 0; index < text.length; index += 64) total += text[index];
  return total;
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
    let right = 0;
    for (let turn = 0; turn < 20; turn++) {
      const place = (number * 104729 + turn) % ENTRIES;
      if (table.get(keys[place]).number === place) right++;
    }
    raiseSome(counters, number);
    served.push(number);
    console.log(right === 20 ? 'ok' : 'wrong');
  } else if (word === 'all') {
    console.log(String(readAll()));
  } else if (word === 'check') {
    const expected = new Float64Array(COUNTERS);
    for (const number of served) raiseSome(expected, number);
    const same = Buffer.compare(Buffer.from(counters.buffer), Buffer.from(expected.buffer)) === 0;
    console.log(digest() + ' ' + (same ? 'right' : 'wrong'));
  }
});
