//! A program that is managed whole, forks all the time, and loses its broker and its guardian.

use std::ffi::c_void;
use std::io::BufRead as _;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use kernel::Signal;

use crate::stage::{Image, Other, Stage};
use crate::victim::{helper, say};

/// Pages of each half: worth a helper at once.
const HALF: usize = 4096;
const WORDS: usize = 512;

fn word(index: usize) -> u64 {
    (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn mapping(pages: usize, prot: i32, fd: i32) -> *mut u64 {
    let flags = libc::MAP_PRIVATE | if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
    // SAFETY: a place of the kernel's choice.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), pages * 4096, prot, flags, fd, 0) };
    if start == libc::MAP_FAILED { std::ptr::null_mut() } else { start.cast() }
}

/// Mappings of the store's segments.
fn stored() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:pagefold") && !line.contains("pagefold-control")).count()
}

/// The victim.
pub(crate) fn main() {
    let all = mapping(2 * HALF, libc::PROT_READ | libc::PROT_WRITE, -1);
    // SAFETY: the whole of the mapping.
    let words = unsafe { std::slice::from_raw_parts_mut(all, 2 * HALF * WORDS) };
    words.iter_mut().enumerate().for_each(|(index, place)| *place = word(index % (HALF * WORDS)));
    let begun = Instant::now();
    while stored() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(30), "nothing is merged");
        std::thread::sleep(Duration::from_millis(50));
        // Any call through the gate.
        // SAFETY: a mapping of its own.
        unsafe { libc::munmap(mapping(1, libc::PROT_READ, -1).cast::<c_void>(), 4096) };
    }
    static OVER: AtomicBool = AtomicBool::new(false);
    let forker = std::thread::spawn(|| {
        while !OVER.load(SeqCst) {
            // SAFETY: the child ends at once.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: ends the child.
                unsafe { libc::_exit(0) };
            }
            let mut status = 0;
            // SAFETY: waits for this thread's child.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        }
    });
    say(&format!("ready {}", helper()));
    let mut lines = std::io::stdin().lock().lines();
    lines.next().unwrap().unwrap();
    let file = std::fs::File::open("/bin/sh").unwrap();
    let code = mapping(1, libc::PROT_READ | libc::PROT_EXEC, std::os::fd::AsRawFd::as_raw_fd(&file));
    let error = std::io::Error::last_os_error();
    OVER.store(true, SeqCst);
    forker.join().unwrap();
    let right = words.iter().enumerate().all(|(index, found)| *found == word(index % (HALF * WORDS)));
    match (right, code.is_null()) {
        (false, _) => say("wrong"),
        (true, true) => say(&format!("refused: {error}")),
        (true, false) => say(&format!("came, {} mappings of the store are left", stored())),
    }
    lines.next();
}

/// Seen to fail: a fork that waited for the reader of its event was inside of the gate, so that the helper could not close
/// it and left, and then nobody could give pages back: the code was refused.
pub(crate) fn forks_go_on(image: &Image) {
    for _ in 0..8 {
        let stage = Stage::of_all(image);
        let mut victim = stage.victim_of(stage.command("--whole"), "victim that is managed whole");
        stage.guardian.kill(Signal::KILL);
        stage.guardian.wait_gone("the guardian");
        let broker = Other::new(stage.broker.pid());
        broker.kill(Signal::KILL);
        broker.wait_gone("the broker");
        let answer = victim.player.ask("code");
        assert_eq!(answer, "came, 0 mappings of the store are left");
        assert!(victim.player.end().success());
        let helper = victim.helper.clone();
        drop(victim);
        stage.end(&[helper]);
    }
}
