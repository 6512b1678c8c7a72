"""Talks to the line server over several connections, as fast as it answers, with several lines under way.

Every answer must be the next one, with the very text that was sent. Writes the number of answers of the
slowest connection to the file PROGRESS all the time; ends well when the file STOP exists."""
import os
import select
import socket
import sys
import time

port, connections, progress, stop = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
UNDER_WAY = 8


class Talk:
    def __init__(self, index):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.index, self.sent, self.answered, self.buffer = index, 0, 0, b""
        for _ in range(UNDER_WAY):
            self.send()

    def text(self, number):
        return f"{self.index}.{number}." + "x" * (number * 37 % 3000)

    def send(self):
        self.sent += 1
        self.socket.sendall(self.text(self.sent).encode() + b"\n")

    def receive(self):
        data = self.socket.recv(1 << 16)
        if not data:
            sys.exit(f"connection {self.index} ended after {self.answered} answers")
        self.buffer += data
        while b"\n" in self.buffer:
            line, self.buffer = self.buffer.split(b"\n", 1)
            self.answered += 1
            wanted = f"{self.answered} {self.text(self.answered)}"
            if line.decode() != wanted:
                sys.exit(f"connection {self.index}: got {line[:60]!r}, not {wanted[:60]!r}")
            self.send()


talks = {}
for index in range(connections):
    talk = Talk(index)
    talks[talk.socket.fileno()] = talk
longest, last = 0.0, time.monotonic()
while not os.path.exists(stop):
    ready, _, _ = select.select(list(talks), [], [], 0.05)
    for number in ready:
        talks[number].receive()
    now = time.monotonic()
    if ready:
        longest, last = max(longest, now - last), now
    with open(progress + ".new", "w") as file:
        file.write(str(min(talk.answered for talk in talks.values())))
    os.rename(progress + ".new", progress)
print(f"longest pause {longest * 1000:.0f} ms")
