//! Rules are applied once.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stand::{Grandchild, Running, Stand, Undone, document, is_mergeable, lock, rules, said, set, until};

const ALL: &str = "[[rule]]\nname = \"all\"\nmatch = { exe = \"DIR/*\" }\naction = \"enable\"\n";

#[test]
fn whoever_a_rule_fits_is_enabled_and_undone_with_what_it_has_started() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let (one, other) = (stand.sleeper("worker"), stand.sleeper("worker"));
    let shell = stand.copy("/bin/sh", "shell");
    let mut parent = Running::start(Command::new(shell).args(["-c", "read line; sleep 600 & echo $!; wait"]), "shell");
    let bystander = Running::start(Command::new("sleep").arg("600"), "sleep");
    let file = stand.write(ALL);
    let done = document(&["apply", &file, "--json"]);
    assert_eq!((&done["enabled"], &done["refused"], &done["enabled_now"]), (&3.into(), &0.into(), &3.into()), "{done}");
    assert!(one.is_mergeable() && other.is_mergeable() && parent.is_mergeable() && !bystander.is_mergeable());
    assert_eq!(one.stat().ksm_merge_any, Some(true));

    // It is done, and stays done.
    let again = document(&["apply", &file, "--json"]);
    assert_eq!(
        (&again["enabled"], &again["enabled_now"], &again["looks"]),
        (&0.into(), &3.into(), &1.into()),
        "{again}"
    );

    // What it starts inherits the mark, and no rule fits it.
    use std::io::Write as _;
    writeln!(parent.0.stdin.as_mut().unwrap()).unwrap();
    let grandchild = Grandchild::of(&mut parent);
    let child = grandchild.0;
    until("the child is as its parent", || is_mergeable(child).then_some(()));
    let undone = document(&["undo", "--json"]);
    assert_eq!((&undone["disabled"], &undone["enabled_now"]), (&4.into(), &0.into()), "{undone}");
    assert!(!one.is_mergeable() && !other.is_mergeable() && !parent.is_mergeable() && !is_mergeable(child));
    assert_eq!(document(&["undo", "--json"])["disabled"], 0);
}

/// Seen to fail without the record: enabled again by the next call.
#[test]
fn what_an_administrator_disables_is_left_so() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let (kept, released) = (stand.sleeper("worker"), stand.sleeper("worker"));
    let file = stand.write(ALL);
    assert_eq!(document(&["apply", &file, "--json"])["enabled"], 2);
    released.set(false);
    let output = rules(&["apply", &file]);
    assert!(output.status.success());
    let text = format!("{} (worker) was disabled by somebody else: left so", released.pid());
    assert!(said(&output).contains(&text), "{}", said(&output));
    assert!(kept.is_mergeable() && !released.is_mergeable());
    assert_eq!(document(&["apply", &file, "--json"])["released"], 0, "said once");
    assert!(!released.is_mergeable());
    // Until the administrator enables it.
    released.set(true);
    assert_eq!(document(&["apply", &file, "--json"])["enabled"], 0);
    assert_eq!(document(&["undo", "--json"])["disabled"], 1, "one of them is the administrator's");
    assert!(released.is_mergeable() && !kept.is_mergeable());
}

#[test]
fn secrets_are_never_enabled_and_lose_what_they_have_inherited() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let (agent, merged) = (stand.sleeper("ssh-agent"), stand.sleeper("gpg-agent"));
    merged.set(true);
    let file = stand.write(ALL);
    let done = document(&["apply", &file, "--json"]);
    assert_eq!((&done["enabled"], &done["disabled"]), (&0.into(), &1.into()), "{done}");
    assert_eq!(done["events"][0]["why"]["by"], "never_merge");
    assert!(!agent.is_mergeable() && !merged.is_mergeable());
    // The exact path overrides it.
    let file = stand
        .write("[[rule]]\nmatch = { exe = \"DIR/ssh-agent\" }\naction = \"enable\"\noverride_never_merge = true\n");
    assert_eq!(document(&["apply", &file, "--json"])["enabled"], 1);
    assert!(agent.is_mergeable() && !merged.is_mergeable());
}

#[test]
fn mappings_that_a_rule_leaves_out_are_not_marked() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let worker = stand.sleeper("worker");
    let marked = |name: &str| {
        let vmas = kernel::smaps::read(worker.pid()).unwrap();
        vmas.iter().any(|entry| entry.vma.name == name && entry.flags.mergeable())
    };
    let file = stand.write("[[rule]]\nmatch = { exe = \"DIR/worker\" }\naction = \"enable\"\nexclude = [\"stack\"]\n");
    assert_eq!(document(&["apply", &file, "--json"])["enabled"], 1);
    assert!(marked("[heap]") && !marked("[stack]"));
    assert_eq!(document(&["undo", "--json"])["disabled"], 1);
    let file = stand.write("[[rule]]\nmatch = { exe = \"DIR/worker\" }\naction = \"enable\"\nvma = [\"stack\"]\n");
    assert_eq!(document(&["apply", &file, "--json"])["enabled"], 1);
    assert!(!marked("[heap]") && marked("[stack]"));
}

