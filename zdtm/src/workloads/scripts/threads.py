"""Python: threads that count under a lock, a subprocess on pipes, and an open temporary file."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

directory = sys.argv[1]


def verdict(text, code):
    with open(directory + "/result.new", "w") as out:
        out.write(text + "\n")
    os.rename(directory + "/result.new", directory + "/result")
    os._exit(code)


def check(condition, reason):
    if not condition:
        verdict("FAIL: " + reason, 1)


stop = threading.Event()
lock = threading.Lock()
total = 0
counts = [0] * 6


def count(index):
    global total
    while not stop.is_set():
        with lock:
            total += 1
            counts[index] += 1
        time.sleep(0.001)


# Not the event itself: its lock may be held by the very code that the handler interrupts.
stopping = []
signal.signal(signal.SIGTERM, lambda number, frame: stopping.append(number))
child = subprocess.Popen(
    ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
)
scratch = tempfile.TemporaryFile(dir=directory + "/files")
scratch.write(b"0123456789" * 1000)
scratch.seek(4321)
table = {n: str(n) * 3 for n in range(50000)}
threads = [threading.Thread(target=count, args=(index,)) for index in range(6)]
for thread in threads:
    thread.start()
pid = os.getpid()
time.sleep(0.02)
open(directory + "/ready", "w").close()
rounds = 0
while not stopping:
    stop.wait(0.005)
    rounds += 1
    message = b"round %d\n" % rounds
    child.stdin.write(message)
    child.stdin.flush()
    answer = child.stdout.readline()
    check(answer == message, "the child answered %r to %r" % (answer, message))
stop.set()
for thread in threads:
    thread.join(20)
    check(not thread.is_alive(), "a thread does not end")
check(total == sum(counts), "the threads counted %d, together %d" % (sum(counts), total))
check(all(counts), "a thread has not counted: %r" % counts)
check(scratch.read(4) == b"1234", "the temporary file is at another place")
check(os.getpid() == pid, "the pid was %d, is %d" % (pid, os.getpid()))
check(all(value == str(n) * 3 for n, value in table.items()), "the table has changed")
child.stdin.close()
check(child.wait(20) == 0, "the child ended with %r" % child.returncode)
verdict("PASS", 0)
