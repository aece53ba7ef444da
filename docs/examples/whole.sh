#!/usr/bin/env bash
# Programs that check themselves, run without pagefold and then under `pagefold run --scope all`. Both must end alike.
#
#   docs/examples/whole.sh [NAME...]      python node java redis postgres stress
#
# PAGEFOLD names the program (default: pagefold along PATH). What is not installed is said and left out; on Debian:
# apt install libpython3-testsuite nodejs default-jdk-headless redis-server postgresql postgresql-contrib stress-ng.
# PostgreSQL does not run as root: as root this uses setpriv and the user postgres, and lets others have a userfaultfd
# meanwhile. Each stressor of stress-ng runs for STRESS_SECONDS (20). The exit status is 1 if anything went otherwise than
# without. How many pages were merged is told of each: short tests may end before there is anything to merge.
set -uo pipefail

pagefold=$(command -v "${PAGEFOLD:-pagefold}") || {
    echo "whole.sh: no pagefold along PATH; set PAGEFOLD" >&2
    exit 2
}
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
chmod 755 "$here"
wrong=0
# Whom both run as, and what else pagefold is told.
as=() options=()

# say NAME STATUS_WITHOUT STATUS_WITH SUMMARY
say() {
    local name=$1 without=$2 with=$3 summary=$4 word=same
    if [ "$without" -ne "$with" ]; then
        word=DIFFERENT wrong=1
    fi
    /usr/bin/python3 - "$name" "$word" "$without" "$with" "$summary" <<'P'
import json, sys
name, word, without, with_, summary = sys.argv[1:]
try:
    s = json.load(open(summary))
    told = "%d members, %d pages merged, %.1f MiB saved at most, %d refused, CPU %.1f s" % (
        s["processes_ever"], s["merges"], s["bytes_saved_peak"] / 2**20, len(s["helper_refused"]), s["cpu_seconds"])
    for why in s["helper_refused"][:3]:
        told += "\n             left alone: " + why
except (OSError, ValueError) as error:
    told = "no summary: %s" % error
print("%-22s %s (status %s, %s): %s" % (name, word, without, with_, told))
P
}

# both NAME CMD...: without and with
both() {
    local name=$1 without with
    shift
    "${as[@]}" "$@" >"$here/without.out" 2>&1 </dev/null
    without=$?
    "${as[@]}" "$pagefold" run --quiet --scope all --stable 0.5 "${options[@]}" --summary "$here/summary" -- "$@" \
        >"$here/with.out" 2>&1 </dev/null
    with=$?
    say "$name" "$without" "$with" "$here/summary"
    [ "$without" -eq "$with" ] || tail -25 "$here/with.out"
    # Tests of Python's suite that fail by themselves may; others may not.
    local only
    only=$(comm -13 <(failed "$here/without.out") <(failed "$here/with.out"))
    [ -z "$only" ] || { wrong=1 && echo "             failed only with pagefold: $only"; }
    only=$(failed "$here/without.out" | tr '\n' ' ')
    [ -z "$only" ] || echo "             fails without pagefold: $only"
}

# The names of what failed in a run of Python's suite.
failed() {
    sed -nE 's/^(FAIL|ERROR): ([^ ]+) .*/\2/p' "$1" | sort -u
}

of_python() {
    /usr/bin/python3 -c 'import test.test_threading' 2>/dev/null || {
        echo "python: its test suite is not installed"
        return
    }
    local suite
    for suite in test_threading test_mmap test_subprocess test_multiprocessing_spawn test_multiprocessing_fork test_gc \
        test_signal test_faulthandler; do
        /usr/bin/python3 -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('test.$suite') is None)" ||
            continue
        both "python $suite" /usr/bin/python3 -m test -q "$suite"
    done
}

of_node() {
    command -v node >/dev/null || {
        echo "node: not installed"
        return
    }
    cat >"$here/workers.js" <<'J'
const { Worker, isMainThread, parentPort } = require('worker_threads');
const { createHash } = require('crypto');
function work() {
  const digests = new Set();
  const end = Date.now() + 8000;
  while (Date.now() < end) {
    const map = new Map();
    for (let n = 0; n < 60000; n++) map.set('key ' + n, { n, text: 'x'.repeat(n % 50) });
    const block = Buffer.alloc(4 << 20, 'block');
    const hash = createHash('sha256');
    for (const [key, value] of map) hash.update(key + value.n + value.text);
    hash.update(block);
    digests.add(hash.digest('hex'));
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 700);
  }
  return [...digests];
}
if (isMainThread) {
  const all = [];
  let open = 4;
  for (let n = 0; n < 4; n++) {
    new Worker(__filename).on('message', (digests) => {
      all.push(...digests);
      if (--open === 0) process.exit(new Set(all).size === 1 ? 0 : 1);
    });
  }
} else parentPort.postMessage(work());
J
    both "node worker threads" node "$here/workers.js"
}

