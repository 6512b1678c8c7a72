"""One of each object that has an image of its own, for reading the images back."""
import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
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

# Descriptors without a file, by numbers of system calls where Python has no names for them.
libc = ctypes.CDLL(None, use_errno=True)


def descriptor(*arguments):
    fd = libc.syscall(*arguments)
    if fd < 0:
        raise OSError(ctypes.get_errno(), str(arguments))
    return fd


EVENTFD2, SIGNALFD4, TIMERFD_CREATE, TIMERFD_SETTIME = 290, 289, 283, 286
FANOTIFY_INIT, FANOTIFY_MARK, BPF = 300, 301, 321
eventfd = descriptor(EVENTFD2, 7, 0)
epoll = select.epoll()
epoll.register(pipe[0], select.EPOLLIN | select.EPOLLET)
epoll.register(eventfd, select.EPOLLOUT)
mask = ctypes.c_uint64(1 << (signal.SIGUSR1 - 1))
signalfd = descriptor(SIGNALFD4, -1, ctypes.byref(mask), 8, 0)
timerfd = descriptor(TIMERFD_CREATE, time.CLOCK_MONOTONIC, 0)
setting = (ctypes.c_int64 * 4)(5, 250, 900, 500)
descriptor(TIMERFD_SETTIME, timerfd, 0, ctypes.byref(setting), None)
inotify = libc.inotify_init1(0)
libc.inotify_add_watch(inotify, b".", 0x100)
libc.inotify_add_watch(inotify, b"plain", 0x2)
fanotify = descriptor(FANOTIFY_INIT, 0, 0)
descriptor(FANOTIFY_MARK, fanotify, 1, ctypes.c_uint64(2), -100, b"plain")
fcntl.lockf(kept[0], fcntl.LOCK_EX, 2, 1)
fcntl.flock(kept[2], fcntl.LOCK_SH)
attributes = ctypes.create_string_buffer(struct.pack("7I16s", 2, 4, 8, 3, 0, 0, 0, b"objects"), 72)
bpf_map = descriptor(BPF, 0, attributes, 72)
namespace = os.open("/proc/self/ns/uts", os.O_RDONLY)
pair = socket.socketpair()
pair[0].send(b"in the socket")
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sender.bind("sender")
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind("\0objects-%d" % time.time_ns())
sender.sendto(b"a datagram", receiver.getsockname())
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
accepted = server.accept()[0]
client.send(b"in the connection")
accepted.shutdown(socket.SHUT_WR)
datagrams = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
datagrams[0].bind(("127.0.0.1", 0))
datagrams[0].sendto(b"to itself", datagrams[0].getsockname())
netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
netlink.bind((0, 0))
# A protocol for experiments, which nobody speaks here.
packet = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
packet.bind(("lo", 0x88B5))

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
