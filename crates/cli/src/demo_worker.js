// One worker of the demonstration, where there is no Python: as demo_worker.py, without the database.
'use strict';
const crypto = require('crypto');
const fs = require('fs');
const readline = require('readline');

const ENTRIES = 100000;
const COUNTERS = 20000;

const table = new Map();
const texts = [];
for (const path of process.argv.slice(1)) {
  const text = fs.readFileSync(path);
  texts.push(text);
  for (const line of text.toString('latin1').split('\n')) {
    if (table.size === ENTRIES) break;
    table.set(table.size + ':' + line, [line.length, line.slice(0, 24)]);
  }
}
while (table.size < ENTRIES) table.set(table.size + ':', [0, '']);
const keys = [...table.keys()];
const counters = new Float64Array(COUNTERS);

function digest() {
  const total = crypto.createHash('sha256');
  for (const [key, value] of table) total.update(key + value[0] + value[1]);
  for (const text of texts) total.update(text);
  return total.digest('hex');
}

function touch(array, step) {
  const start = (step * 7919) % COUNTERS;
  for (let index = start; index < Math.min(start + 50, COUNTERS); index++) array[index] += 1000;
}

let steps = 0;
console.log(digest());
readline.createInterface({ input: process.stdin }).on('line', (line) => {
  const [word, number] = line.trim().split(' ');
  if (word === 'work') {
    for (let round = 0; round < Number(number); round++) {
      touch(counters, steps);
      for (let index = steps % 97; index < 2000; index += 97) if (!table.has(keys[index])) process.exit(1);
      steps++;
    }
    console.log('worked', steps);
  } else if (word === 'check') {
    const expected = new Float64Array(COUNTERS);
    for (let step = 0; step < steps; step++) touch(expected, step);
    console.log(digest(), Buffer.compare(Buffer.from(counters.buffer), Buffer.from(expected.buffer)) ? 'wrong' : 'right');
  }
});
