"""Downloads files over keep-alive connections and compares their hashes, one connection per thread.

    download.py PORT CONNECTIONS DIRECTORY

No connection may end before it has all it asked for. Writes the number of files that the slowest connection has
got to the file `progress` all the time; ends well when there is a file `stop`."""
import hashlib
import http.client
import os
import sys
import threading
import time

port, connections, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
hashes = {}
for name in sorted(os.listdir(directory)):
    with open(os.path.join(directory, name), "rb") as file:
        hashes[name] = hashlib.sha256(file.read()).digest()
names = list(hashes)
got = [0] * connections
failures = []
stop = threading.Event()


def download(index):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.connect()
    # Whoever loses the connection must not get another one unnoticed.
    connection.auto_open = 0
    try:
        while not stop.is_set():
            name = names[(got[index] + index) % len(names)]
            connection.request("GET", "/" + name)
            response = connection.getresponse()
            data = response.read()
            if response.status != 200 or response.will_close:
                raise RuntimeError(f"{name}: status {response.status}, closing {response.will_close}")
            if hashlib.sha256(data).digest() != hashes[name]:
                raise RuntimeError(f"{name}: {len(data)} bytes with another hash")
            got[index] += 1
    except Exception as error:
        failures.append(f"connection {index} after {got[index]} files: {error!r}")


threads = [threading.Thread(target=download, args=(index,)) for index in range(connections)]
for thread in threads:
    thread.start()
while not failures and not os.path.exists("stop"):
    with open("progress.new", "w") as file:
        file.write(str(min(got)))
    os.rename("progress.new", "progress")
    time.sleep(0.02)
stop.set()
if failures:
    print("\n".join(failures), file=sys.stderr, flush=True)
    os._exit(1)
for thread in threads:
    thread.join()
sys.exit("\n".join(failures) or None)
