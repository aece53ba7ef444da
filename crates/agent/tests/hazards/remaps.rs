//! D7, V3: mremap and realloc of large merged ranges, which consist of hundreds of mappings.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::mappings::readable;
use crate::stand::Stand;
use crate::victim::{
    Random, Region, Victim, errno, flags_at, merge_densely, merge_now, merge_pair, page, tell, wait_until,
};

pub(crate) const VICTIMS: &[Victim] = &[
    ("shrinks", shrinks),
    ("moves", moves),
    ("parts_move", parts_move),
    ("keeps_what_was_said", keeps_what_was_said),
    ("refuses", refuses),
    ("reallocates", reallocates),
    ("remaps_densely", remaps_densely),
    ("moves_several", moves_several),
];

pub(crate) const FIRST: u64 = 1000;
const MIB: usize = 1 << 20;
pub(crate) const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

pub(crate) fn pages(mib: usize) -> usize {
    mib * MIB / page()
}

/// As mremap(2), in pages; the new place or the error.
pub(crate) fn remap(region: Region, new: usize, flags: i32, target: usize) -> Result<Region, i32> {
    let len = new * page();
    // SAFETY: the victim's own memory, looked at afterwards where it then is.
    let at = unsafe { libc::mremap(region.pointer(0), region.len(), len, flags, target as *mut libc::c_void) };
    if at == libc::MAP_FAILED { Err(errno()) } else { Ok(Region { start: at as usize, pages: new }) }
}

/// A place where `pages` fit, and are free.
fn free_place(pages: usize) -> usize {
    let place = Region::map(pages);
    place.unmap();
    place.start
}

/// A merged region with nothing mapped right behind it, and one that is its equal.
pub(crate) fn merged_apart(pages: usize) -> (Region, Region) {
    let place = Region::map(2 * pages);
    let one = place.part(0, pages);
    let two = Region::map(pages);
    place.part(pages, 2 * pages).unmap();
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    merge_pair(one, two);
    (one, two)
}

/// Two mappings at once, which Linux 6.17 began to move: where they are managed as where they are not, whatever they hold.
fn moves_several() {
    const PAGES: usize = 4096;
    let both = |region: Region| {
        // No page has a twin.
        (0..PAGES).for_each(|index| region.fill(index, (region.start + index * page()) as u64));
        assert_eq!(region.part(PAGES / 2, PAGES).protect(libc::PROT_READ), 0);
        region
    };
    let moved = |region: Region| {
        let target = Region::map(PAGES);
        let to = remap(region, PAGES, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, target.start);
        let there = if to.is_ok() { target } else { region };
        (0..PAGES).for_each(|index| assert!(there.holds(index, (region.start + index * page()) as u64)));
        to.map(|_| ())
    };
    // It has properties that are never managed.
    let plain = Region::map(PAGES);
    plain.advise(libc::MADV_DONTDUMP);
    let plainly = moved(both(plain));
    tell(&format!("plain memory: {plainly:?}"));
    for _ in 0..3 {
        let region = both(Region::map(PAGES));
        // What cannot be written is not.
        wait_until("one of the two is managed", || flags_at(region.address(0)).contains(" uw"));
        assert_eq!(moved(region), plainly);
    }
}

/// V3. Seen to fail: EFAULT, since the kernel moves nothing that is registered with a userfaultfd in this way.
#[test]
fn v3_several_mappings_move_at_once() {
    Stand::of_all(|_| true).run("moves_several");
}

/// What is merged shows zeros once it is discarded only if the gate still knows where it is.
pub(crate) fn discard(region: Region) {
    assert_eq!(region.advise(libc::MADV_DONTNEED), 0);
    region.check_zero();
}

