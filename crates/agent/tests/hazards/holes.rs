//! MADV_MERGEABLE and MADV_UNMERGEABLE over what is not mapped, and over ranges that are hardly mapped.

use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use crate::stand::{Running, Stand, plain_command};
use crate::victim::{Region, Victim, errno, merge_now, merged_pair, page, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[("answers", answers), ("merged_with_holes", merged_with_holes), ("huge", huge)];

const PAGES: usize = 24;
/// What the kernel does in no time at all, on a busy machine. With pages walked it would be minutes.
const AT_ONCE: Duration = Duration::from_secs(5);

fn advise(start: usize, len: usize, advice: i32) -> i32 {
    // SAFETY: these advices change no content.
    let result = unsafe { libc::madvise(start as *mut libc::c_void, len, advice) };
    if result == 0 { 0 } else { errno() }
}

/// Tells what the kernel, or the gate, says to each call.
fn answers() {
    let say = |what: &str, region: Region| {
        for (name, advice) in [("mergeable", libc::MADV_MERGEABLE), ("unmergeable", libc::MADV_UNMERGEABLE)] {
            // Twice: the second finds what the first has done.
            tell(&format!("{what} {name}: {} {}", region.advise(advice), region.advise(advice)));
        }
    };
    let pierced = |from: usize, to: usize| {
        let region = Region::map(6);
        if from < to {
            region.part(from, to).unmap();
        }
        region
    };
    say("whole", pierced(0, 0));
    say("middle", pierced(2, 4));
    say("front", pierced(0, 1));
    say("back", pierced(5, 6));
    say("nothing", pierced(0, 6));
    let mixed = pierced(1, 2);
    assert_eq!(mixed.part(3, 4).protect(libc::PROT_NONE), 0);
    say("mixed", mixed);
    // Only a part of it was handed over.
    let region = pierced(4, 5);
    region.part(0, 2).mergeable();
    tell(&format!("partly: {}", region.advise(libc::MADV_UNMERGEABLE)));
    // What is mapped into a hole later is nothing special.
    let region = pierced(2, 4);
    tell(&format!("filled: {}", region.advise(libc::MADV_MERGEABLE)));
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: into the hole that was made above.
    let mapped = unsafe { libc::mmap(region.pointer(2), 2 * page(), prot, flags, -1, 0) };
    assert_eq!(mapped, region.pointer(2));
    say("filled", region);
    let region = pierced(0, 0);
    region.mergeable();
    tell(&format!("to the end: {}", advise(region.start, 1 << 50, libc::MADV_UNMERGEABLE)));
    tell(&format!("wrapped: {}", advise(region.start, usize::MAX - page(), libc::MADV_UNMERGEABLE)));
}

/// F11: both advices say over holes what they say without pagefold.
///
/// Seen to fail: everything was answered with 0.
#[test]
fn f11_mergeable_over_holes_has_the_kernels_answers() {
    let lines = |said: &str| said.lines().filter(|line| line.contains(": ")).map(str::to_owned).collect::<Vec<_>>();
    let plain = Running::start(plain_command("answers"), None).succeed();
    if plain.contains("whole mergeable: 22 22") {
        println!("skipped: this kernel has no KSM");
        return;
    }
    let said = Stand::on_request().run("answers");
    assert_eq!(lines(&said), lines(&plain));
    assert!(plain.contains("middle mergeable: 12 12"), "{plain}");
}

/// What is mapped is taken, and given back, in spite of the answer.
fn merged_with_holes() {
    let (one, two) = merged_pair(PAGES, 700);
    one.part(10, 12).unmap();
    let intact = || {
        one.part(0, 10).check_from(700);
        one.part(12, PAGES).check_from(712);
        two.check_from(700);
    };
    for _ in 0..2 {
        assert_eq!(one.advise(libc::MADV_UNMERGEABLE), libc::ENOMEM);
        assert_eq!(one.merged(), 0);
        intact();
        merge_now();
        assert_eq!(one.merged(), 0, "taken back is taken back");
        assert_eq!(one.advise(libc::MADV_MERGEABLE), libc::ENOMEM);
        wait_until("it is merged again", || {
            merge_now();
            one.part(0, 10).merged() >= 9 && one.part(12, PAGES).merged() >= 10
        });
        intact();
    }
    // Nobody has handed over what comes into the hole.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: into the hole that was made above.
    let filled = unsafe { libc::mmap(one.pointer(10), 2 * page(), 3, flags, -1, 0) };
    assert_eq!(filled, one.pointer(10));
    one.part(10, 12).fill_from(710);
    for _ in 0..20 {
        merge_now();
    }
    assert_eq!(one.part(10, 12).merged(), 0);
    // An end behind all addresses is one more hole.
    assert_eq!(advise(one.start, 1 << 50, libc::MADV_UNMERGEABLE), libc::ENOMEM);
    assert_eq!(one.merged(), 0);
    one.check_from(700);
}

/// F11: with merged pages around the holes.
///
/// Seen to fail: 0 instead of ENOMEM; and what was mapped into the hole later was merged, though nobody had handed it
/// over.
#[test]
fn f11_merged_memory_with_holes() {
    let stand = Stand::on_request();
    stand.run("merged_with_holes");
    stand.assert_merged(PAGES as u64);
}

/// 4 MiB in 256 GiB of nothing, merged.
fn huge() {
    const HUGE: usize = 1 << 38;
    let prot = libc::PROT_NONE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a free place of the kernel's choice, most of which is given back.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), HUGE, prot, flags, -1, 0) };
    assert!(start != libc::MAP_FAILED);
    let region = Region { start: start as usize, pages: 1024 };
    assert_eq!(region.protect(libc::PROT_READ | libc::PROT_WRITE), 0);
    Region { start: region.end(), pages: HUGE / page() - 1024 }.unmap();
    // A mapping that userfaultfd does not know, at the far end.
    let file = std::fs::File::open("/proc/self/exe").expect("proc is mounted");
    let last = (start as usize + HUGE - page()) as *mut libc::c_void;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: a place where nothing is.
    let mapped = unsafe { libc::mmap(last, page(), libc::PROT_READ, flags, file.as_raw_fd(), 0) };
    assert_eq!(mapped, last);
    let (one, two) = (region.part(0, 512), region.part(512, 1024));
    one.fill_from(1);
    two.fill_from(1);
    region.mergeable();
    wait_until("it is merged", || {
        merge_now();
        region.merged() >= 1000
    });
    // The last one has its pages given back too.
    for advice in [libc::MADV_MERGEABLE, libc::MADV_UNMERGEABLE, libc::MADV_MERGEABLE, libc::MADV_WIPEONFORK] {
        if advice == libc::MADV_WIPEONFORK {
            wait_until("it is merged again", || {
                merge_now();
                region.merged() >= 1000
            });
        }
        let begun = Instant::now();
        // A file cannot be wiped.
        let wanted = if advice == libc::MADV_WIPEONFORK { libc::EINVAL } else { libc::ENOMEM };
        assert_eq!(advise(region.start, HUGE, advice), wanted);
        assert!(begun.elapsed() < AT_ONCE, "advice {advice}: {:?}", begun.elapsed());
    }
    assert_eq!(region.merged(), 0);
    one.check_from(1);
    two.check_from(1);
}

/// F11: how long a range is does not matter where nothing is mapped.
///
/// Seen to fail: 0 instead of ENOMEM, and for UNMERGEABLE more than 12 s in a sixteenth of this.
#[test]
fn f11_mergeable_over_a_huge_range_takes_no_time() {
    let stand = Stand::on_request();
    stand.run("huge");
    stand.assert_merged(1000);
}
