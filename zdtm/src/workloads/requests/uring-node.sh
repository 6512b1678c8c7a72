# Node with its rings: writes a number into a file and reads it back, until it is told to stop.
export UV_USE_IO_URING=1
exec node -e '
const fs = require("fs");
const dir = process.argv[1];
let stop = false;
process.on("SIGTERM", () => { stop = true; });

function end(verdict) {
    fs.writeFileSync(dir + "/result.new", verdict + "\n");
    fs.renameSync(dir + "/result.new", dir + "/result");
    process.exit(verdict === "PASS" ? 0 : 1);
}

function hasRing() {
    return fs.readdirSync("/proc/self/fd").some((fd) => {
        try { return fs.readlinkSync("/proc/self/fd/" + fd).includes("io_uring"); } catch { return false; }
    });
}

async function main() {
    const file = dir + "/files/number";
    for (let count = 0; !stop; count++) {
        await fs.promises.writeFile(file, String(count));
        const found = await fs.promises.readFile(file, "utf8");
        if (found !== String(count)) end("FAIL: the file holds " + found + " after " + count);
        if (count === 3) {
            if (!hasRing()) end("FAIL: this node does not use io_uring");
            fs.writeFileSync(dir + "/ready", "");
        }
        await new Promise((resolve) => setTimeout(resolve, 2));
    }
    if (!hasRing()) end("FAIL: the rings are gone");
    end("PASS");
}
main().catch((error) => end("FAIL: " + error));
' "$1"
