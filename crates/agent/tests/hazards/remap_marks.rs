//! D7: what mremap does to the gate's own knowledge: marks that have to be moved, mappings that have to be read.

use crate::limits::set_soft_limit;
use crate::remaps::{FIRST, RW, discard, merged_apart, pages, remap};
use crate::stand::Stand;
use crate::victim::{Region, Victim, errno, merge_now, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[
    ("middle_shrinks", || middle_goes(false)),
    ("middle_moves", || middle_goes(true)),
    ("one_descriptor", one_descriptor),
    ("descriptors_are_closed", descriptors_are_closed),
];

/// A part in the middle of a large range goes, and the program maps its own memory there. Behind it pages are merged.
fn middle_goes(by_moving: bool) {
    const PAGES: usize = 24_576;
    let whole = Region::map(PAGES);
    let twin = Region::map(256);
    // Fills the gaps, so that the first free place is the one that is unmapped below.
    (0..300).for_each(|_| _ = Region::map(4));
    let one = whole.part(PAGES - 300, PAGES - 44);
    one.fill_from(FIRST);
    twin.fill_from(FIRST);
    whole.mergeable();
    twin.mergeable();
    wait_until("the end of the range is merged", || {
        merge_now();
        one.merged() == one.pages
    });
    let middle = whole.part(4096, 12_288);
    let hole = if by_moving {
        let place = Region::map(middle.pages);
        remap(middle, middle.pages, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, place.start).expect("it moves");
        middle
    } else {
        remap(middle, 4096, 0, 0).expect("it shrinks");
        whole.part(8192, 12_288)
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: a place that was the victim's own and is unmapped.
    let fresh = unsafe { libc::mmap(hole.pointer(0), hole.len(), RW, flags, -1, 0) };
    assert_eq!(fresh, hole.pointer(0));
    hole.check_zero();
    one.check_from(FIRST);
    discard(one);
}

/// D7: the array of marks for what lies behind the part that goes is not mapped where that part was.
///
/// Seen to fail: it was, so the program's own mapping took its place, the marks read as plain, and pages that the program
/// discarded showed the store.
#[test]
fn d7_the_middle_of_a_range_goes() {
    let stand = Stand::on_request();
    stand.run("middle_shrinks");
    stand.run("middle_moves");
    stand.assert_merged(400);
}

/// Moves merged memory to and fro while something is in the way; refusals are all right, wrong bytes are not.
fn move_often(one: Region, rounds: usize) {
    let places = [Region::map(one.pages), Region::map(one.pages)];
    let mut at = one;
    let mut moved = 0;
    for round in 0..rounds {
        let to = places[round % 2];
        if to.start == at.start {
            continue;
        }
        if let Ok(new) = remap(at, at.pages, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to.start) {
            at = new;
            moved += 1;
        }
        at.check_from(FIRST);
    }
    tell(&format!("{moved} of {rounds} moves"));
    assert!(moved > 0);
}

/// One descriptor is left, which another thread takes and gives back.
fn one_descriptor() {
    let (one, _two) = merged_apart(pages(1));
    set_soft_limit(libc::RLIMIT_NOFILE, 64);
    let mut all = Vec::new();
    // SAFETY: takes whatever number is free.
    while let number @ 0.. = unsafe { libc::dup(1) } {
        all.push(number);
    }
    assert_eq!(errno(), libc::EMFILE);
    // SAFETY: opened above.
    unsafe { libc::close(all[0]) };
    std::thread::spawn(|| {
        loop {
            drop(std::fs::File::open("/dev/null"));
            (0..200).for_each(|_| std::hint::spin_loop());
        }
    });
    move_often(one, 4000);
}

/// Another thread closes whatever it does not know, again and again.
fn descriptors_are_closed() {
    let (one, _two) = merged_apart(pages(1));
    std::thread::spawn(|| {
        loop {
            // SAFETY: closes what this process has beyond the standard descriptors.
            unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
            (0..300).for_each(|_| std::hint::spin_loop());
        }
    });
    move_often(one, 2000);
}

/// D7, D3: mappings that could not be read to the end are not moved.
///
/// Seen to fail: what had been read was taken for all there is, the old place was given up, the new one was empty, and the
/// victim died of a SIGSEGV within 0.3 s, in both cases.
#[test]
fn d7_moves_without_descriptors() {
    let stand = Stand::on_request();
    for victim in ["one_descriptor", "descriptors_are_closed"] {
        let output = stand.run(victim);
        println!("{victim}: {}", output.lines().rfind(|line| line.ends_with("moves")).unwrap_or_default());
    }
    stand.assert_merged(400);
}
