"""One of each object that has an image of its own, for reading the images back."""
import ctypes
import fcntl
import mmap
import os
import signal
import threading
import time

kept = [open("plain", "w+"), open("plain", "a"), os.open(".", os.O_RDONLY)]
kept[0].write("text")
kept[0].flush()
ghost = open("ghost", "w+")
ghost.write("g" * 5000)
ghost.flush()
os.unlink("ghost")
sparse = open("sparse", "w+")
os.ftruncate(sparse.fileno(), 1 << 20)
os.pwrite(sparse.fileno(), b"middle", 500000)
os.unlink("sparse")
pipe = os.pipe()
os.write(pipe[1], b"in the pipe")
fcntl.fcntl(pipe[0], fcntl.F_SETFD, fcntl.FD_CLOEXEC)
os.mkfifo("fifo")
fifo = os.open("fifo", os.O_RDWR)
os.write(fifo, b"in the fifo")
memfd = os.memfd_create("a memfd")
os.write(memfd, b"m" * 10000)
path_only = os.open("plain", os.O_PATH)

private = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
private[:5] = b"hello"
shared = mmap.mmap(-1, 1 << 16, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
shared[:5] = b"hello"
mapped = mmap.mmap(sparse.fileno(), 8192)

# Before the thread starts, which inherits the mask, so that the signal stays pending.
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGHUP])
threading.Thread(target=time.sleep, args=(1000,), daemon=True, name="sleeper").start()
signal.setitimer(signal.ITIMER_REAL, 900, 7)
signal.signal(signal.SIGUSR1, lambda number, frame: None)
os.kill(os.getpid(), signal.SIGUSR2)
ctypes.CDLL(None).prctl(15, b"objects", 0, 0, 0)
os.umask(0o27)

if os.fork() == 0:
    shared[5:10] = b"child"
    os.setpgid(0, 0)
    while True:
        time.sleep(1000)
zombie = os.fork()
if zombie == 0:
    os._exit(3)
os.waitid(os.P_PID, zombie, os.WEXITED | os.WNOWAIT)
print("ready", flush=True)
while True:
    time.sleep(1000)
