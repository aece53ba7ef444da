// A worker of `bench workers` for the JVM, which speaks as worker.py does.
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

public class Worker {
    static final int ENTRIES = 100_000;
    static final int COUNTERS = 20_000;
    static final int BLOCK = 4 << 20;
    static final int SHARE = 40;
    static final String[] WORDS =
        "page fold share store merge worker request answer memory equal kernel digest number letter".split(" ");

    /** A map, its keys in order, and a block of bytes. */
    static class Part {
        final Map<String, int[]> table = new HashMap<>();
        final List<String> keys = new ArrayList<>();
        final byte[] block;

        Part(int bytes) {
            block = new byte[bytes];
        }

        void add(String key, int number) {
            keys.add(key);
            table.put(key, new int[] {number, number * 3, number * 7});
        }

        void fill(long state) {
            for (int index = 0; index < block.length; index++) {
                state = next(state);
                block[index] = (byte) (state >> 16);
            }
        }

        void digest(MessageDigest digest) {
            for (String key : keys) {
                digest.update(key.getBytes(StandardCharsets.ISO_8859_1));
                for (int word : table.get(key)) {
                    digest.update(new byte[] {(byte) word, (byte) (word >> 8), (byte) (word >> 16)});
                }
            }
            digest.update(block);
        }

        long readAll() {
            long total = 0;
            for (Map.Entry<String, int[]> entry : table.entrySet()) {
                total += entry.getKey().charAt(0);
                for (int word : entry.getValue()) total += word;
            }
            for (byte one : block) total += one;
            return total;
        }
    }

    static final Part equal = new Part(BLOCK);
    static final Part own = new Part(BLOCK / SHARE);
    static final long[] counters = new long[COUNTERS];

    static long next(long state) {
        return (state * 1103515245L + 12345L) % 2147483648L;
    }

    /** What no other worker holds at that place. */
    static int mark(int worker, int place) {
        return (int) ((worker * 1000003L + place) * 2654435761L & 0x3fffffffL);
    }

    static void load(int worker) {
        long state = 1;
        for (int number = 0; number < ENTRIES; number++) {
            state = next(state);
            StringBuilder text = new StringBuilder().append(number).append(':');
            for (int shift = 3; shift < 20; shift += 4) text.append(WORDS[(int) (state >> shift) % WORDS.length]);
            equal.add(text.toString(), number);
        }
        equal.fill(state);
        // As long in every worker, so that nothing else moves by it.
        for (int place = 0; place < ENTRIES / SHARE; place++) {
            int number = mark(worker, place);
            own.add(String.format("%06d:%08x of one worker alone", place, number), number);
        }
        own.fill(mark(worker, 0));
    }

    static String digest() throws Exception {
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        equal.digest(digest);
        own.digest(digest);
        StringBuilder text = new StringBuilder();
        for (byte one : digest.digest()) text.append(String.format("%02x", one));
        return text + " " + readAll();
    }

    static long readAll() {
        return equal.readAll() + own.readAll();
    }

    /** Whether 20 entries of either part are what they must be. */
    static boolean readSome(int worker, int number) {
        int right = 0;
        for (int turn = 0; turn < 20; turn++) {
            int place = (int) ((number * 104729L + turn) % ENTRIES);
            if (equal.table.get(equal.keys.get(place))[0] == place) right++;
            place %= ENTRIES / SHARE;
            if (own.table.get(own.keys.get(place))[0] == mark(worker, place)) right++;
        }
        return right == 40;
    }

    static void raiseSome(long[] array, int number) {
        int start = (int) (number * 7919L % COUNTERS);
        for (int index = start; index < Math.min(start + 50, COUNTERS); index++) array[index] += 1000;
    }

    public static void main(String[] words) throws Exception {
        int worker = Integer.parseInt(words[0]);
        load(worker);
        String first = digest();
        // What lives long is where it stays before the first request.
        System.gc();
        System.out.println(first);
        List<Integer> served = new ArrayList<>();
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in));
        for (String line = input.readLine(); line != null; line = input.readLine()) {
            String[] parts = line.trim().split(" ");
            switch (parts[0]) {
                case "small": {
                    int number = Integer.parseInt(parts[1]);
                    boolean right = readSome(worker, number);
                    raiseSome(counters, number);
                    served.add(number);
                    System.out.println(right ? "ok" : "wrong");
                    break;
                }
                case "all":
                    System.out.println(readAll());
                    break;
                case "check": {
                    long[] expected = new long[COUNTERS];
                    for (int number : served) raiseSome(expected, number);
                    System.out.println(digest() + (Arrays.equals(counters, expected) ? " right" : " wrong"));
                    break;
                }
                default:
            }
        }
    }
}
