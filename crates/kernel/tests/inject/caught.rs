//! Who is caught and let go of, with no call made, has noticed nothing.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, ChildStdout, Command, Stdio};

use pagefold_kernel::Pid;
use pagefold_kernel::inject::{Call, Options, catch};

use crate::harness::wait_until;
use crate::signals::waits_in;

/// A program of one thread that makes one call, and then says what it returned.
struct Caller {
    child: Child,
    out: BufReader<ChildStdout>,
}

/// Each with its number, and with what it returns if nothing happens.
const BROKEN_BY_STOPS: [(&str, i64, &str); 4] = [
    ("libc.epoll_wait(libc.epoll_create1(0), bytes, 1, 300)", libc::SYS_epoll_wait, "0"),
    ("libc.epoll_pwait(libc.epoll_create1(0), bytes, 1, 300, bytes)", libc::SYS_epoll_pwait, "0"),
    ("(libc.sigtimedwait(bytes, None, time), ctypes.get_errno())", libc::SYS_rt_sigtimedwait, "(-1, 11)"),
    ("(libc.semtimedop(libc.semget(0, 1, 0o600), sem, 1, time), ctypes.get_errno())", libc::SYS_semtimedop, "(-1, 11)"),
];

impl Caller {
    fn new(call: &str, number: i64) -> Self {
        let script = format!(
            "
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
bytes = ctypes.create_string_buffer(128)
time = (ctypes.c_long * 2)(0, 300000000)
sem = (ctypes.c_short * 3)(0, -1, 0)
print({call})"
        );
        let mut command = Command::new("python3");
        let mut child = command.args(["-c", &script]).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let caller = Self { child, out };
        wait_until("it is in its call", || waits_in(caller.pid(), number));
        caller
    }

    fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }

    fn said(mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_call_that_a_stop_breaks_goes_on() {
    for (call, number, returned) in BROKEN_BY_STOPS {
        let caller = Caller::new(call, number);
        assert_eq!(catch(caller.pid()).unwrap().let_go(), 0, "{call}");
        drop(catch(caller.pid()).unwrap());
        assert_eq!(caller.said(), returned, "{call}");
    }
}

/// Somebody else is at work on the process: no call is made, and that is no harm.
#[test]
fn who_cannot_be_injected_goes_on_too() {
    let (call, number, returned) = BROKEN_BY_STOPS[0];
    let caller = Caller::new(call, number);
    let memory = std::fs::File::open(format!("/proc/{}/mem", caller.pid())).unwrap();
    memory.lock().unwrap();
    let mut caught = catch(caller.pid()).unwrap();
    let options = Options { timeout: std::time::Duration::from_millis(10), ..Options::default() };
    caught.inject(&[Call::getpid()], &options).unwrap_err();
    assert_eq!(caught.let_go(), 0);
    assert_eq!(caller.said(), returned);
}

/// What it has written is written: nobody can repair that.
#[test]
fn a_transfer_that_is_cut_short_is_counted() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = Command::new("python3");
    command.args(["-c", "import os; os._exit(0 if os.write(1, b'x' * 1000000) == 1000000 else 7)"]);
    let mut child = command.stdin(Stdio::null()).stdout(writer).spawn().unwrap();
    drop(command);
    let pid = Pid(child.id().cast_signed());
    wait_until("it writes", || waits_in(pid, libc::SYS_write));
    assert_eq!(catch(pid).unwrap().let_go(), 1);
    reader.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
}
