//! Programs that mark memory, whose run may end in any way.

use super::*;

#[test]
fn a_short_run_merges_and_says_what_it_saved() {
    if !can_merge() {
        return;
    }
    let mut talk = Talk::member(&[]);
    for call in ["merged()", "right()", "write()", "right()", "fork()", "time.sleep(0.5)", "right()"] {
        talk.ask(call);
    }
    let (status, _, said) = talk.end();
    assert!(status.success(), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains(" pages merged in 1 processes"), "{said}");
    assert!(!said.contains(" 0 pages merged") && !said.contains(" 0.0 MiB saved"), "{said}");
}

/// Processes that want a CPU all the time, but for what others leave of it. They end with it.
struct Crowd(Vec<Child>);

impl Crowd {
    fn of(each_cpu: usize) -> Self {
        let online = std::thread::available_parallelism().unwrap().get();
        let spin = || Command::new("nice").args(["-n19", "sh", "-c", "while :; do :; done"]).spawn().unwrap();
        Self((0..online * each_cpu).map(|_| spin()).collect())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for spinner in &mut self.0 {
            let _ = spinner.kill();
            let _ = spinner.wait();
        }
    }
}

/// Seen to fail with the default of `--max-runnable`.
#[test]
fn nothing_new_is_merged_while_many_want_a_cpu() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("crowd");
    let file = temp.join("summary");
    let crowd = Crowd::of(5);
    let mut talk = Talk::member(&["--max-runnable", "4", "--summary", &file]);
    talk.ask("time.sleep(2)");
    talk.ask("'/memfd:pagefold ' in open('/proc/self/maps').read() and sys.exit('merged all the same')");
    drop(crowd);
    talk.ask("merged()");
    talk.ask("right()");
    let (status, _, said) = talk.end();
    assert!(status.success(), "{said}");
    let summary: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    assert!(summary["held_back_seconds"].as_f64().unwrap() > 1.0, "{summary:#}");
}

#[test]
fn the_state_is_told_on_demand_and_quiet_is_quiet() {
    if !can_merge() {
        return;
    }
    let mut talk = Talk::member(&[]);
    talk.ask("merged()");
    send(talk.run.id(), Signal::USR1);
    talk.ask("time.sleep(0.3)");
    let (_, _, said) = talk.end();
    assert!(said.lines().next().unwrap().contains("1 processes, "), "{said}");
    assert!(said.contains("check "), "{said}");
    let mut talk = Talk::member(&["--quiet"]);
    talk.ask("merged()");
    assert_eq!(talk.end().2, "");
}

#[test]
fn a_daemon_outlives_its_run_with_its_memory() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("daemon");
    let (ready, result) = (temp.join("ready"), temp.join("result"));
    let daemon = format!(
        "{MARKS}\nmerged()\nopen(sys.argv[1], 'w')\nparent = int(sys.argv[3])\n\
         while os.path.exists(f'/proc/{{parent}}'): time.sleep(0.01)\n\
         right()\nwrite()\nright()\nfork()\nopen(sys.argv[2] + '~', 'w').write('right')\n\
         os.rename(sys.argv[2] + '~', sys.argv[2])"
    );
    let script = "setsid \"$0\" -c \"$1\" \"$2\" \"$3\" $PPID </dev/null >/dev/null 2>&1 &\n\
        while [ ! -e \"$2\" ]; do sleep 0.02; done; exit 7";
    let run = output(&["--stable", "0.1"], &["sh", "-c", script, PYTHON, &daemon, &ready, &result]);
    assert_eq!(run.status.code(), Some(7), "{}", said(&run));
    wait_until("the daemon has looked at its memory", || Path::new(&result).exists());
    assert_eq!(fs::read_to_string(&result).unwrap(), "right");
}

#[test]
fn a_run_that_is_killed_leaves_a_command_that_goes_on() {
    if !can_merge() {
        return;
    }
    let mut talk = Talk::member(&["--quiet"]);
    talk.ask("merged()");
    talk.run.kill().unwrap();
    talk.run.wait().unwrap();
    for call in ["right()", "fork()", "write()", "right()", "memory.resize(4096) if False else None", "fork()"] {
        talk.ask(call);
    }
    talk.ask("mark()");
    talk.ask("right()");
}

/// The guardians among a run's children.
fn guardians(run: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{run}/task")).into_iter().flatten().flatten() {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        let is_guardian = |pid: &u32| {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.contains("store-guardian"))
        };
        found.extend(children.split_whitespace().map(|pid| pid.parse::<u32>().unwrap()).filter(is_guardian));
    }
    found
}

