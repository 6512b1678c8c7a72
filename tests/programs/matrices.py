"""Threads of a pool that multiply matrices with numpy, and Python's own collector at work beside them."""
import gc
import hashlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy

UNITS = int(sys.argv[1])
SIZE = 160
progress = open("progress", "w")
guard = threading.Lock()
done = 0


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
    global done
    generator = numpy.random.default_rng(seed)
    left = generator.integers(0, 1000, (SIZE, SIZE)).astype(numpy.float64)
    right = generator.integers(0, 1000, (SIZE, SIZE)).astype(numpy.float64)
    product = left @ right
    assert numpy.array_equal(product.sum(axis=0), left.sum(axis=0) @ right), "a product is wrong"
    words = numpy.sort(generator.integers(0, 1 << 62, 20000))
    assert (words[1:] >= words[:-1]).all(), "a sorted array is not"
    rings(200)
    digest = hashlib.sha256(product.tobytes() + words.tobytes()).hexdigest()
    with guard:
        done += 1
        progress.write(f"{done:9}\n")
        progress.flush()
    return digest


gc.set_threshold(500, 5, 5)
kept = numpy.arange(2_000_000)
with ThreadPoolExecutor(6) as pool:
    digests = list(pool.map(unit, range(UNITS)))
gc.collect()
assert (kept == numpy.arange(2_000_000)).all(), "an array that nobody touched has changed"
print("units", done, "freed", Node.freed, hashlib.sha256("".join(digests).encode()).hexdigest())
