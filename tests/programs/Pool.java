import java.io.FileOutputStream;
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import java.util.stream.LongStream;

/**
 * A thread pool that makes garbage and compiles its hot code while it runs, timers, direct memory. It goes round and
 * round through the same seeds, which must give the same results, until there is a file called enough.
 */
public final class Pool {
    private static final int SEEDS = 60;
    private static final Map<Long, String> KEPT = new ConcurrentHashMap<>();
    private static final AtomicLong STARTED = new AtomicLong();
    private static final AtomicLong DONE = new AtomicLong();

    /** A tree of objects that lives for one unit of work. */
    private record Node(long value, Node left, Node right) {
        static Node grow(long value, int depth) {
            return depth == 0
                ? new Node(value, null, null)
                : new Node(value, grow(value * 31 + 1, depth - 1), grow(value * 17 + 2, depth - 1));
        }

        long sum() {
            return value + (left == null ? 0 : left.sum() ^ right.sum());
        }
    }

    private static String unit(long seed) throws Exception {
        long sum = Node.grow(seed, 13).sum();
        Map<String, Long> words = new HashMap<>();
        for (long n = 0; n < 3000; n++) {
            words.merge("word" + (n * seed) % 97, n, Long::sum);
        }
        ByteBuffer direct = ByteBuffer.allocateDirect(1 << 16);
        while (direct.hasRemaining()) {
            direct.putLong(sum);
        }
        direct.flip();
        byte[] digest = MessageDigest.getInstance("SHA-256").digest(words.toString().getBytes());
        long parallel = LongStream.range(0, 20_000).parallel().map(n -> n * n % 1009).sum();
        return sum + " " + parallel + " " + direct.getLong(8 * 4000) + " " + Arrays.toString(digest);
    }

    private static Void work(FileOutputStream progress) throws Exception {
        while (DONE.get() < SEEDS || !Files.exists(Path.of("enough"))) {
            long seed = 1 + STARTED.getAndIncrement() % SEEDS;
            String result = unit(seed);
            String before = KEPT.putIfAbsent(seed, result);
            if (before != null && !before.equals(result)) {
                throw new IllegalStateException("seed " + seed + " gave " + before + ", now " + result);
            }
            synchronized (progress) {
                progress.write(String.format("%9d%n", DONE.incrementAndGet()).getBytes());
            }
        }
        return null;
    }

    public static void main(String[] arguments) throws Exception {
        AtomicLong ticks = new AtomicLong();
        ScheduledExecutorService clock = Executors.newSingleThreadScheduledExecutor();
        clock.scheduleAtFixedRate(ticks::incrementAndGet, 1, 1, TimeUnit.MILLISECONDS);
        var pool = Executors.newFixedThreadPool(6);
        List<Future<Void>> workers = new ArrayList<>();
        try (var progress = new FileOutputStream("progress")) {
            for (int nth = 0; nth < 6; nth++) {
                workers.add(pool.submit(() -> work(progress)));
            }
            for (Future<Void> worker : workers) {
                worker.get();
            }
        }
        for (long seed = 1; seed <= SEEDS; seed++) {
            System.out.println(seed + ": " + KEPT.get(seed));
        }
        pool.shutdown();
        clock.shutdown();
        if (!clock.awaitTermination(5, TimeUnit.SECONDS) || ticks.get() == 0) {
            throw new IllegalStateException("the timer has not run");
        }
    }
}
