//! Ctrl-Z on the injector.

use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use pagefold_kernel::inject::{Call, Options, Step, inject};
use pagefold_kernel::signals::StopsHeld;
use pagefold_kernel::{Pid, status};

use crate::harness::{Target, wait_until};

/// Sends itself what Ctrl-Z sends, while it holds a thread.
fn stop(step: Step) {
    if step == Step::AtEntry {
        // SAFETY: a signal to this process.
        unsafe { libc::kill(libc::getpid(), libc::SIGTSTP) };
    }
}

struct Injector(Child);

impl Drop for Injector {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Seen to fail: it stood still with the thread in its hands.
#[test]
fn who_is_stopped_by_a_key_lets_go_of_the_thread_first() {
    let mut target = Target::start(&["nanosleep"]);
    let (pid, tid) = (target.pid(), target.tid("nanosleep"));
    // Inherited, so that the test's run-time in it, which has a thread of its own, leaves the signal to the injecting one.
    let held = StopsHeld::begin();
    let injector = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "stops::runs_as_injector", "--test-threads=1"])
        .env("INJECT_AND_STOP", pid.to_string())
        // In a group that nobody outside of looks after, the kernel ignores these signals.
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    drop(held);
    // Ended before the target, which would not be gone while it is in its hands.
    let mut injector = Injector(injector);
    let here = Pid(injector.0.id().cast_signed());
    wait_until("the injector did not stop", || status::read(here).unwrap().state == b'T');
    assert_eq!(status::read(tid).unwrap().tracer_pid, 0);
    assert!(target.merges());
    target.check();
    // SAFETY: a signal to a child that was not waited for.
    unsafe { libc::kill(here.0, libc::SIGCONT) };
    assert!(injector.0.wait().unwrap().success());
}

/// Not a test: what the one above starts.
#[test]
fn runs_as_injector() {
    let Ok(pid) = std::env::var("INJECT_AND_STOP") else { return };
    // SAFETY: the set is plain integers, for which zeros are valid, and lives until the calls return.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGTSTP);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
    let options = Options { on_step: Some(stop), ..Options::default() };
    let done = inject(Pid(pid.parse().unwrap()), &[Call::memory_merge(true)], &options).unwrap();
    assert_eq!(done.results, [Ok(0)]);
}
