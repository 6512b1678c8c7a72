"""Threads of a pool that multiply matrices with numpy, and Python's own collector at work beside them.

They go round and round through the same seeds, which must give the same results, until there is a file `enough`.
"""
import gc
import hashlib
import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy

SEEDS = 24
SIZE = 160
progress = open("progress", "w")
guard = threading.Lock()
numbers = itertools.count()
done = 0
results = {}


class Node:
    """One of a ring of two, which only the collector can free."""

    freed = 0

    def __init__(self, number):
        self.number = number
        self.other = self

    def __del__(self):
        Node.freed += 1


def rings(count):
    for number in range(count):
        one, two = Node(number), Node(-number)
        one.other, two.other = two, one


def unit(seed):
    """A sum that comes out only if every element is right: whole numbers, which a double holds exactly."""
    generator = numpy.random.default_rng(seed)
    left = generator.integers(0, 1000, (SIZE, SIZE)).astype(numpy.float64)
    right = generator.integers(0, 1000, (SIZE, SIZE)).astype(numpy.float64)
    product = left @ right
    assert numpy.array_equal(product.sum(axis=0), left.sum(axis=0) @ right), "a product is wrong"
    words = numpy.sort(generator.integers(0, 1 << 62, 20000))
    assert (words[1:] >= words[:-1]).all(), "a sorted array is not"
    rings(200)
    return hashlib.sha256(product.tobytes() + words.tobytes()).hexdigest()


def work():
    global done
    while done < SEEDS or not os.path.exists("enough"):
        with guard:
            seed = next(numbers) % SEEDS
        digest = unit(seed)
        with guard:
            assert results.setdefault(seed, digest) == digest, f"seed {seed} has another result now"
            done += 1
            progress.write(f"{done:9}\n")
            progress.flush()


gc.set_threshold(500, 5, 5)
kept = numpy.arange(2_000_000)
with ThreadPoolExecutor(6) as pool:
    for one in [pool.submit(work) for _ in range(6)]:
        one.result()
gc.collect()
assert (kept == numpy.arange(2_000_000)).all(), "an array that nobody touched has changed"
assert Node.freed == done * 400, f"{Node.freed} objects were freed after {done} units"
print("result", hashlib.sha256("".join(results[seed] for seed in range(SEEDS)).encode()).hexdigest())
