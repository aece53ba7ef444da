//! D7, A2: places that a program has given up and takes again, while the helper maps what it needs for a moment.

use std::time::{Duration, Instant};

use crate::remaps::{FIRST, RW, remap};
use crate::stand::Stand;
use crate::victim::{Random, Region, Victim, merge_densely, page, pagemap, tell, wait_until};
use crate::whole::{LARGE, large_pair, wait_whole};

pub(crate) const VICTIMS: &[Victim] =
    &[("maps_again", maps_again), ("gets_back_again", gets_back_again), ("leaves_free", leaves_free)];

/// Of the range whose pages are merged and written over and over: several segments of the store.
const PAGES: usize = 1536;
const FOR: Duration = Duration::from_secs(6);

fn sleep(random: &mut Random, most: u64) {
    std::thread::sleep(Duration::from_micros(random.below(most)));
}

/// Takes a place that the program has given up before.
fn map_again(place: Region) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: this is the only thread, and it has mapped nothing since it has unmapped the place.
    let mapped = unsafe { libc::mmap(place.pointer(0), place.len(), RW, flags, -1, 0) };
    assert_eq!(mapped, place.pointer(0));
}

/// A page in sixteen says as much as all of them.
fn some(region: Region) -> impl Iterator<Item = usize> {
    (0..region.pages).step_by(16).chain([region.pages - 1])
}

/// Two regions that are merged all the time, since one of them is written all the time.
fn rewritten() -> (Region, Region) {
    let (region, twin) = (Region::map(PAGES), Region::map(PAGES + 1));
    region.fill_from(FIRST);
    twin.fill_from(FIRST);
    region.mergeable();
    twin.mergeable();
    (region, twin)
}

/// Writes a part of a region again, with the same bytes: the helper has something to compare.
fn rewrite(region: Region, random: &mut Random) {
    let from = random.below(region.pages as u64 - 64) as usize;
    region.part(from, from + 64).fill_from(FIRST + from as u64);
}

/// The highest place that is free is where the kernel puts what comes next. The program has given it up and makes no call
/// that maps anything while its helper takes more memory under management than ever before.
fn leaves_free() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    let place = Region::map(LARGE);
    // No higher gap has room for the marks of so many pages.
    let rest = Region::map(150 * LARGE);
    while Region::map_with(256, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).start > place.start {}
    let other = [rest.part(0, 2 * LARGE), rest.part(2 * LARGE, 4 * LARGE)];
    other.iter().for_each(|region| region.fill_from(FIRST));
    place.unmap();
    wait_until("it is managed and merged", || {
        let mut resident = [0_u8];
        // Gaps are filled from their end. SAFETY: only asks what is there.
        let there = unsafe { libc::mincore(place.pointer(LARGE - 1), page(), resident.as_mut_ptr()) };
        assert_eq!(
            (there, std::io::Error::last_os_error().raw_os_error()),
            (-1, Some(libc::ENOMEM)),
            "something is there"
        );
        // Without a list of mappings, which would need memory itself: no page of its own is there any more. The last page of a
        // mapping is never merged.
        let own = |region: Region, index: usize| pagemap(region.address(index)) >> 61 & 0b101 == 0b100;
        !other.iter().any(|region| (0..region.pages - 1).step_by(16).any(|index| own(*region, index)))
    });
    map_again(place);
    place.fill_from(FIRST);
    place.check_from(FIRST);
    other.iter().for_each(|region| region.check_from(FIRST));
}

/// A2. Seen to fail: the helper's marks lay there.
#[test]
fn a2_the_helper_maps_nothing_where_a_place_is_free() {
    let stand = Stand::of_all(|_| true);
    stand.run("leaves_free");
    stand.assert_merged(4 * LARGE as u64);
}

/// The program's only thread maps, unmaps, and maps again where it was; and moves a part of a merged range away and
/// back.
fn maps_again() {
    let (region, twin) = rewritten();
    merge_densely();
    let (mut random, until, mut times) = (Random(0x7e_0002), Instant::now() + FOR, 0);
    while Instant::now() < until {
        let place = if random.below(4) == 0 {
            // Out of the middle of what is managed.
            let from = random.below(256) as usize;
            let part = region.part(from, from + 1024);
            part.unmap();
            part
        } else {
            let place = Region::map([256, 320, 1024, 4096][random.below(4) as usize]);
            some(place).for_each(|index| place.fill(index, 1));
            place.unmap();
            place
        };
        sleep(&mut random, 300);
        map_again(place);
        let inside = region.start <= place.start && place.end() <= region.end();
        if inside {
            place.fill_from(FIRST + (place.start - region.start) as u64 / page() as u64);
            place.mergeable();
        } else {
            some(place).for_each(|index| place.fill(index, 2));
        }
        rewrite(twin, &mut random);
        sleep(&mut random, 1000);
        if inside {
            region.check_from(FIRST);
        } else {
            assert!(some(place).all(|index| place.holds(index, 2)), "at {:#x}", place.start);
            place.unmap();
        }
        rewrite(region, &mut random);
        times += 1;
    }
    region.check_from(FIRST);
    twin.check_from(FIRST);
    tell(&format!("{times} times"));
}

/// D7: nothing of the helper's lies where the program has given up a place, and may map again.
///
/// Seen to fail: segments of the store were mapped wherever the kernel liked to; the program mapped over one, and the
/// helper unmapped it.
#[test]
fn d7_places_given_up_are_mapped_again() {
    let stand = Stand::on_request();
    let output = stand.run("maps_again");
    println!("{}", output.lines().rfind(|line| line.ends_with("times")).unwrap_or_default());
    stand.assert_merged(1000);
}

/// As above: a part of a merged range goes away and comes back.
fn gets_back_again() {
    let (region, twin) = rewritten();
    merge_densely();
    // So that what leaves a hole leaves the first that the kernel finds.
    while Region::map(256).start > region.start {}
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (mut random, until, mut times) = (Random(0x7e_0003), Instant::now() + FOR, 0);
    while Instant::now() < until {
        let from = random.below(256) as usize;
        let part = region.part(from, from + 1024);
        let place = Region::map(part.pages);
        let away = remap(part, part.pages, fixed, place.start).expect("it goes away");
        rewrite(twin, &mut random);
        sleep(&mut random, 1000);
        away.check_from(FIRST + from as u64);
        let back = remap(away, part.pages, fixed, part.start).expect("it comes back");
        rewrite(twin, &mut random);
        sleep(&mut random, 1000);
        back.check_from(FIRST + from as u64);
        rewrite(region, &mut random);
        times += 1;
    }
    region.check_from(FIRST);
    twin.check_from(FIRST);
    tell(&format!("{times} times"));
}

/// D7: the same with mremap.
///
/// Seen to fail: as above.
#[test]
fn d7_places_given_up_are_moved_back_to() {
    let stand = Stand::on_request();
    let output = stand.run("gets_back_again");
    println!("{}", output.lines().rfind(|line| line.ends_with("times")).unwrap_or_default());
    stand.assert_merged(1000);
}