/// Broker and helpers are killed by name, and somebody is left who gives everything back.
///
/// Seen to fail: the guardian had the name too.
#[test]
fn one_is_left_when_all_are_killed_by_name() {
    if !can_merge() {
        return;
    }
    let mut talk = Talk::member(&["--quiet"]);
    talk.ask("merged()");
    let name = |pid: u32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    let [guardian] = guardians(talk.run.id())[..] else { panic!("one guardian") };
    assert!(name(talk.run.id()).contains("pagefold") && !name(guardian).contains("pagefold"), "{}", name(guardian));
}

/// Seen to fail: from the first guardian's death on there was none.
#[test]
fn a_guardian_that_is_killed_is_replaced() {
    if !can_merge() {
        return;
    }
    let mut talk = Talk::member(&["--quiet"]);
    talk.ask("merged()");
    let first = guardians(talk.run.id());
    assert_eq!(first.len(), 1);
    std::thread::sleep(Duration::from_secs(1));
    send(first[0], Signal::KILL);
    let mut second = Vec::new();
    wait_until("there is another guardian", || {
        second = guardians(talk.run.id());
        second.len() == 1 && second != first
    });
    // It knows the members: it reads the events of their forks and ends when their helpers have.
    talk.run.kill().unwrap();
    talk.run.wait().unwrap();
    talk.ask("fork()");
    talk.ask("right()");
    // Its status may be left for whoever adopted it.
    let stat = || fs::read_to_string(format!("/proc/{}/stat", second[0])).unwrap_or_default();
    wait_until("it has ended", || stat().is_empty() || stat().contains(") Z"));
}

/// A program that marks memory and is gone at once.
const SHORT: &str = r#"
#include <string.h>
#include <sys/mman.h>
int main(void) {
    char *at = mmap(0, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(at, 1, 1 << 20);
    return madvise(at, 1 << 20, MADV_MERGEABLE);
}
"#;

#[test]
fn programs_that_end_at_once_are_no_news() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("short");
    let Some(program) = temp.compile("short", SHORT, &[]) else { return };
    let script = "for n in $(seq 150); do \"$0\" & [ $((n % 8)) = 0 ] && wait; done; wait; exit 7";
    let run = output(&["--stable", "0.1"], &["sh", "-c", script, &program]);
    assert_eq!(run.status.code(), Some(7));
    assert!(!said(&run).contains("left alone"), "{}", said(&run));
    assert!(said(&run).lines().count() <= 1, "{}", said(&run));
}

#[test]
fn a_process_namespace_of_its_own_is_named() {
    if !can_merge() || !is_root() {
        return;
    }
    let program = format!("{MARKS}\ntime.sleep(0.5)\nright()");
    let inner = ["unshare", "--fork", "--pid", "--mount-proc", PYTHON, "-c", &program];
    let run = output(&["--stable", "0.1"], &inner);
    assert!(run.status.success(), "{}", said(&run));
    assert!(said(&run).contains("process namespace"), "{}", said(&run));
    assert!(said(&run).lines().count() <= 2, "{}", said(&run));
}

/// Seen to fail: nothing was merged, and the loader complained in every process.
#[test]
fn a_runtime_folder_that_the_loader_cannot_name_is_passed_over() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("names");
    let program = format!("{MARKS}\nmerged()\nright()");
    for name in ["a b", "a:b", "a$LIB", "."] {
        let folder = if name == "." { ".".to_owned() } else { temp.join(name) };
        fs::create_dir_all(&folder).unwrap();
        let mut run = run_with(&["--stable", "0.1"], &[PYTHON, "-c", &program]);
        let run = run.env("XDG_RUNTIME_DIR", &folder).current_dir(&temp.0).output().unwrap();
        assert!(run.status.success(), "{name}: {}", said(&run));
        assert_eq!(said(&run).lines().count(), 1, "{name}: {}", said(&run));
    }
}

/// Seen to fail: 2^44 MiB were no MiB at all, and a full store refused nothing.
#[test]
fn a_store_limit_is_the_number_that_was_said_and_what_it_keeps_out_is_counted() {
    let limits = ["17592186044416", "17592186044415"].map(|limit| output(&["--store-limit", limit], &["true"]));
    assert_eq!(limits[0].status.code(), Some(2), "{}", said(&limits[0]));
    assert_eq!(limits[1].status.code(), Some(0), "{}", said(&limits[1]));
    if !can_merge() {
        return;
    }
    let temp = Temp::new("limit");
    let summary = temp.join("summary.json");
    // Room for half of what is equal.
    let mut talk = Talk::member(&["--store-limit", "1", "--summary", &summary]);
    talk.ask("merged()");
    talk.ask("time.sleep(1)");
    let (status, _, said) = talk.end();
    assert!(status.success(), "{said}");
    let found: Value = serde_json::from_slice(&fs::read(&summary).unwrap()).unwrap();
    assert_eq!(found["store_pages"], 256, "{found:#}");
    assert!(found["refused"]["budget"].as_u64().unwrap_or(0) >= 256, "{found:#}");
}