of_java() {
    command -v javac >/dev/null || {
        echo "java: no JDK installed"
        return
    }
    cat >"$here/Check.java" <<'J'
import java.security.MessageDigest;
import java.util.*;
import java.util.concurrent.*;

public class Check {
    static String once() throws Exception {
        Map<String, int[]> map = new HashMap<>();
        for (int n = 0; n < 40000; n++) map.put("key " + n, new int[] {n, n * 3, n * 7});
        byte[] block = new byte[4 << 20];
        new Random(7).nextBytes(block);
        Thread.sleep(600);
        MessageDigest digest = MessageDigest.getInstance("SHA-256");
        for (int n = 0; n < 40000; n++) for (int word : map.get("key " + n)) digest.update((byte) word);
        digest.update(block);
        return HexFormat.of().formatHex(digest.digest());
    }

    public static void main(String[] words) throws Exception {
        ExecutorService threads = Executors.newFixedThreadPool(4);
        List<Callable<Set<String>>> tasks = new ArrayList<>();
        for (int task = 0; task < 4; task++) {
            tasks.add(() -> {
                Set<String> digests = new HashSet<>();
                long end = System.nanoTime() + 9_000_000_000L;
                while (System.nanoTime() < end) digests.add(once());
                return digests;
            });
        }
        Set<String> all = new HashSet<>();
        for (Future<Set<String>> found : threads.invokeAll(tasks)) all.addAll(found.get());
        threads.shutdown();
        System.exit(all.size() == 1 ? 0 : 1);
    }
}
J
    javac -d "$here" "$here/Check.java" || return
    both "java, serial GC" java -XX:+UseSerialGC -Xmx256m -cp "$here" Check
    both "java, G1" java -XX:+UseG1GC -Xmx256m -cp "$here" Check
}

