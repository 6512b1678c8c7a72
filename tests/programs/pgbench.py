"""Runs pgbench again and again, until there is a file `stop`.

    pgbench.py PGBENCH PORT SECONDS

Notes what each run acknowledged: the file `acknowledged` has the number of transactions in the end. Writes a
number that grows with the work to the file `progress`. Any complaint of pgbench is an error."""
import glob
import os
import re
import subprocess
import sys
import time

pgbench, port, seconds = sys.argv[1:]
command = [pgbench, "-h", "127.0.0.1", "-p", port, "-U", "postgres", "-n", "-c", "8", "-j", "2"]
command += ["-T", seconds, "--log", "--log-prefix=log", "postgres"]
acknowledged = runs = logged = 0


def note_progress():
    """A line per transaction is in the logs, whole pages of them at a time."""
    with open("progress.new", "w") as file:
        file.write(str(logged + sum(os.path.getsize(log) for log in glob.glob("log.*"))))
    os.rename("progress.new", "progress")


while not os.path.exists("stop"):
    with open("run.out", "w") as out, open("run.err", "w") as err:
        run = subprocess.Popen(command, stdout=out, stderr=err)
        while run.poll() is None:
            note_progress()
            time.sleep(0.05)
    text, complaints = open("run.out").read(), open("run.err").read()
    failed = re.search(r"number of failed transactions: (\d+)", text)
    done = re.search(r"number of transactions actually processed: (\d+)", text)
    if run.returncode or complaints or not done or not failed or int(failed[1]):
        sys.exit(f"pgbench ended with {run.returncode}: {text}{complaints}")
    acknowledged += int(done[1])
    runs += 1
    for log in glob.glob("log.*"):
        logged += os.path.getsize(log)
        os.unlink(log)
with open("acknowledged", "w") as file:
    file.write(str(acknowledged))
print(f"{acknowledged} transactions in {runs} runs")