/// Shrinks in place, to half and to a page.
fn shrinks() {
    for mib in [32, 64] {
        let (one, two) = merged_apart(pages(mib));
        let half = pages(mib) / 2;
        let kept = remap(one, half, 0, 0).expect("it shrinks");
        assert_eq!(kept.start, one.start);
        assert!(!readable(kept.end()), "the tail is gone");
        assert!(kept.merged() >= half - 1, "{} of {half} pages are still merged", kept.merged());
        kept.check_from(FIRST);
        // Where the tail was there is other memory now, of which the gate knows nothing.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: takes a free place.
        let fresh = unsafe { libc::mmap(kept.pointer(half), half * page(), RW, flags, -1, 0) };
        assert_eq!(fresh, kept.pointer(half));
        let fresh = Region { start: fresh as usize, pages: half };
        fresh.fill_from(7);
        fresh.check_from(7);
        discard(fresh);
        discard(kept.part(3, half - 3));
        assert_eq!(remap(kept, 1, 0, 0).map(|kept| kept.start), Ok(one.start));
        kept.part(0, 1).check_from(FIRST);
        two.check_from(FIRST);
        two.unmap();
    }
}

/// D7: a large merged range shrinks in place, and what stays is not un-merged.
///
/// Seen to fail: with a fixed number of pieces the first mremap answered ENOMEM.
#[test]
fn d7_large_ranges_shrink() {
    let stand = Stand::on_request();
    stand.run("shrinks");
    stand.assert_merged(pages(64) as u64);
}

/// Grows in place, grows by moving, moves to a place of its own choice, moves and shrinks.
fn moves() {
    let may_move = libc::MREMAP_MAYMOVE;
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    for mib in [32, 64] {
        let all = pages(mib);
        let (one, two) = merged_apart(all);

        let grown = remap(one, all + 64, 0, 0).expect("it grows in place");
        assert_eq!(grown.start, one.start);
        grown.part(0, all).check_from(FIRST);
        grown.part(all, all + 64).check_zero();
        assert!(grown.merged() >= all - 1, "{} of {all} pages are still merged", grown.merged());
        grown.part(all, all + 64).fill_from(9);

        // Something behind it: it cannot grow where it is.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: takes a free place.
        let wall = unsafe { libc::mmap(grown.end() as *mut libc::c_void, page(), RW, flags, -1, 0) };
        assert_eq!(wall as usize, grown.end());
        assert_eq!(remap(grown, all + 128, 0, 0), Err(libc::ENOMEM));
        let moved = remap(grown, all + 128, may_move, 0).expect("it grows elsewhere");
        assert!(!readable(grown.start) && !readable(grown.end() - 1), "the old place is free");
        moved.part(0, all).check_from(FIRST);
        moved.part(all, all + 64).check_from(9);
        moved.part(all + 64, all + 128).check_zero();
        assert!(moved.merged() >= all - 1, "{} of {all} pages are still merged", moved.merged());

        let target = free_place(all + 128);
        let there = remap(moved, all + 128, fixed, target).expect("it moves");
        assert_eq!(there.start, target);
        there.part(0, all).check_from(FIRST);
        there.part(all, all + 64).check_from(9);
        assert!(there.merged() >= all - 1, "{} of {all} pages are still merged", there.merged());

        // Over its own twin, which is merged as well, and shorter.
        let shorter = remap(there, all - 100, fixed, two.start).expect("it moves over other merged memory");
        assert_eq!(shorter.start, two.start);
        assert!(!readable(there.start) && !readable(there.end() - 1), "the old place is free");
        shorter.check_from(FIRST);
        two.part(all - 100, all).check_from(FIRST + all as u64 - 100);

        shorter.fill(5, 77);
        assert!(shorter.holds(5, 77));
        discard(shorter.part(6, all - 100));
        discard(two);
        two.unmap();
    }
}

/// D7: a large merged range grows, in place and by moving, moves and shrinks by moving; it stays merged, what is new of
/// it is zero, and what is discarded of it is zero.
///
/// Seen to fail: with a fixed number of pieces the first mremap answered ENOMEM.
#[test]
fn d7_large_ranges_move_and_grow() {
    let stand = Stand::on_request();
    stand.run("moves");
    stand.assert_merged(pages(64) as u64);
}

