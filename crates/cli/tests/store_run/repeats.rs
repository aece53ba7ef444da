//! Programs with long runs of equal pages.

use super::*;

/// 64 MiB of one byte. Prints how many mappings it has once next to all of it is merged, and again after some of its
/// pages were written with what they held and had time to be merged again.
const REPEATS: &str = r"
import os, time
PAGES = 16384
def anon():
    return [int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')][0]
own = anon()
data = bytearray(b'\5') * (PAGES * 4096)
def mappings():
    deadline = time.monotonic() + 30
    while anon() - own > 2048 and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(open('/proc/self/maps').readlines())
first = mappings()
for page in range(0, PAGES, 3):
    data[page * 4096 + 7] = 5
print(first, mappings())
assert data.count(5) == len(data)
child = os.fork()
if child == 0:
    data[12345678] = 6
    os._exit(0 if data.count(5) == len(data) - 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert data.count(5) == len(data)
print('right')
";

/// Seen to fail: without copies in the store it had 16,453 mappings, and 16,464 after the writes; now 135.
#[test]
fn a_long_run_of_equal_pages_has_few_mappings() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("repeats");
    let file = temp.join("summary");
    let run = output(&["--scope", "all", "--stable", "0.3", "--summary", &file], &[PYTHON, "-c", REPEATS]);
    let lines = text(&run.stdout);
    let (mappings, rest) = lines.split_once('\n').unwrap_or_default();
    assert_eq!((run.status.code(), rest), (Some(0), "right\n"), "{lines}{}", said(&run));
    let summary: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    println!("{mappings} mappings, {summary:#}");
    let mappings: Vec<u64> = mappings.split(' ').map(|count| count.parse().unwrap()).collect();
    assert!(mappings.iter().all(|count| *count < 200), "{mappings:?} mappings, {summary:#}");
    // All but the 2 MiB that it does not wait for, and the store's copies.
    assert!(summary["bytes_saved_peak"].as_u64().unwrap() > 60 << 20, "{summary:#}");
}
