// Worker threads with heaps of their own, the pool of libuv, timers and files, and garbage for the collector.
// Each goes round and round through its seeds, which must give the same results, until there is a file `enough`.
'use strict';
const { Worker, isMainThread, parentPort, workerData } = require('node:worker_threads');
const crypto = require('node:crypto');
const fs = require('node:fs');
const { promisify } = require('node:util');
const zlib = require('node:zlib');

const SEEDS = 16;
const derive = promisify(crypto.pbkdf2);
const gzip = promisify(zlib.gzip);
const gunzip = promisify(zlib.gunzip);

function garbage(seed) {
  const map = new Map();
  for (let n = 0; n < 4000; n++) {
    map.set(`key ${(n * seed) % 911}`, { n, text: 'x'.repeat(n % 50), list: [n, seed] });
  }
  let sum = 0;
  for (const [key, { n, text, list }] of map) sum += key.length * n + text.length + list[1];
  return sum;
}

async function unit(seed) {
  const sum = garbage(seed);
  const key = await derive(`word ${seed}`, 'salt', 2000, 32, 'sha256');
  const text = Buffer.from(`${sum} `.repeat(3000));
  const back = await gunzip(await gzip(text));
  if (!back.equals(text)) throw new Error('gzip and gunzip gave another text');
  await new Promise((resolve) => setTimeout(resolve, 1));
  return crypto.createHash('sha256').update(key).update(back).digest('hex');
}

async function work(first) {
  const results = [];
  for (let n = 0; n < SEEDS || !fs.existsSync('enough'); n++) {
    const seed = n % SEEDS;
    const result = await unit(first + seed);
    results[seed] ??= result;
    if (results[seed] !== result) throw new Error(`seed ${seed} has another result now`);
    parentPort.postMessage({ seed });
  }
  parentPort.postMessage({ results });
}

async function main() {
  const progress = await fs.promises.open('progress', 'w');
  let done = 0;
  let ticks = 0;
  const timer = setInterval(() => { ticks += 1; }, 2);
  const all = [0, 100, 200].map((first) => new Promise((resolve, reject) => {
    const worker = new Worker(__filename, { workerData: first });
    worker.on('error', reject);
    worker.on('message', ({ results }) => {
      if (results) return resolve(results);
      done += 1;
      fs.writeSync(progress.fd, `${String(done).padStart(9)}\n`);
    });
  }));
  const results = (await Promise.all(all)).flat();
  clearInterval(timer);
  await progress.close();
  if (ticks === 0) throw new Error('the timer has not run');
  console.log(results.join('\n'));
}

if (isMainThread) main(); else work(workerData);
