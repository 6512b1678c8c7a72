import java.io.FileOutputStream;
import java.nio.ByteBuffer;
import java.security.MessageDigest;
import java.util.ArrayList;
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

/** A thread pool that makes garbage and compiles its hot code while it runs, timers, direct memory. */
public final class Pool {
    private static final Map<Long, String> KEPT = new ConcurrentHashMap<>();
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

    private static long unit(long seed, FileOutputStream progress) throws Exception {
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
        byte[] digest = MessageDigest.getInstance("SHA-256").digest(new byte[] {(byte) seed});
        long parallel = LongStream.range(0, 20_000).parallel().map(n -> n * n % 1009).sum();
        KEPT.put(seed, words.toString() + digest[0]);
        synchronized (progress) {
            progress.write(String.format("%9d%n", DONE.incrementAndGet()).getBytes());
        }
        return sum ^ parallel ^ direct.getLong(8 * 4000) ^ words.get("word0");
    }

    public static void main(String[] arguments) throws Exception {
        int units = Integer.parseInt(arguments[0]);
        AtomicLong ticks = new AtomicLong();
        ScheduledExecutorService clock = Executors.newSingleThreadScheduledExecutor();
        clock.scheduleAtFixedRate(ticks::incrementAndGet, 1, 1, TimeUnit.MILLISECONDS);
        var pool = Executors.newFixedThreadPool(6);
        List<Future<Long>> results = new ArrayList<>();
        try (var progress = new FileOutputStream("progress")) {
            for (long seed = 1; seed <= units; seed++) {
                long mine = seed;
                results.add(pool.submit(() -> unit(mine, progress)));
            }
            long total = 0;
            for (Future<Long> result : results) {
                total = total * 31 + result.get();
            }
            long kept = 0;
            for (long seed = 1; seed <= units; seed++) {
                kept = kept * 31 + KEPT.get(seed).hashCode();
            }
            System.out.println("units " + DONE + " total " + total + " kept " + kept);
        }
        pool.shutdown();
        clock.shutdown();
        if (!clock.awaitTermination(5, TimeUnit.SECONDS) || ticks.get() == 0) {
            throw new IllegalStateException("the timer has not run");
        }
    }
}