/// The middle of a large range moves away, and back.
fn parts_move() {
    let all = pages(64);
    let (from, to) = (pages(10) + 3, pages(50) + 5);
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (one, two) = merged_apart(all);
    let part = one.part(from, to);
    let away = remap(part, part.pages, fixed, free_place(part.pages)).expect("the middle moves");
    assert!(!readable(part.start) && !readable(part.end() - 1), "it has left a hole");
    away.check_from(FIRST + from as u64);
    one.part(0, from).check_from(FIRST);
    one.part(to, all).check_from(FIRST + to as u64);
    assert!(away.merged() >= away.pages - 1, "{} of {} pages are merged", away.merged(), away.pages);

    // Its last page is merged: what grows behind it must not be the store's next.
    let grown = remap(away, away.pages + 40, libc::MREMAP_MAYMOVE, 0).expect("the middle grows");
    grown.part(0, away.pages).check_from(FIRST + from as u64);
    grown.part(away.pages, grown.pages).check_zero();
    grown.part(away.pages, grown.pages).fill_from(5);
    grown.part(away.pages, grown.pages).check_from(5);
    merge_now();
    let back = remap(grown, part.pages, fixed, part.start).expect("it comes back");
    assert_eq!(back.start, part.start);
    one.check_from(FIRST);
    merge_now();
    one.check_from(FIRST);
    discard(one.part(from - 20, from + 20));
    discard(one.part(to - 20, to + 20));
    two.check_from(FIRST);

    // A single page in the middle of a run of the store, to two.
    let page = remap(two.part(700, 701), 2, libc::MREMAP_MAYMOVE, 0).expect("one page grows");
    page.part(0, 1).check_from(FIRST + 700);
    page.part(1, 2).check_zero();
    two.part(0, 700).check_from(FIRST);
    two.part(701, all).check_from(FIRST + 701);

    // What stays behind a move with DONTUNMAP is zero, and not the store's.
    let stays = two.part(1000, 1000 + pages(20));
    let moved = remap(stays, stays.pages, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, 0).expect("the pages move");
    moved.check_from(FIRST + 1000);
    stays.check_zero();
}

/// D7: a part of a large range moves, grows and comes back.
///
/// Seen to fail: with a fixed number of pieces the first mremap answered ENOMEM.
#[test]
fn d7_a_part_of_a_large_range_moves() {
    let stand = Stand::on_request();
    stand.run("parts_move");
    stand.assert_merged(pages(64) as u64);
}

/// What was said about a range goes where it goes: properties, excluded pages, and which part of it was handed over.
fn keeps_what_was_said() {
    let all = 64;
    let (one, two) = (Region::map(all), Region::map(all));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    // Whatever lies in `one` besides the middle was never handed over.
    one.part(10, 50).mergeable();
    two.mergeable();
    assert_eq!(one.part(10, 50).advise(libc::MADV_DONTDUMP), 0);
    wait_until("the middle is merged", || {
        merge_now();
        one.part(10, 50).merged() >= 39
    });
    let target = free_place(all);
    let moved = remap(one.part(10, 50), 40, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, target).expect("it moves");
    assert!(flags_at(moved.address(20)).contains(" dd"), "DONTDUMP stays");
    // Its last page was merged or not: what grows has the properties in both cases.
    for part in [moved, moved.part(3, 30)] {
        let grown = remap(part, part.pages + 8, libc::MREMAP_MAYMOVE, 0).expect("it grows");
        grown.part(part.pages, grown.pages).check_zero();
        assert!(flags_at(grown.address(part.pages + 3)).contains(" dd"), "what has grown is not dumped either");
        let (flags, place) = match grown.start == part.start {
            true => (0, 0),
            false => (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, part.start),
        };
        let back = remap(grown, part.pages, flags, place).expect("it shrinks to what it was");
        assert_eq!(back, part);
        back.check_from(FIRST + 10 + (part.start - moved.start) as u64 / page() as u64);
    }
    let home = remap(moved, 40, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, one.address(10)).expect("it moves back");
    assert_eq!(home.start, one.address(10));
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let one = remap(one, all, fixed, free_place(all)).expect("all of it moves");
    one.fill_from(FIRST);
    wait_until("the middle is merged again", || {
        merge_now();
        one.part(10, 50).merged() >= 39
    });
    assert_eq!(one.part(0, 10).stored(), [0_usize; 0], "this was not handed over");
    assert_eq!(one.part(50, all).stored(), [0_usize; 0], "nor this");
    one.check_from(FIRST);
}

