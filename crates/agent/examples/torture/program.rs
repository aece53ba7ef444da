//! What the torturing programs have in common: their arguments, counts, watchdog, report.

use std::collections::HashMap;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// Threads that own memory each.
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

/// Numbers as they come (xorshift).
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// `--NAME VALUE` each.
pub(crate) struct Arguments(HashMap<String, String>);

impl Arguments {
    pub(crate) fn of_process() -> Self {
        let mut words = std::env::args().skip(1);
        let mut given = HashMap::new();
        while let Some(name) = words.next() {
            given.insert(name, words.next().unwrap_or_default());
        }
        Self(given)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&String> {
        self.0.get(name)
    }

    pub(crate) fn number(&self, name: &str, default: u64) -> u64 {
        self.get(name).map_or(default, |text| text.parse().unwrap())
    }

    pub(crate) fn seed(&self) -> u64 {
        self.number("--seed", 1)
    }
}

/// Has workers at work until the time is over, and ends the process. `begin` starts what goes on beside them, and `end`
/// says whether that went right.
pub(crate) fn run<T>(
    given: &Arguments,
    work: impl Fn(u64, &'static AtomicU64) + Clone + Send + 'static,
    begin: impl FnOnce() -> T,
    end: impl FnOnce(T) -> bool,
) -> ! {
    let until = Instant::now() + Duration::from_secs(given.number("--seconds", 10));
    let others: Vec<Child> = (1..given.number("--processes", 1)).map(|other| start_other(given, other)).collect();
    let seed = given.seed();
    let threads: Vec<_> = (0..WORKERS)
        .map(|index| {
            let work = work.clone();
            std::thread::spawn(move || work(seed * 100 + index as u64, &BEATS[index]))
        })
        .collect();
    let beside = begin();
    let maps = watch(until, &threads);
    OVER.store(true, SeqCst);
    let mut right = join(threads);
    right &= end(beside);
    for mut other in others {
        let status = other.wait().unwrap();
        if !status.success() {
            eprintln!("torture: the other process ended with {status}");
            right = false;
        }
    }
    if let Some(report) = given.get("--report") {
        std::fs::write(report, self::report(right, maps)).unwrap();
    }
    std::process::exit(if right { 0 } else { 1 });
}

fn start_other(given: &Arguments, other: u64) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    for (name, value) in given.0.iter().filter(|(name, _)| *name != "--processes") {
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
    if std::env::var_os("SOAK_HOLDS").is_some() {
        eprintln!("torture {}: {text}", std::process::id());
        loop {
            std::thread::sleep(Duration::from_secs(60));
        }
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
