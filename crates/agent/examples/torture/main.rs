//! A program that treats managed memory as badly as it can and knows at any time what every byte of it must be.
//!
//! Every location has one writer: a thread of this program, another process that writes from outside, or the kernel on
//! behalf of the one thread that asked. Whoever writes also checks, all the time and at the end. The soak test
//! (`bench soak`) runs it under `pagefold run` and kills helpers, broker and guardian meanwhile.
//!
//! `torture --seconds N --seed N --folder DIR --report FILE [--processes N]`

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a test program")]

mod arena;
mod fuse;
mod outside;
mod ring;
mod work;

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// Threads that own an arena each.
const WORKERS: usize = 3;
/// A thread that does nothing for so long hangs.
const WATCHDOG: Duration = Duration::from_secs(120);
/// More mappings than that are a leak.
const MAPS_MAX: usize = 20_000;

/// What was done.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) operations: AtomicU64,
    pub(crate) pages_checked: AtomicU64,
    pub(crate) forks: AtomicU64,
    pub(crate) remaps: AtomicU64,
    pub(crate) direct_reads: AtomicU64,
    pub(crate) ring_reads: AtomicU64,
    pub(crate) pipe_pages: AtomicU64,
    pub(crate) fuse_reads: AtomicU64,
    /// Calls that failed with ENOMEM, as they may while no helper lives.
    pub(crate) refused: AtomicU64,
}

pub(crate) static COUNTS: Counts = Counts {
    operations: AtomicU64::new(0),
    pages_checked: AtomicU64::new(0),
    forks: AtomicU64::new(0),
    remaps: AtomicU64::new(0),
    direct_reads: AtomicU64::new(0),
    ring_reads: AtomicU64::new(0),
    pipe_pages: AtomicU64::new(0),
    fuse_reads: AtomicU64::new(0),
    refused: AtomicU64::new(0),
};
pub(crate) static OVER: AtomicBool = AtomicBool::new(false);
static BEATS: [AtomicU64; WORKERS] = [const { AtomicU64::new(0) }; WORKERS];

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut given: HashMap<String, String> = HashMap::new();
    while let Some(name) = arguments.next() {
        given.insert(name, arguments.next().unwrap_or_default());
    }
    let number = |name: &str, default: u64| given.get(name).map_or(default, |text| text.parse().unwrap());
    if given.contains_key("--poke") {
        outside::poke(number("--poke", 0), number("--address", 0), number("--seed", 0));
        return;
    }
    if let Some(folder) = given.get("--fuse") {
        fuse::serve(folder);
        return;
    }
    let seed = number("--seed", 1);
    let folder: PathBuf = given.get("--folder").map_or_else(std::env::temp_dir, PathBuf::from);
    let until = Instant::now() + Duration::from_secs(number("--seconds", 10));
    let others: Vec<Child> = (1..number("--processes", 1)).map(|other| start_other(&given, other)).collect();
    std::fs::create_dir_all(&folder).unwrap();
    let file = work::content_file(&folder.join(format!("content.{}", std::process::id())));

    let threads: Vec<_> = (0..WORKERS)
        .map(|index| {
            let (file, mount) = (file.clone(), given.get("--mount").cloned());
            std::thread::spawn(move || work::run(seed * 100 + index as u64, &BEATS[index], &file, mount.as_deref()))
        })
        .collect();
    let pokers = outside::start(seed);
    let maps = watch(until, &threads);
    OVER.store(true, SeqCst);
    let mut right = join(threads);
    for mut poker in pokers {
        right &= poker.finish();
    }
    for mut other in others {
        let status = other.wait().unwrap();
        if !status.success() {
            eprintln!("torture: the other process ended with {status}");
            right = false;
        }
    }
    let _ = std::fs::remove_file(&file);
    if let Some(report) = given.get("--report") {
        std::fs::write(report, self::report(right, maps)).unwrap();
    }
    std::process::exit(if right { 0 } else { 1 });
}

fn start_other(given: &HashMap<String, String>, other: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    for (name, value) in given.iter().filter(|(name, _)| *name != "--processes") {
        command.arg(name);
        command.arg(match name.as_str() {
            "--seed" => (value.parse::<u64>().unwrap() + 7 * other).to_string(),
            "--report" => format!("{value}.{other}"),
            _ => value.clone(),
        });
    }
    command.spawn().unwrap()
}

/// Waits for the end and sees that nobody hangs. Returns the most mappings that there were.
fn watch(until: Instant, threads: &[std::thread::JoinHandle<()>]) -> usize {
    let mut last = [(0, Instant::now()); WORKERS];
    let mut maps = 0;
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(200));
        maps = maps.max(std::fs::read_to_string("/proc/self/maps").unwrap().lines().count());
        if maps > MAPS_MAX {
            fail(&format!("{maps} mappings"));
        }
        for ((last, beat), thread) in last.iter_mut().zip(&BEATS).zip(threads) {
            let now = beat.load(SeqCst);
            if now != last.0 {
                *last = (now, Instant::now());
            } else if thread.is_finished() {
                fail("a worker has ended");
            } else if last.1.elapsed() > WATCHDOG {
                hang();
            }
        }
    }
    maps
}

fn join(threads: Vec<std::thread::JoinHandle<()>>) -> bool {
    let deadline = Instant::now() + WATCHDOG;
    while !threads.iter().all(std::thread::JoinHandle::is_finished) {
        if Instant::now() > deadline {
            hang();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let right = threads.into_iter().all(|thread| thread.join().is_ok());
    if !right {
        eprintln!("torture: a worker panicked");
    }
    right
}

/// Something is wrong: says what and ends at once, before the evidence changes.
pub(crate) fn fail(what: &str) -> ! {
    println!("torture {}: {what}", std::process::id());
    eprintln!("torture {}: {what}", std::process::id());
    // SAFETY: ends the process.
    unsafe { libc::_exit(9) }
}

fn hang() -> ! {
    let mut text = String::from("a thread hangs");
    for task in std::fs::read_dir("/proc/self/task").unwrap().filter_map(Result::ok) {
        let read = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        text += &format!("\n{} {} {}", read("comm").trim(), read("wchan"), read("syscall").trim());
    }
    fail(&text);
}

fn report(right: bool, maps: usize) -> String {
    let counts = [
        ("operations", &COUNTS.operations),
        ("pages_checked", &COUNTS.pages_checked),
        ("forks", &COUNTS.forks),
        ("remaps", &COUNTS.remaps),
        ("direct_reads", &COUNTS.direct_reads),
        ("ring_reads", &COUNTS.ring_reads),
        ("pipe_pages", &COUNTS.pipe_pages),
        ("fuse_reads", &COUNTS.fuse_reads),
        ("refused", &COUNTS.refused),
    ];
    let mut text = format!("right {}\nmaps {maps}\n", u8::from(right));
    for (name, count) in counts {
        text += &format!("{name} {}\n", count.load(SeqCst));
    }
    text
}
