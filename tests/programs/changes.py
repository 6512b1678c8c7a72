"""Memory that changes in all ways between dumps. A file `step` says when; `done` tells the step and a hash."""
import ctypes
import hashlib
import os
import random
import time

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
PRIVATE, FIXED, ANONYMOUS = 2, 16, 32
DONTNEED, HUGEPAGE = 4, 14


def fresh(pages, at=None):
    flags = PRIVATE | ANONYMOUS | (FIXED if at else 0)
    return libc.mmap(at, pages * PAGE, 3, flags, -1, 0)


def fill(start, pages, seed):
    numbers = random.Random(seed)
    for page in range(pages):
        ctypes.memmove(start + page * PAGE, numbers.randbytes(64), 64)


def digest(areas):
    whole = hashlib.sha256()
    for start, pages in areas:
        whole.update(ctypes.string_at(start, pages * PAGE))
    return whole.hexdigest()


large = fresh(4096)
fill(large, 4096, "large")
huge = fresh(2048)
libc.madvise(huge, 2048 * PAGE, HUGEPAGE)
fill(huge, 2048, "huge")
dropped, moved, replaced, reservation = fresh(64), fresh(64), fresh(64), fresh(64)
for number, start in enumerate((dropped, moved, replaced)):
    fill(start, 64, number)
heap = [os.urandom(900) for _ in range(2000)]


def change(step):
    """All of them show in the hash."""
    global moved
    numbers = random.Random(step)
    for page in numbers.sample(range(4096), 50):
        ctypes.memmove(large + page * PAGE + 100, step.to_bytes(4, "little"), 4)
    ctypes.memset(huge + 7 * PAGE * step, step, 3 * PAGE)
    # Zeros where contents were, and contents again in some of it.
    libc.madvise(dropped + 8 * PAGE, 32 * PAGE, DONTNEED)
    fill(dropped + 10 * PAGE, 4, step)
    # Old pages at a new address, and others where they were.
    target = fresh(64)
    assert libc.mremap(moved, 64 * PAGE, 64 * PAGE, 3, target) == target
    fill(moved_from := fresh(64, moved), 64, f"moved {step}")
    areas.append((moved_from, 64))
    moved = target
    # A new mapping at the place of an old one.
    libc.munmap(replaced, 64 * PAGE)
    fresh(64, replaced)
    fill(replaced + step % 8 * PAGE, 3, step)
    libc.mprotect(replaced, 16 * PAGE, 1)
    libc.mprotect(replaced, 16 * PAGE, 3)
    ctypes.memset(replaced + 12 * PAGE, step, PAGE)
    fill(reservation + step % 60 * PAGE, 1, step)
    heap.extend(os.urandom(700) for _ in range(300))


areas = []


def all_areas():
    fixed = [(large, 4096), (huge, 2048), (dropped, 64), (moved, 64), (replaced, 64), (reservation, 64)]
    return fixed + areas


def tell(step):
    whole = hashlib.sha256(digest(all_areas()).encode())
    for part in heap:
        whole.update(part)
    with open("done.new", "w") as done:
        done.write(f"{step} {whole.hexdigest()}\n")
    os.rename("done.new", "done")


# A child has its parent's memory and then changes its own.
if os.fork() == 0:
    last = 0
    while True:
        time.sleep(0.02)
        ctypes.memmove(large + last % 4096 * PAGE, b"child", 5)
        last += 1

last = 0
tell(last)
while True:
    time.sleep(0.01)
    try:
        step = int(open("step").read() or 0)
    except FileNotFoundError:
        continue
    if step != last:
        # A negative step only tells how things are.
        if step > 0:
            change(step)
        last = step
        tell(step)