/// D7, V7: a move takes along what was said about the pages, and hands nothing over that was not.
#[test]
fn d7_what_was_said_moves_along() {
    let stand = Stand::on_request();
    stand.run("keeps_what_was_said");
    stand.assert_merged(60);
}

/// Calls that fail, each with its error.
fn refused(one: Region) {
    let all = one.pages;
    let (may_move, fixed, keep) = (libc::MREMAP_MAYMOVE, libc::MREMAP_FIXED, libc::MREMAP_DONTUNMAP);
    let place = free_place(all);
    for (new, flags, target) in [
        (0, may_move, 0),
        (all, fixed, place),
        (all, keep, 0),
        (all - 1, may_move | keep, 0),
        (all + 1, may_move | keep, 0),
        (all, 64, 0),
        (all, may_move | fixed, place + 8),
        (all, may_move | fixed, one.address(5)),
        (all + 5, may_move | fixed, one.start - page()),
        (all, may_move | fixed, 1 << 47),
    ] {
        assert_eq!(remap(one, new, flags, target), Err(libc::EINVAL), "{new} pages, flags {flags}, {target:#x}");
    }
    // A hole within, or behind.
    let whole = Region { pages: all + 1, ..one };
    for flags in [0, may_move] {
        assert_eq!(remap(whole, all + 5, flags, 0), Err(libc::EFAULT), "a hole at the end");
    }
    one.part(77, 78).unmap();
    assert_eq!(remap(one, all + 5, may_move, 0), Err(libc::EFAULT), "a hole in the middle");
    assert_eq!(one.part(90, 95).protect(libc::PROT_READ), 0);
    let rest = one.part(78, all);
    assert_eq!(remap(rest, all, may_move, 0), Err(libc::EFAULT), "two protections");
    one.part(0, 77).check_from(FIRST);
    rest.check_from(FIRST + 78);
}

/// Calls that fail on plain memory fail on merged memory, with the same error, and change nothing.
fn refuses() {
    let all = pages(20);
    let place = Region::map(all + 1);
    let plain = place.part(0, all);
    place.part(all, all + 1).unmap();
    plain.fill_from(FIRST);
    refused(plain);
    plain.unmap();
    let (one, two) = merged_apart(all);
    refused(one);
    two.check_from(FIRST);
    discard(one.part(0, 77));
    discard(one.part(78, all));
}

/// D7: what mremap refuses on plain memory it refuses on merged memory.
#[test]
fn d7_what_mremap_refuses() {
    let stand = Stand::on_request();
    stand.run("refuses");
    stand.assert_merged(pages(20) as u64);
}

/// A large block of malloc's grows and shrinks.
fn reallocates() {
    for mib in [32, 64] {
        // SAFETY: a block of the victim's own; every size below is within what it has at that time.
        let block = unsafe { libc::malloc(mib * MIB) } as usize;
        // The block's first page has malloc's own words.
        let inner = Region { start: block.next_multiple_of(page()), pages: pages(mib) - 1 };
        inner.fill_from(FIRST);
        let twin = Region::map(pages(mib) - 1);
        twin.fill_from(FIRST);
        merge_pair(inner, twin);
        let offset = inner.start - block;
        let inside = |block: usize, pages: usize| Region { start: block + offset, pages };

        // SAFETY: as above.
        let grown = unsafe { libc::realloc(block as *mut libc::c_void, (mib + 16) * MIB) } as usize;
        inside(grown, pages(mib) - 1).check_from(FIRST);
        let merged = inside(grown, pages(mib) - 1).merged();
        assert!(merged >= pages(mib) - 2, "{merged} pages are merged: it was copied");
        inside(grown, pages(mib + 16) - 1).fill_from(FIRST);

        // SAFETY: as above.
        let shrunk = unsafe { libc::realloc(grown as *mut libc::c_void, MIB) } as usize;
        assert_eq!(shrunk, grown, "it shrinks where it is");
        inside(shrunk, pages(1) - 1).check_from(FIRST);
        assert!(!readable(shrunk + 2 * MIB), "it has given nothing back");
        twin.check_from(FIRST);
        // SAFETY: as above.
        unsafe { libc::free(shrunk as *mut libc::c_void) };
        twin.unmap();
    }
}

