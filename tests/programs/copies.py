"""Copies a file to a host called `there` and another one back, at the same time, again and again, until there is
a file `stop`. Compares each copy with its original. Writes the number of bytes copied to the file `progress`."""
import hashlib
import os
import random
import subprocess
import sys
import time

SIZE = 24 << 20
here = os.getcwd()
scp = ["scp", "-q", "-F", "config"]


def digest(name):
    with open(name, "rb") as file:
        return hashlib.sha256(file.read()).digest()


def size(name):
    return os.path.getsize(name) if os.path.exists(name) else 0


with open("original", "wb") as file:
    file.write(random.Random(1).randbytes(SIZE))
wanted = digest("original")
done = runs = 0
while not os.path.exists("stop"):
    # To there and from there; the older protocol of scp in every other run.
    older = ["-O"] if runs % 2 else []
    copies = [
        subprocess.Popen(scp + older + ["original", f"there:{here}/sent"]),
        subprocess.Popen(scp + older + [f"there:{here}/original", "fetched"]),
    ]
    while any(copy.poll() is None for copy in copies):
        with open("progress.new", "w") as file:
            file.write(str(done + size("sent") + size("fetched")))
        os.rename("progress.new", "progress")
        time.sleep(0.02)
    codes = [copy.returncode for copy in copies]
    if any(codes):
        sys.exit(f"scp ended with {codes} in run {runs}")
    for name in ["sent", "fetched"]:
        if digest(name) != wanted:
            sys.exit(f"{name} has {size(name)} bytes that are not the original's in run {runs}")
        os.unlink(name)
    done += 2 * SIZE
    runs += 1
print(f"{runs} runs of two copies")
