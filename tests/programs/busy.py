"""Threads that compute, a pipe to a child and back, and a database that stays open."""
import sqlite3
import subprocess
import threading
import time

ROWS = 600
# Without file locks: nobody else has the file, and held locks need an option of their own.
database = sqlite3.connect("file:rows.db?mode=rwc&nolock=1", uri=True, check_same_thread=False)
database.execute("create table row (number integer primary key, thread text, value integer)")
guard = threading.Lock()
child = subprocess.Popen(
    ["sed", "-u", "s/^/echo /"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
progress = open("progress", "w")


def insert(name, value):
    for _ in range(ROWS):
        value = (value * 1103515245 + 12345) % 2147483648
        with guard, database:
            database.execute("insert into row (thread, value) values (?, ?)", (name, value))
        time.sleep(0.004)


def talk(answers):
    for number in range(ROWS):
        child.stdin.write(f"line {number}\n")
        child.stdin.flush()
        answers.append(child.stdout.readline())
        progress.write("x" * 100)
        progress.flush()
        time.sleep(0.004)


answers = []
threads = [threading.Thread(target=insert, args=(f"t{n}", n)) for n in range(4)]
threads.append(threading.Thread(target=talk, args=(answers,)))
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
child.stdin.close()
print("child", child.wait(), "answers", len(answers), answers[-1].strip())
assert answers == [f"echo line {number}\n" for number in range(ROWS)]
query = "select thread, count(*), sum(value), max(value) from row group by thread order by thread"
for row in database.execute(query):
    print(*row)
print(database.execute("pragma integrity_check").fetchone()[0])
