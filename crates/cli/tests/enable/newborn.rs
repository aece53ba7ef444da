//! Children of an enabled process are as it is, by birth: they are not disturbed.

use std::time::{Duration, Instant};

use crate::stand::{Running, pagefold};

/// A line on stdin begins it: workers, one after the other, that each write more into a pipe than it holds, which a stop
/// would cut short. Another ends it: how many there were, and how many wrote less than they were to.
const WORKERS: &str = r"
import select, time
print('here', flush=True)
sys.stdin.readline()
print('begun', flush=True)
workers = short = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(reader)
        os._exit(0 if os.write(writer, b'x' * 300000) == 300000 else 7)
    os.close(writer)
    time.sleep(0.03)
    while os.read(reader, 65536): pass
    os.close(reader)
    workers += 1
    short += os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
print(workers, short, flush=True)
";

#[test]
fn children_that_are_enabled_by_birth_are_not_disturbed() {
    let mut target = Running::python(WORKERS);
    let pid = target.text();
    assert_eq!(pagefold(&["enable", "--children", &pid]).outcome(target.pid()), "done");
    if target.stat().ksm_merge_any.is_none() {
        println!("skipped: ksm_merge_any in /proc/PID/ksm_stat");
        return;
    }
    assert_eq!(target.ask(""), "begun");
    // Long enough for some workers, however quick a call is.
    let (begun, mut calls) = (Instant::now(), 0);
    while calls < 15 || begun.elapsed() < Duration::from_secs(1) {
        calls += 1;
        let said = pagefold(&["enable", "--children", &pid]);
        for process in said.document["processes"].as_array().unwrap() {
            assert_eq!(process["injections"], 0, "{said:?}");
            assert_eq!(process["interrupted"], 0, "{said:?}");
        }
    }
    let said = target.ask("");
    let (workers, short) = said.split_once(' ').unwrap();
    assert!(workers.parse::<u32>().unwrap() > 3, "{said}");
    assert_eq!(short, "0", "of {workers} workers");
}
