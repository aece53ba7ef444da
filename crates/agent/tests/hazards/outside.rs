//! V2, V9, V11: what other processes, core dumps and the kernel's books see of merged memory.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::limits::set_limit;
use crate::stand::Stand;
use crate::victim::{Region, Victim, hear, merge_densely, merge_now, merged_pair, page, pattern, tell};

pub(crate) const VICTIMS: &[Victim] = &[("watched", watched), ("dumped", dumped), ("accounted", accounted)];

const PAGES: usize = 64;
const FIRST: u64 = 700;

/// Memory whose content never changes is merged and un-merged without end.
fn watched() {
    static OVER: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    let (one, two) = merged_pair(PAGES, FIRST);
    merge_densely();
    let worker = std::thread::spawn(move || {
        while !OVER.load(std::sync::atomic::Ordering::SeqCst) {
            // Somebody who reads holds pages: then they cannot be given back at this moment, and stay merged.
            one.advise(libc::MADV_UNMERGEABLE);
            one.mergeable();
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    tell(&format!("watched {}", one.start));
    hear();
    OVER.store(true, std::sync::atomic::Ordering::SeqCst);
    worker.join().unwrap();
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// V2: who reads from outside gets the right bytes or EIO, and never something else.
///
/// Seen to fail: with windows that are not registered for missing pages before they are frozen, a reader got zeros.
#[test]
fn v2_reads_from_outside_are_right_or_refused() {
    let stand = Stand::on_request();
    let mut running = stand.start("watched");
    let start: usize = running.expect("watched").parse().unwrap();
    let memory = std::fs::File::open(format!("/proc/{}/mem", running.pid())).unwrap();
    let (mut right, mut refused) = (0_u64, 0_u64);
    let expected: Vec<Vec<u8>> = (0..PAGES)
        .map(|index| pattern(FIRST + index as u64).iter().flat_map(|word| word.to_ne_bytes()).collect())
        .collect();
    let until = Instant::now() + Duration::from_secs(4);
    let mut buffer = vec![0; page()];
    while Instant::now() < until {
        for (index, expected) in expected.iter().enumerate() {
            match memory.read_exact_at(&mut buffer, (start + index * page()) as u64) {
                Ok(()) => {
                    assert!(buffer == *expected, "page {index} read as {:x?}...", &buffer[..16]);
                    right += 1;
                }
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO), "page {index}: {error}");
                    refused += 1;
                }
            }
        }
    }
    println!("{right} reads were right, {refused} refused");
    assert!(right > 1000);
    running.say("enough");
    running.succeed();
    stand.assert_merged(PAGES as u64);
}

/// Merges, and dies with a core dump in the folder that it is told.
fn dumped() {
    let (one, _two) = merged_pair(PAGES, FIRST);
    assert_eq!(one.merged() + 1, PAGES);
    std::fs::write("/proc/self/coredump_filter", std::env::var("FILTER").unwrap()).unwrap();
    std::env::set_current_dir(std::env::var_os("FOLDER").unwrap()).unwrap();
    set_limit(libc::RLIMIT_CORE, libc::RLIM_INFINITY);
    // SAFETY: ends this victim, as is wanted.
    unsafe { libc::abort() };
}

/// The kernel's pattern for names of core dumps, a plain name while this lives.
struct CorePattern {
    before: Option<String>,
    _lock: std::fs::File,
}

const CORE_PATTERN: &str = "/proc/sys/kernel/core_pattern";

impl CorePattern {
    fn plain() -> Option<Self> {
        let lock = ksm::host_lock().unwrap();
        let before = std::fs::read_to_string(CORE_PATTERN).unwrap();
        if before.trim_end() == "core" {
            return Some(Self { before: None, _lock: lock });
        }
        if std::fs::write(CORE_PATTERN, "core").is_err() {
            println!("skipped: the right to name core dumps ({CORE_PATTERN})");
            return None;
        }
        Some(Self { before: Some(before), _lock: lock })
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = std::fs::write(CORE_PATTERN, before);
        }
    }
}

/// How many of the merged pages a core dump in a folder has.
fn pages_in_core(folder: &Path) -> usize {
    let core = std::fs::read_dir(folder).unwrap().flatten().next();
    let core = std::fs::read(core.expect("there is a core dump").path()).unwrap();
    let patterns: Vec<Vec<u8>> = (0..PAGES - 1)
        .map(|index| pattern(FIRST + index as u64).iter().flat_map(|word| word.to_ne_bytes()).collect())
        .collect();
    // Segments of a core dump begin at multiples of a page.
    patterns.iter().filter(|wanted| core.chunks_exact(page()).any(|chunk| chunk == wanted.as_slice())).count()
}

/// V9: core dumps have no merged pages, but with bit 2 of the dump filter they have all of them.
#[test]
fn v9_core_dumps_with_and_without_merged_pages() {
    let Some(_pattern) = CorePattern::plain() else { return };
    for (filter, expected) in [("0x33", 0), ("0x37", PAGES - 1)] {
        let folder = tempfile::tempdir().unwrap();
        let stand = Stand::on_request();
        let mut command = stand.command("dumped");
        command.env("FILTER", filter).env("FOLDER", folder.path());
        let (status, output) = stand.start_command(command).finish();
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(libc::SIGABRT), "{status}: {output}");
        assert_eq!(pages_in_core(folder.path()), expected, "filter {filter}");
    }
}

/// Bytes of this process that the kernel books under a name.
fn booked(name: &str) -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap();
    line.trim().trim_end_matches(" kB").parse::<i64>().unwrap() << 10
}

/// Counts what is booked as its own and as shared, before merging, merged, and un-merged.
fn accounted() {
    const MANY: usize = 1024;
    let (one, two) = (Region::map(MANY), Region::map(MANY));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    let bytes = (2 * MANY * page()) as i64;
    let (own, shared) = (booked("RssAnon"), booked("RssShmem"));
    crate::victim::merge_pair(one, two);
    one.check_from(FIRST);
    two.check_from(FIRST);
    assert!(own - booked("RssAnon") > bytes * 9 / 10, "{own} are {}", booked("RssAnon"));
    assert!(booked("RssShmem") - shared > bytes * 9 / 10, "{shared} are {}", booked("RssShmem"));
    for region in [one, two] {
        crate::victim::wait_until("the pages are given back", || {
            let done = region.advise(libc::MADV_UNMERGEABLE) == 0;
            merge_now();
            done
        });
    }
    assert!((own - booked("RssAnon")).abs() < bytes / 10, "{own} are {}", booked("RssAnon"));
    assert!(booked("RssShmem") - shared < bytes / 10, "{shared} are {}", booked("RssShmem"));
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// V11: merged memory moves from RssAnon to RssShmem, and back.
#[test]
fn v11_merged_memory_is_booked_as_shared() {
    let stand = Stand::on_request();
    stand.run("accounted");
    stand.assert_merged(2000);
}
