//! Other processes that write into this one: process_vm_writev and /proc/PID/mem.

use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::Dice;
use crate::arena::{Arena, PAGE, ZERO, content};
use crate::fail;

const PAGES: usize = 64;

/// An arena of this process, and the process that writes it.
pub(crate) struct Poker {
    arena: Arena,
    child: Child,
}

/// Starts one.
pub(crate) fn start(seed: u64) -> Vec<Poker> {
    let arena = Arena::new(PAGES + 1);
    let mut command = Command::new(std::env::current_exe().unwrap());
    let numbers = [("--poke", u64::from(std::process::id())), ("--address", arena.page(0) as u64), ("--seed", seed)];
    for (name, number) in numbers {
        command.arg(name).arg(number.to_string());
    }
    // Its input ends when it is to stop.
    let child = command.stdin(Stdio::piped()).spawn().unwrap();
    vec![Poker { arena, child }]
}

impl Poker {
    pub(crate) fn finish(&mut self) -> bool {
        drop(self.child.stdin.take());
        let status = self.child.wait().unwrap();
        let _keeps_the_memory = &self.arena;
        if !status.success() {
            eprintln!("torture: the process that writes from outside ended with {status}");
        }
        status.success()
    }
}

/// The other process: the only writer of that memory.
pub(crate) fn poke(pid: u64, address: u64, seed: u64) {
    let memory = std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
    let mut dice = Dice::new(seed + 77);
    let mut expected = [ZERO; PAGES];
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let ended = std::sync::Arc::clone(&stop);
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = std::io::stdin().read_line(&mut line);
        ended.store(true, std::sync::atomic::Ordering::SeqCst);
    });
    while !stop.load(std::sync::atomic::Ordering::SeqCst) {
        let (first, count) = (dice.below(PAGES as u64 - 8) as usize, 1 + dice.below(8) as usize);
        let id = dice.below(crate::arena::COMMON);
        let bytes: Vec<u8> = (0..count).flat_map(|_| content(id)).collect();
        let at = address + (first * PAGE) as u64;
        if dice.below(2) == 0 {
            // A frozen page answers with an error at once, and the write can stop in the middle.
            let mut done = 0;
            let mut tries = 0;
            while done < bytes.len() {
                match memory.write_at(&bytes[done..], at + done as u64) {
                    Ok(written) if written > 0 => done += written,
                    _ => {
                        tries += 1;
                        if std::fs::metadata(format!("/proc/{pid}/mem")).is_err() || tries > 1_000_000 {
                            return;
                        }
                        std::thread::sleep(Duration::from_micros(50));
                    }
                }
            }
        } else if transfer(pid, at, bytes.as_ptr() as u64, bytes.len(), true) != bytes.len() as isize {
            return;
        }
        expected[first..first + count].fill(id);
        std::thread::sleep(Duration::from_millis(dice.below(40)));
        for _ in 0..8 {
            let page = dice.below(PAGES as u64) as usize;
            let mut got = vec![0_u8; PAGE];
            if transfer(pid, address + (page * PAGE) as u64, got.as_mut_ptr() as u64, PAGE, false) != PAGE as isize {
                return;
            }
            if got != content(expected[page]) {
                fail(&format!("what was written from outside to page {page} is lost"));
            }
        }
    }
}

fn transfer(pid: u64, remote: u64, local: u64, len: usize, write: bool) -> isize {
    let local = libc::iovec { iov_base: local as *mut libc::c_void, iov_len: len };
    let remote = libc::iovec { iov_base: remote as *mut libc::c_void, iov_len: len };
    // SAFETY: the local vector is a buffer of the caller of that length.
    unsafe {
        if write {
            libc::process_vm_writev(pid as i32, &raw const local, 1, &raw const remote, 1, 0)
        } else {
            libc::process_vm_readv(pid as i32, &raw const local, 1, &raw const remote, 1, 0)
        }
    }
}
