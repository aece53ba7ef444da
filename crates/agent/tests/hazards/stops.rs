//! H1: programs that are stopped, debugged or frozen while pages of them are merged.

use std::time::{Duration, Instant};

use crate::pressure::Cgroup;
use crate::stand::{Running, Stand, lives};
use crate::victim::{Region, Victim, hear, merge_densely, merge_pair, tell};

pub(crate) const VICTIMS: &[Victim] = &[("worker", worker)];

const PAGES: usize = 64;

/// Writes its memory and checks it, in three threads, until it is told to end; pages are merged all the time.
fn worker() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(900);
    two.fill_from(900);
    merge_pair(one, two);
    merge_densely();
    static OVER: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    let threads: Vec<_> = [(0, 20), (20, 40), (40, PAGES)]
        .into_iter()
        .map(|(from, to)| {
            std::thread::spawn(move || {
                let part = one.part(from, to);
                let zero = std::fs::File::open("/dev/zero").unwrap();
                while !OVER.load(std::sync::atomic::Ordering::SeqCst) {
                    // In the kernel as well: that is where a waiter would spin. A stop cuts it short.
                    let mut done = 0;
                    while done < part.len() {
                        use std::os::fd::AsRawFd as _;
                        let at = (part.start + done) as *mut libc::c_void;
                        // SAFETY: the kernel writes into the part.
                        let got = unsafe { libc::read(zero.as_raw_fd(), at, part.len() - done) };
                        assert!(got > 0, "{}", std::io::Error::last_os_error());
                        done += got as usize;
                    }
                    part.check_zero();
                    part.fill_from(900 + from as u64);
                    std::thread::sleep(Duration::from_micros(500));
                    part.check_from(900 + from as u64);
                }
            })
        })
        .collect();
    tell("working");
    hear();
    OVER.store(true, std::sync::atomic::Ordering::SeqCst);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    one.check_from(900);
    two.check_from(900);
}

fn working(stand: &Stand) -> Running {
    let mut running = stand.start("worker");
    running.expect("working");
    running
}

fn end(stand: &Stand, mut running: Running) {
    running.say("enough");
    running.succeed();
    stand.assert_merged(PAGES as u64);
}

fn signal(pid: i32, number: i32) {
    // SAFETY: a child of ours.
    assert_eq!(unsafe { libc::kill(pid, number) }, 0);
}

/// Waits for a stop of the child to be reported.
fn await_stop(pid: i32, flags: i32) -> Duration {
    let begun = Instant::now();
    loop {
        let mut status = 0;
        // SAFETY: the kernel writes the status.
        let got = unsafe { libc::waitpid(pid, &raw mut status, flags | libc::WNOHANG) };
        if got == pid {
            assert!(libc::WIFSTOPPED(status), "{status:#x}");
            return begun.elapsed();
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "the stop is not reported");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// H1: SIGSTOP is reported, and SIGCONT makes the program go on, again and again.
#[test]
fn h1_stop_and_continue() {
    let stand = Stand::on_request();
    let running = working(&stand);
    let pid = running.pid();
    for _ in 0..40 {
        signal(pid, libc::SIGSTOP);
        await_stop(pid, libc::WUNTRACED);
        signal(pid, libc::SIGCONT);
        std::thread::sleep(Duration::from_millis(7));
    }
    end(&stand, running);
}

/// H1: a tracer stops all threads and lets them go.
#[test]
fn h1_a_tracer_stops_every_thread() {
    let stand = Stand::on_request();
    let running = working(&stand);
    let pid = running.pid();
    for _ in 0..15 {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let tids: Vec<i32> = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok()).collect();
        assert_eq!(tids.len(), 4, "the helper is no thread of the program");
        for tid in &tids {
            // SAFETY: threads of a child of ours.
            assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SEIZE, *tid, 0, 0) }, 0);
            // SAFETY: as above.
            assert_eq!(unsafe { libc::ptrace(libc::PTRACE_INTERRUPT, *tid, 0, 0) }, 0);
        }
        for tid in &tids {
            await_stop(*tid, libc::__WALL);
        }
        for tid in &tids {
            // SAFETY: as above.
            assert_eq!(unsafe { libc::ptrace(libc::PTRACE_DETACH, *tid, 0, 0) }, 0);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    end(&stand, running);
}

/// H1: gdb attaches, looks at all threads, and detaches.
#[test]
fn h1_gdb_attaches_and_detaches() {
    if std::process::Command::new("gdb").arg("--version").output().is_err() {
        println!("skipped: gdb");
        return;
    }
    let stand = Stand::on_request();
    let running = working(&stand);
    for _ in 0..2 {
        let mut gdb = std::process::Command::new("timeout");
        gdb.args(["--kill-after=1", "25", "gdb", "--batch", "-nx", "-iex", "set auto-solib-add off", "-iex"]);
        gdb.args(["set debuginfod enabled off", "-p", &running.pid().to_string(), "-ex", "info threads"]);
        let output = gdb.args(["-ex", "detach"]).stdin(std::process::Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}: {text}", output.status);
        assert!(text.contains("4 ") && text.contains("detached"), "{text}");
    }
    end(&stand, running);
}

/// H1: the freezer of cgroup v1 freezes and thaws the program, which the helper is not part of.
#[test]
fn h1_the_freezer_freezes() {
    let Some(folder) = Cgroup::make("freezer") else { return };
    let stand = Stand::on_request();
    let running = working(&stand);
    std::fs::write(folder.0.join("cgroup.procs"), running.pid().to_string()).unwrap();
    let state = folder.0.join("freezer.state");
    for _ in 0..15 {
        std::fs::write(&state, "FROZEN").unwrap();
        let begun = Instant::now();
        while std::fs::read_to_string(&state).unwrap().trim() != "FROZEN" {
            assert!(begun.elapsed() < Duration::from_secs(5), "it stays {:?}", std::fs::read_to_string(&state));
            std::thread::sleep(Duration::from_millis(1));
        }
        std::fs::write(&state, "THAWED").unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    end(&stand, running);
}

/// Section 6: a program that is killed in the middle of dense merging ends at once.
#[test]
fn killed_programs_end_at_once() {
    let stand = Stand::on_request();
    for _ in 0..5 {
        let mut running = working(&stand);
        std::thread::sleep(Duration::from_millis(20));
        signal(running.pid(), libc::SIGKILL);
        let begun = Instant::now();
        while lives(running.pid()) {
            assert!(begun.elapsed() < Duration::from_secs(3), "it does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        let (status, _) = running.finish();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGKILL));
    }
    stand.assert_merged(PAGES as u64);
}