/// A child that was started before its parent was enabled has not inherited anything: what is marked in it is its own. Seen
/// to fail.
#[test]
fn what_was_there_before_its_parent_was_enabled_is_not_undone() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let shell = stand.copy("/bin/sh", "shell");
    let mut parent = Running::start(Command::new(shell).args(["-c", "sleep 600 & echo $!; wait"]), "shell");
    let grandchild = Grandchild::of(&mut parent);
    let child = grandchild.0;
    // Times are told to a hundredth of a second.
    std::thread::sleep(std::time::Duration::from_millis(30));
    set(child, true);
    assert_eq!(document(&["apply", &stand.write(ALL), "--json"])["enabled"], 1);
    assert_eq!(document(&["undo", "--json"])["disabled"], 1);
    assert!(is_mergeable(child) && !parent.is_mergeable());
}

/// Seen to fail: a child with the switch of its parent counted as enabled.
#[test]
fn parts_are_left_out_of_what_has_inherited_all() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let (shell, worker) = (stand.copy("/bin/sh", "shell"), stand.copy("/usr/bin/sleep", "worker"));
    let script = format!("read line; {} 600 & echo $!; wait", worker.display());
    let mut parent = Running::start(Command::new(shell).args(["-c", &script]), "shell");
    let file = stand.write(
        "[[rule]]\nmatch = { exe = \"DIR/worker\" }\naction = \"enable\"\nexclude = [\"heap\"]\n\
         [[rule]]\nmatch = { exe = \"DIR/shell\" }\naction = \"enable\"\n",
    );
    assert_eq!(document(&["apply", &file, "--json"])["enabled"], 1);
    use std::io::Write as _;
    writeln!(parent.0.stdin.as_mut().unwrap()).unwrap();
    let grandchild = Grandchild::of(&mut parent);
    let child = grandchild.0;
    until("it is a worker", || (kernel::status::read(child).unwrap().name == "worker").then_some(()));
    assert_eq!(document(&["apply", &file, "--json"])["enabled"], 1);
    let vmas = kernel::smaps::read(child).unwrap();
    let is_marked = |name: &str| vmas.iter().any(|entry| entry.vma.name == name && entry.flags.mergeable());
    assert!(!is_marked("[heap]") && is_mergeable(child));
    assert_eq!(document(&["apply", &file, "--json"])["enabled"], 0);
    assert_eq!(document(&["undo", "--json"])["disabled"], 2);
    assert!(!is_mergeable(child));
}

/// A cgroup of either kind, removed with the test.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Option<Self> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/memory"];
        let make = |root: &str| {
            let folder = Path::new(root).join(name);
            std::fs::create_dir(&folder).ok()?;
            folder.join("cgroup.procs").exists().then_some(Self(folder))
        };
        roots.into_iter().find_map(make)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn members_of_a_cgroup_are_enabled() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let name = format!("pagefold-rules-{}.slice", std::process::id());
    let Some(cgroup) = Cgroup::new(&name) else {
        println!("skipped: cgroups of its own");
        return;
    };
    let (inside, outside) = (stand.sleeper("worker"), stand.sleeper("worker"));
    std::fs::write(cgroup.0.join("cgroup.procs"), inside.pid().to_string()).unwrap();
    for key in [format!("cgroup = \"/{name}\""), format!("unit = \"{name}\"")] {
        let file = stand.write(&format!("[[rule]]\nmatch = {{ {key} }}\naction = \"enable\"\n"));
        assert_eq!(document(&["apply", &file, "--json"])["enabled"], 1, "{key}");
        assert!(inside.is_mergeable() && !outside.is_mergeable());
        assert_eq!(document(&["undo", "--json"])["disabled"], 1);
    }
    drop(inside);
}

#[test]
fn who_cannot_be_enabled_is_told_with_the_reason() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let (stopped, well) = (stand.sleeper("worker"), stand.sleeper("worker"));
    let stop = kernel::Pidfd::open(stopped.pid()).unwrap();
    stop.send_signal(kernel::Signal::STOP).unwrap();
    until("it is stopped", || (kernel::status::read(stopped.pid()).unwrap().state == b'T').then_some(()));
    let output = rules(&["apply", &stand.write(ALL)]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains(&format!("{} (worker) is refused: ", stopped.pid())), "{}", said(&output));
    assert!(well.is_mergeable() && !stopped.is_mergeable());
    let again = rules(&["apply", &stand.write(ALL)]);
    assert_eq!(again.status.code(), Some(1), "it was not an administrator who disabled it");
    stop.send_signal(kernel::Signal::CONT).unwrap();
    until("it goes on", || (kernel::status::read(stopped.pid()).unwrap().state == b'S').then_some(()));
    assert!(rules(&["apply", &stand.write(ALL)]).status.success());
    assert!(stopped.is_mergeable());
}

