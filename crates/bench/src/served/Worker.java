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
    static final String[] WORDS =
        "page fold share store merge worker request answer memory equal kernel digest number letter".split(" ");

    static final Map<String, int[]> table = new HashMap<>();
    static final List<String> keys = new ArrayList<>();
    static final byte[] block = new byte[4 << 20];
    static final long[] counters = new long[COUNTERS];

    static void load() {
        long state = 1;
        for (int number = 0; number < ENTRIES; number++) {
            state = (state * 1103515245L + 12345L) % 2147483648L;
            StringBuilder text = new StringBuilder().append(number).append(':');
            for (int shift = 3; shift < 20; shift += 4) text.append(WORDS[(int) (state >> shift) % WORDS.length]);
            String key = text.toString();
            keys.add(key);
            table.put(key, new int[] {number, number * 3, number * 7});
        }
        for (int index = 0; index < block.length; index++) {
            state = (state * 1103515245L + 12345L) % 2147483648L;
            block[index] = (byte) (state >> 16);
        }
    }

    static String digest() throws Exception {
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        for (String key : keys) {
            digest.update(key.getBytes(StandardCharsets.ISO_8859_1));
            for (int word : table.get(key)) {
                digest.update(new byte[] {(byte) word, (byte) (word >> 8), (byte) (word >> 16)});
            }
        }
        digest.update(block);
        StringBuilder text = new StringBuilder();
        for (byte one : digest.digest()) text.append(String.format("%02x", one));
        return text.toString();
    }

    static long readAll() {
        long total = 0;
        for (Map.Entry<String, int[]> entry : table.entrySet()) {
            total += entry.getKey().charAt(0);
            for (int word : entry.getValue()) total += word;
        }
        for (byte one : block) total += one;
        return total;
    }

    static void raiseSome(long[] array, int number) {
        int start = (int) (number * 7919L % COUNTERS);
        for (int index = start; index < Math.min(start + 50, COUNTERS); index++) array[index] += 1000;
    }

    public static void main(String[] words) throws Exception {
        load();
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
                    int right = 0;
                    for (int turn = 0; turn < 20; turn++) {
                        int place = (int) ((number * 104729L + turn) % ENTRIES);
                        if (table.get(keys.get(place))[0] == place) right++;
                    }
                    raiseSome(counters, number);
                    served.add(number);
                    System.out.println(right == 20 ? "ok" : "wrong");
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
