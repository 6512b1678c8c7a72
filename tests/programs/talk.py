"""Talks to a server over several connections, as fast as it answers, with several requests under way.

    talk.py PROTOCOL PORT CONNECTIONS [UNDER_WAY]

Every answer must be the next one, byte for byte. Writes the number of answers of the slowest connection to
the file `progress` all the time; ends well when there is a file `stop`, and then leaves the number of answers
of each connection in `answers`, once all that was asked is answered."""
import os
import selectors
import socket
import sys
import time


def filler(number, limit=3000):
    return b"%d." % number + b"x" * (number * 37 % limit)


def line(index, number):
    text = b"%d." % index + filler(number) + b"\n"
    return text, b"%d " % number + text


def echo(index, number):
    text = b"%d." % index + filler(number) + b"\n"
    return text, text


def redis(index, number):
    """Counts, appends to a list, sets and gets; each connection has keys of its own."""
    text = filler(number)
    kind = number % 4
    if kind == 0:
        return b"INCR counter:%d\r\n" % index, b":%d\r\n" % (number // 4)
    if kind == 1:
        return b"RPUSH list:%d %s\r\n" % (index, text), b":%d\r\n" % (number // 4 + 1)
    if kind == 2:
        return b"SET text:%d %s\r\n" % (index, text), b"+OK\r\n"
    text = filler(number - 1)
    return b"GET text:%d\r\n" % index, b"$%d\r\n%s\r\n" % (len(text), text)


def memcached(index, number):
    kind = number % 4
    if number == 1:
        return b"set counter:%d 0 0 1\r\n0\r\n" % index, b"STORED\r\n"
    if kind == 0:
        return b"incr counter:%d 1\r\n" % index, b"%d\r\n" % (number // 4)
    if kind == 1:
        return b"gets nothing:%d\r\n" % index, b"END\r\n"
    text = filler(number if kind == 2 else number - 1)
    if kind == 2:
        return b"set text:%d 7 0 %d\r\n%s\r\n" % (index, len(text), text), b"STORED\r\n"
    head = b"VALUE text:%d 7 %d\r\n" % (index, len(text))
    return b"get text:%d\r\n" % index, head + text + b"\r\nEND\r\n"


class Talk:
    """One connection."""

    def __init__(self, exchange, port, index, under_way):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.exchange, self.index = exchange, index
        self.asked, self.answered, self.received = 0, 0, b""
        for _ in range(under_way):
            self.ask()

    def fileno(self):
        return self.socket.fileno()

    def ask(self):
        self.asked += 1
        self.socket.sendall(self.exchange(self.index, self.asked)[0])

    def receive(self):
        data = self.socket.recv(1 << 16)
        if not data:
            sys.exit(f"connection {self.index} ended after {self.answered} answers")
        self.received += data
        answers = 0
        while self.received:
            wanted = self.exchange(self.index, self.answered + 1)[1]
            got = self.received[: len(wanted)]
            if got != wanted[: len(got)] or self.answered == self.asked:
                sys.exit(f"connection {self.index}: {got[:60]!r}, not {wanted[:60]!r}")
            if len(got) < len(wanted):
                break
            self.received = self.received[len(wanted) :]
            self.answered += 1
            answers += 1
        return answers


def publish(name, text):
    with open(name + ".new", "w") as file:
        file.write(text)
    os.rename(name + ".new", name)


def main():
    exchange = globals()[sys.argv[1]]
    port, connections = int(sys.argv[2]), int(sys.argv[3])
    under_way = int(sys.argv[4]) if len(sys.argv) > 4 else 8
    waiting = selectors.DefaultSelector()
    talks = [Talk(exchange, port, index, under_way) for index in range(connections)]
    for talk in talks:
        waiting.register(talk, selectors.EVENT_READ)
    longest, last, published = 0.0, time.monotonic(), 0.0
    stopping = False
    while not stopping or any(talk.answered < talk.asked for talk in talks):
        ready = waiting.select(0.05)
        for key, _ in ready:
            for _ in range(key.fileobj.receive()):
                if not stopping:
                    key.fileobj.ask()
        now = time.monotonic()
        if ready:
            longest, last = max(longest, now - last), now
        if now > published + 0.02:
            published = now
            stopping = os.path.exists("stop")
            publish("progress", str(min(talk.answered for talk in talks)))
    publish("answers", "".join(f"{talk.answered}\n" for talk in talks))
    print(f"longest pause {longest * 1000:.0f} ms")


main()
