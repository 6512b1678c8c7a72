"""Tasks that change all the time: `storm.py forks|threads|vforks|execs|namespaces`, until there is a file `enough`.

Writes a line to the file `progress` for each thing done, and at last whether all of them came out right.
"""
import ctypes
import os
import subprocess
import sys
import threading
import time


def enough():
    return os.path.exists("enough")


def in_children(count, work):
    """Runs `work` over and over in several processes."""
    pids = []
    for _ in range(count):
        pid = os.fork()
        if pid == 0:
            progress = os.open("progress", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            while not enough():
                work()
                os.write(progress, b"done\n")
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        assert os.waitpid(pid, 0) == (pid, 0), "a child went wrong"


def forks():
    """A child that leaves a grandchild alone, and one that dies at once."""
    first = os.fork()
    if first == 0:
        if os.fork() == 0:
            time.sleep(0.002)
            os._exit(1)
        os._exit(7)
    second = os.fork()
    if second == 0:
        os._exit(9)
    assert os.waitpid(first, 0) == (first, 7 << 8), "another exit code"
    assert os.waitpid(second, 0) == (second, 9 << 8), "another exit code"


def vforks():
    assert subprocess.run(["/bin/true"]).returncode == 0
    assert subprocess.run(["/bin/false"]).returncode == 1


def threads():
    found = []
    all_of_them = [threading.Thread(target=found.append, args=(number,)) for number in range(8)]
    for thread in all_of_them:
        thread.start()
    for thread in all_of_them:
        thread.join()
    assert sorted(found) == list(range(8)), found


def namespaces():
    """A child that lives in a UTS namespace of its own for a moment, and says so by its name."""
    pid = os.fork()
    if pid == 0:
        CLONE_NEWUTS, PR_SET_NAME = 0x04000000, 15
        assert libc.unshare(CLONE_NEWUTS) == 0
        libc.prctl(PR_SET_NAME, b"elsewhere", 0, 0, 0)
        time.sleep(0.004)
        # A dead one has the name too, and no namespaces.
        libc.prctl(PR_SET_NAME, b"dying", 0, 0, 0)
        os._exit(3)
    assert os.waitpid(pid, 0) == (pid, 3 << 8), "another exit code"
    time.sleep(0.03)


def spin():
    while True:
        pass


def execs(count):
    """One of several threads executes this program again; the others are in all kinds of states then."""
    with open("progress", "a") as progress:
        progress.write("done\n")
    if enough():
        return
    for _ in range(3):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    sys.setswitchinterval(0.0005)
    threading.Thread(target=spin, daemon=True).start()
    again = [sys.executable, "-S", "-E", __file__, "execs", str(count + 1)]
    last = threading.Thread(target=os.execv, args=(again[0], again))
    last.start()
    last.join()


kind = sys.argv[1]
if kind == "execs":
    pid = os.getpid()
    execs(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    assert os.getpid() == pid
elif kind == "namespaces":
    libc = ctypes.CDLL(None)
    in_children(1, namespaces)
else:
    in_children(4, {"forks": forks, "threads": threads, "vforks": vforks}[kind])
print("all as it should be")