/// D7: realloc of a large merged block moves it instead of copying it, and gives memory back.
///
/// Seen to fail: with a fixed number of pieces the larger block was a copy, and the smaller one kept all its memory.
#[test]
fn d7_realloc_of_large_blocks() {
    let stand = Stand::on_request();
    stand.run("reallocates");
    stand.assert_merged(pages(64) as u64);
}

/// A large range moves, grows and shrinks at random while everything is merged that can be, and a thread of the program
/// maps and unmaps memory of its own.
fn remaps_densely() {
    let all = pages(16);
    let twin = Region::map(all + 512);
    twin.fill_from(FIRST);
    twin.mergeable();
    let mut region = Region::map(all);
    region.fill_from(FIRST);
    region.mergeable();
    merge_densely();
    /// Ends the other thread, also when this one panics.
    struct Over<'a>(&'a AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, SeqCst);
        }
    }
    // What is mapped during a move must not land in the place that was chosen for it.
    let over = AtomicBool::new(false);
    // Held while a part is away. What it leaves is free, as it is without us: the kernel may put the other thread's
    // memory there, which the way back, to a fixed address, would replace.
    let away = Mutex::new(());
    let times = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(SeqCst) {
                let held = away.lock();
                let other = Region::map(300);
                other.fill(0, 3);
                other.fill(299, 4);
                std::thread::sleep(Duration::from_micros(200));
                assert!(other.holds(0, 3) && other.holds(299, 4));
                other.unmap();
                drop(held);
                std::thread::yield_now();
            }
        });
        let _over = Over(&over);
        let (mut random, until, mut times) = (Random(0x7e_0001), Instant::now() + Duration::from_secs(10), 0);
        while Instant::now() < until {
            std::thread::sleep(Duration::from_micros(random.below(60_000)));
            let new = all - 256 + random.below(768) as usize;
            let may_move = libc::MREMAP_MAYMOVE;
            let changed = match random.below(4) {
                0 => remap(region, new, may_move | libc::MREMAP_FIXED, {
                    let place = Region::map(new);
                    place.fill(0, 1);
                    place.start
                }),
                1 => {
                    // Away and back, one part after the other.
                    let _away = away.lock();
                    let part = region.part(100, all / 2);
                    let place = Region::map(part.pages);
                    let moved = remap(part, part.pages, may_move | libc::MREMAP_FIXED, place.start).expect("away");
                    moved.check_from(FIRST + 100);
                    remap(moved, part.pages, may_move | libc::MREMAP_FIXED, part.start).expect("back");
                    Ok(region)
                }
                _ => remap(region, new, may_move, 0),
            };
            let changed = changed.expect("it is moved and resized");
            let same = region.pages.min(changed.pages);
            changed.part(0, same).check_from(FIRST);
            changed.part(same, changed.pages).check_zero();
            region = changed;
            region.fill(random.below(region.pages as u64) as usize, 1);
            region.fill_from(FIRST);
            times += 1;
        }
        times
    });
    twin.check_from(FIRST);
    tell(&format!("{times} times"));
}

/// D7, V3: a large range moves and changes its size while it is merged without end.
///
/// Seen to fail: with a fixed number of pieces an mremap answered ENOMEM.
#[test]
fn d7_large_ranges_move_while_they_are_merged() {
    let stand = Stand::on_request();
    let output = stand.run("remaps_densely");
    println!("{}", output.lines().rfind(|line| line.ends_with("times")).unwrap_or_default());
    stand.assert_merged(1000);
}