/// Thousands of mappings apart from each other, as the rule marks them piece by piece, in a program that stops itself as
/// soon as some are marked. Seen to fail: the refusal had it forgotten, so that `undo` left the marks.
#[test]
fn who_is_refused_halfway_is_enabled_later_and_undone_in_any_case() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let word = format!("half-{}", std::process::id());
    let file = stand
        .write(&format!("[[rule]]\nmatch = {{ args = \"{word}\" }}\naction = \"enable\"\nexclude = [\"stack\"]\n"));
    let target =
        Running::start(Command::new("/usr/bin/python3").args(["-c", STOPS_WHEN_MARKED, &word]), "stops-when-mark");
    let marked = || {
        let vmas = kernel::smaps::read(target.pid()).unwrap();
        vmas.iter().filter(|entry| entry.flags.mergeable()).count()
    };
    let goes_on = || {
        kernel::Pidfd::open(target.pid()).unwrap().send_signal(kernel::Signal::CONT).unwrap();
        until("it goes on", || (kernel::status::read(target.pid()).unwrap().state != b'T').then_some(()));
    };
    let stops_half = || {
        until("it waits", || (kernel::status::read(target.pid()).unwrap().name == "stops-when-mark").then_some(()));
        document(&["apply", &file, "--timeout", "60", "--json"])
    };
    let half = stops_half();
    assert_eq!(
        (&half["enabled"], &half["refused"], &half["events"][0]["reason"]),
        (&0.into(), &1.into(), &"stopped".into())
    );
    let some = marked();
    assert!(some > 0 && some < 4000, "{some} are marked");
    goes_on();
    assert_eq!(document(&["undo", "--timeout", "60", "--json"])["disabled"], 1);
    assert_eq!(marked(), 0);
    // What was refused halfway is done by the next call: it stops itself only once for each time that it is not marked.
    assert_eq!(stops_half()["refused"], 1);
    goes_on();
    let whole = document(&["apply", &file, "--timeout", "60", "--json"]);
    assert_eq!(whole["enabled"], 1, "{whole:#}");
    assert!(marked() > 4000);
    let undone = document(&["undo", "--timeout", "60", "--json"]);
    assert_eq!(undone["disabled"], 1, "{undone:#}");
    // Unless an administrator has disabled it meanwhile.
    assert_eq!(stops_half()["refused"], 1);
    goes_on();
    target.set(false);
    assert_eq!(document(&["apply", &file, "--timeout", "60", "--json"])["released"], 1);
    assert_eq!(marked(), 0);
}

/// Maps every other page of a region, then stops itself whenever it finds that it has become mergeable.
const STOPS_WHEN_MARKED: &str = r"
import ctypes, mmap, os, signal
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
size = mmap.PAGESIZE
start = libc.mmap(None, 8000 * size, 3, 0x22, -1, 0)
for page in range(1, 8000, 2):
    libc.munmap(start + page * size, size)
def mergeable(): return 'ksm_mergeable: yes' in open('/proc/self/ksm_stat').read()
def call(name): open('/proc/self/comm', 'w').write(name)
while True:
    call('stops-when-marked')
    while not mergeable(): pass
    call('is-marked')
    os.kill(os.getpid(), signal.SIGSTOP)
    while mergeable(): pass
";

/// Seen to fail: it was forgotten when it was refused, and stayed enabled after `undo`.
#[test]
fn who_is_refused_what_new_rules_want_is_still_on_record() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let worker = stand.sleeper("worker");
    assert_eq!(document(&["apply", &stand.write(ALL), "--json"])["enabled"], 1);
    let pidfd = kernel::Pidfd::open(worker.pid()).unwrap();
    pidfd.send_signal(kernel::Signal::STOP).unwrap();
    until("it is stopped", || (kernel::status::read(worker.pid()).unwrap().state == b'T').then_some(()));
    let file = stand.write("[[rule]]\nmatch = { exe = \"DIR/*\" }\naction = \"enable\"\nexclude = [\"heap\"]\n");
    assert_eq!(document(&["apply", &file, "--json"])["refused"], 1);
    pidfd.send_signal(kernel::Signal::CONT).unwrap();
    until("it goes on", || (kernel::status::read(worker.pid()).unwrap().state == b'S').then_some(()));
    assert_eq!(document(&["undo", "--json"])["disabled"], 1);
    assert!(!worker.is_mergeable());
}
