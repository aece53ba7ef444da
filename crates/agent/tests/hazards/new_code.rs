//! Code that comes into a program that is managed whole: admitted, or merging ends before it is there.

use std::fs::File;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::stand::Stand;
use crate::victim::{Region, Victim, flags_at, fork, hear, page, pid, reap, tell};
use crate::whole::{FIRST, LARGE, large_pair, wait_whole};

pub(crate) const VICTIMS: &[Victim] =
    &[("whole_code", code), ("whole_child_code", child_code), ("whole_unreadable", unreadable)];

/// Maps a file's first page as code.
pub(crate) fn bring(name: &str) {
    try_to_bring(name).unwrap();
}

pub(crate) fn try_to_bring(name: &str) -> std::io::Result<()> {
    let file = File::open(name).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: a free place of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), page(), prot, libc::MAP_PRIVATE, fd, 0) };
    if at == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Code comes when everything is merged: what the broker admits changes nothing, what it does not admit ends it.
fn code() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    bring("/proc/self/exe");
    assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
    tell("admitted");
    hear();
    bring("/bin/sh");
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    one.check_from(FIRST);
    two.check_from(FIRST);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "merged again");
    tell(&format!("{} is left", pid()));
}

/// Code comes while merged pages cannot be read, some of which had been written before.
fn unreadable() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    let part = one.part(100, 140);
    part.part(3, 5).fill_from(1);
    assert_eq!(part.protect(libc::PROT_NONE), 0);
    let begun = Instant::now();
    bring("/bin/sh");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    assert!(!flags_at(part.start).contains(" rd"), "it can be read: {}", flags_at(part.start));
    assert_eq!(part.protect(libc::PROT_READ | libc::PROT_WRITE), 0);
    part.part(3, 5).check_from(1);
    part.part(3, 5).fill_from(FIRST + 103);
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// Seen to fail: what nobody could read was never given back, and libraries were refused for ever.
#[test]
fn what_cannot_be_read_is_given_back_too() {
    Stand::of_all(|_| false).run("whole_unreadable");
}

#[test]
fn what_nobody_knows_ends_merging_before_it_comes() {
    use std::os::unix::fs::MetadataExt as _;
    let stand = Stand::of_all(|file| {
        let inode = |name: &str| std::fs::metadata(name).map(|about| about.ino()).ok();
        let asked = file.and_then(|file| file.metadata().ok()).map(|about| about.ino());
        asked.is_some() && asked == inode("/proc/self/exe")
    });
    let mut victim = stand.start("whole_code");
    victim.expect("admitted");
    victim.say("go on");
    victim.succeed();
    let stopped = stand.summary().stopped;
    assert!(matches!(&stopped[..], [one] if one.contains("/hazards-") && one.contains("vouches for")), "{stopped:?}");
}

/// Children of fork map code before they have a helper of their own, alone and with other threads.
fn child_code() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    for threads in [0, 2] {
        for _ in 0..5 {
            reap(fork(|| in_company(threads, || bring_all(one, two))));
        }
    }
    assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// Maps code that is not admitted: nothing is merged any more once it is there.
pub(crate) fn bring_all(one: Region, two: Region) {
    bring("/bin/sh");
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// As [`bring_all`], where pages have other protections and advices, which they keep.
pub(crate) fn bring_alone(one: Region, two: Region) {
    assert_eq!(one.part(10, 20).protect(libc::PROT_NONE), 0);
    assert_eq!(one.part(300, 700).protect(libc::PROT_READ), 0);
    assert_eq!(two.part(100, 200).advise(libc::MADV_DONTFORK), 0);
    two.part(200, 210).fill_from(7);
    bring("/bin/sh");
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    let smaps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let has = |region: Region, prot: &str| {
        smaps
            .lines()
            .any(|line| line.starts_with(&format!("{:x}-{:x} {prot}", region.start, region.start + region.len())))
    };
    assert!(has(one.part(10, 20), "---p") && has(one.part(300, 700), "r--p"), "{smaps}");
    assert_eq!(one.part(10, 20).protect(libc::PROT_READ | libc::PROT_WRITE), 0);
    assert_eq!(one.part(300, 700).protect(libc::PROT_READ | libc::PROT_WRITE), 0);
    one.check_from(FIRST);
    two.part(0, 200).check_from(FIRST);
    two.part(200, 210).check_from(7);
    two.part(210, LARGE).check_from(FIRST + 210);
    // What a plain page does, and one mapping again.
    assert_eq!(one.advise(libc::MADV_DONTNEED), 0);
    one.check_zero();
    // SAFETY: the region, which nobody else uses.
    let grown = unsafe { libc::mremap(one.pointer(0), one.len(), one.len() + page(), libc::MREMAP_MAYMOVE) };
    assert_ne!(grown, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    let mut resident = [0_u8; 1];
    // SAFETY: asks about one page.
    reap(fork(|| assert_eq!(unsafe { libc::mincore(two.pointer(100), page(), resident.as_mut_ptr()) }, -1)));
}

/// Runs something while other threads work.
pub(crate) fn in_company(threads: usize, work: impl FnOnce()) {
    struct Done<'a>(&'a AtomicU32);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(1, SeqCst);
        }
    }
    let done = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while done.load(SeqCst) == 0 {
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
        }
        let _done = Done(&done);
        work();
    });
}

/// A broker that admits everything but the shell, which [`bring_all`] maps.
pub(crate) fn stand_without_shell() -> Stand {
    use std::os::unix::fs::MetadataExt as _;
    Stand::of_all(|file| {
        let inode = file.and_then(|file| file.metadata().ok()).map(|about| about.ino());
        inode != Some(std::fs::metadata("/bin/sh").unwrap().ino())
    })
}

/// Seen to fail: a child without a helper was let go on with all pages merged, and unknown code in it.
#[test]
fn what_nobody_knows_ends_merging_in_young_children_too() {
    stand_without_shell().run("whole_child_code");
}