of_redis() {
    command -v redis-server >/dev/null && command -v redis-benchmark >/dev/null || {
        echo "redis: not installed"
        return
    }
    cat >"$here/redis.py" <<'P'
"""Keys that are checked live and from the snapshot, while redis-benchmark works on others and snapshots are made."""
import hashlib, socket, subprocess, sys, tempfile, time
KEYS = 60000
folder = tempfile.mkdtemp()
path = folder + '/socket'

def value(number):
    return hashlib.sha256(b'%d' % (number // 3)).hexdigest().encode() * 4

def start():
    server = subprocess.Popen(['redis-server', '--port', '0', '--unixsocket', path, '--dir', folder, '--save', ''],
                              stdout=subprocess.DEVNULL)
    for _ in range(100):
        try:
            link = socket.socket(socket.AF_UNIX)
            link.connect(path)
            file = link.makefile('rwb')
            file.write(b'PING\r\n')
            file.flush()
            if file.readline() == b'+PONG\r\n':
                return server, file
        except OSError:
            pass
        # Not there yet, or it loads its snapshot.
        time.sleep(0.1)
    sys.exit('no redis-server')

def ask(link, *words):
    link.write(b'*%d\r\n' % len(words) + b''.join(b'$%d\r\n%s\r\n' % (len(word), word) for word in words))
    link.flush()
    return answer(link)

def answer(link):
    line = link.readline()
    kind, rest = line[:1], line[1:-2]
    if kind == b'$':
        return link.read(int(rest) + 2)[:-2] if int(rest) >= 0 else None
    assert kind in b'+:', line
    return rest

def check(link):
    wrong = [n for n in range(KEYS) if ask(link, b'GET', b'check:%d' % n) != value(n)]
    assert not wrong, 'wrong keys: %s' % wrong[:5]

server, link = start()
for number in range(KEYS):
    ask(link, b'SET', b'check:%d' % number, value(number))
benchmark = subprocess.Popen(['redis-benchmark', '-s', path, '-q', '-l', '-r', '50000', '-n', '100000', '-c', '20', '-d', '100',
                              '-t', 'set,get,incr,lpush,lpop,sadd,hset,mset'], stdout=subprocess.DEVNULL)
end, saves = time.time() + 20, 0
while time.time() < end:
    ask(link, b'BGSAVE')
    while b'rdb_bgsave_in_progress:1' in ask(link, b'INFO', b'persistence'):
        time.sleep(0.05)
    assert b'rdb_last_bgsave_status:ok' in ask(link, b'INFO', b'persistence')
    saves += 1
    time.sleep(0.3)
benchmark.kill()
benchmark.wait()
check(link)
ask(link, b'SAVE')
server.kill()
server.wait()
server, link = start()
check(link)
server.kill()
print(saves, 'snapshots')
P
    both "redis, benchmark" /usr/bin/python3 "$here/redis.py"
}

of_postgres() {
    local bin as=()
    bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | tail -1)
    [ -x "$bin/postgres" ] && [ -x "$bin/pgbench" ] || {
        echo "postgres: not installed"
        return
    }
    if [ "$(id -u)" -eq 0 ]; then
        chown -R postgres "$here"
        cp "$pagefold" "$here/pagefold" && local pagefold="$here/pagefold"
        as=(setpriv --reuid postgres --regid postgres --clear-groups --)
        # It needs userfaultfd as that user, for as long as this takes.
        mode=$(stat -c %a /dev/userfaultfd)
        chmod 666 /dev/userfaultfd
        trap 'chmod "$mode" /dev/userfaultfd; rm -rf "$here"' EXIT
    fi
    cat >"$here/postgres.sh" <<J
set -e
folder=\$(mktemp -d "$here/data.XXXX")
"$bin/initdb" -D "\$folder/data" --data-checksums -A trust -U me >/dev/null
"$bin/postgres" -D "\$folder/data" -k "\$folder" -c listen_addresses= -c shared_buffers=32MB >"\$folder/log" 2>&1 &
server=\$!
for turn in \$(seq 100); do "$bin/pg_isready" -q -h "\$folder" -U me && break; sleep 0.1; done
"$bin/createdb" -h "\$folder" -U me bench
"$bin/pgbench" -q -h "\$folder" -U me -i -s 5 bench >/dev/null 2>&1
"$bin/pgbench" -h "\$folder" -U me -c 8 -j 2 -T 15 bench >/dev/null
# What pgbench keeps: every change of an account is in its branch's and in its teller's balance, and in the history.
sum=\$("$bin/psql" -h "\$folder" -U me -Atc "select (select sum(abalance) from pgbench_accounts)
    - (select sum(bbalance) from pgbench_branches), (select sum(tbalance) from pgbench_tellers)
    - (select sum(delta) from pgbench_history)" bench)
kill -INT \$server
wait \$server
"$bin/pg_checksums" --check -D "\$folder/data" >/dev/null
! grep -E 'PANIC|FATAL.*(checksum|corrupt)|invalid page' "\$folder/log"
[ "\$sum" = "0|0" ]
J
    both "postgres, pgbench" bash "$here/postgres.sh"
}

of_stress() {
    command -v stress-ng >/dev/null || {
        echo "stress: no stress-ng installed"
        return
    }
    # It holds an int 0x80 that none of these use: it is managed only because it is trusted.
    "$pagefold" doctor --proof stress-ng --json | /usr/bin/python3 -c 'import json, sys
print("\n".join(json.load(sys.stdin)["trust_lines"]))' >"$here/trust"
    local options=(--trust "$here/trust") stressor words=()
    for stressor in vm malloc mmap mremap madvise brk fork vfork clone pthread mlock mprotect; do
        words=(--"$stressor" 2)
        case $stressor in
        vm) words+=(--vm-bytes 256M --vm-method all) ;;
        malloc) words+=(--malloc-bytes 128M) ;;
        mmap) words+=(--mmap-bytes 128M) ;;
        mremap) words+=(--mremap-bytes 32M) ;;
        esac
        (cd "$here" && both "stress-ng $stressor" stress-ng --verify -t "${STRESS_SECONDS:-20}" "${words[@]}"
            exit "$wrong") || wrong=1
    done
}

[ $# -gt 0 ] || set -- python node java redis postgres stress
for name in "$@"; do
    case $name in
    python | node | java | redis | postgres | stress) "of_$name" ;;
    *) echo "whole.sh: no program $name" >&2 && exit 2 ;;
    esac
done
exit $wrong
