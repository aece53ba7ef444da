//! V6, V7, V12, D-14: locked memory, memory that must not be replaced, and properties that mappings keep.

use crate::stand::Stand;
use crate::victim::{
    Region, Victim, errno, field_at, flags_at, merge_now, merge_pair, merged_pair, page, tell, wait_until,
};

pub(crate) const VICTIMS: &[Victim] = &[
    ("properties", properties),
    ("half_way", half_way),
    ("no_reserve", no_reserve),
    ("locked", locked),
    ("all_locked", all_locked),
    ("read_only", read_only),
    ("keys", keys),
];

const PAGES: usize = 24;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// DONTFORK and DONTDUMP stay, set before the merge or after it, through un-merging and discarding.
fn properties() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    assert_eq!(one.advise(libc::MADV_DONTFORK) | one.advise(libc::MADV_DONTDUMP), 0);
    one.fill_from(50);
    two.fill_from(50);
    merge_pair(one, two);
    let has = |address: usize, flag: &str| flags_at(address).split(' ').any(|word| word == flag);
    for index in [0, 7, PAGES - 1] {
        assert!(has(one.address(index), "dc") && has(one.address(index), "dd"), "{}", flags_at(one.address(index)));
        assert!(!has(two.address(index), "dc"));
    }
    let later = two.part(4, 10);
    assert_eq!(later.advise(libc::MADV_DONTFORK), 0);
    assert!(has(later.start, "dc"));
    assert_eq!(one.part(3, 6).advise(libc::MADV_DONTNEED), 0);
    one.part(3, 6).check_zero();
    assert!(has(one.address(4), "dc") && has(one.address(4), "dd"), "{}", flags_at(one.address(4)));
    assert_eq!(one.advise(libc::MADV_UNMERGEABLE), 0);
    assert!(has(one.address(10), "dc") && has(one.address(10), "dd"));
    assert_eq!(later.advise(libc::MADV_UNMERGEABLE), 0);
    assert!(has(later.start, "dc"));
    assert_eq!(later.advise(libc::MADV_DOFORK), 0);
    assert!(!has(later.start, "dc"));
    two.check_from(50);
}

/// V9, D-14: properties of mappings are kept.
#[test]
fn properties_are_kept() {
    let stand = Stand::on_request();
    stand.run("properties");
    stand.assert_merged(PAGES as u64);
}

/// The protection of the mapping at an address, as maps shows it.
fn protection_at(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let (from, to) = line.split(' ').next().and_then(|range| range.split_once('-')).expect("a line of maps");
        let number = |text| usize::from_str_radix(text, 16).expect("an address");
        (number(from)..number(to)).contains(&address)
    };
    maps.lines().find(inside).and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned()
}

/// Calls that fail at a hole have changed what lies before it, and some of them what lies behind it too.
fn half_way() {
    let (one, two) = merged_pair(PAGES, 50);
    let has = |index: usize, flag: &str| flags_at(one.address(index)).split(' ').any(|word| word == flag);
    one.part(12, 13).unmap();
    assert_eq!(one.advise(libc::MADV_DONTFORK), libc::ENOMEM);
    assert_eq!(one.advise(libc::MADV_DONTDUMP), libc::ENOMEM);
    for (from, to) in [(2, 4), (14, 16)] {
        assert_eq!(one.part(from, to).advise(libc::MADV_DONTNEED), 0);
        assert_eq!(one.part(from + 3, to + 3).advise(libc::MADV_UNMERGEABLE), 0);
    }
    for index in [3, 6, 9, 15, 18, 21] {
        assert!(has(index, "dc") && has(index, "dd"), "page {index}: {}", flags_at(one.address(index)));
    }
    assert_eq!(one.advise(libc::MADV_DOFORK), libc::ENOMEM);
    assert_eq!(one.advise(libc::MADV_DODUMP), libc::ENOMEM);
    for (from, to) in [(7, 9), (19, 21)] {
        assert_eq!(one.part(from, to).advise(libc::MADV_DONTNEED), 0);
        assert!(!has(from, "dc") && !has(from, "dd"), "page {from}: {}", flags_at(one.address(from)));
    }
    two.part(12, 13).unmap();
    assert_eq!(two.protect(libc::PROT_READ), libc::ENOMEM);
    assert_eq!(two.part(2, 4).advise(libc::MADV_DONTNEED), 0);
    assert_eq!(two.part(14, 16).advise(libc::MADV_DONTNEED), 0);
    assert_eq!(two.part(5, 7).advise(libc::MADV_UNMERGEABLE), 0);
    for index in [3, 6, 9] {
        assert_eq!(protection_at(two.address(index)), "r--p", "page {index}");
    }
    for index in [15, 20] {
        assert_eq!(protection_at(two.address(index)), "rw-p", "page {index}");
    }
    two.part(2, 4).check_zero();
    two.part(4, 12).check_from(54);
    two.part(16, PAGES).check_from(66);
}

/// V7: what calls have changed that fail half-way is kept like what others have.
#[test]
fn v7_calls_that_fail_half_way() {
    let stand = Stand::on_request();
    stand.run("half_way");
    stand.assert_merged(PAGES as u64);
}

fn committed_kib() -> i64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Committed_AS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// MAP_NORESERVE memory stays outside of the accounting.
fn no_reserve() {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let (one, two) = (Region::map_with(PAGES, flags), Region::map_with(PAGES, flags));
    one.fill_from(50);
    two.fill_from(50);
    merge_pair(one, two);
    let has = |index: usize| flags_at(one.address(index)).split(' ').any(|word| word == "nr");
    assert!(has(3), "{}", flags_at(one.address(3)));
    assert_eq!(one.part(3, 6).advise(libc::MADV_DONTNEED), 0);
    assert!(has(4), "{}", flags_at(one.address(4)));
    assert!(committed_kib() > 0);
    one.part(6, PAGES).check_from(56);
}

/// V7: MAP_NORESERVE is passed on.
#[test]
fn v7_no_reserve() {
    let stand = Stand::on_request();
    stand.run("no_reserve");
    stand.assert_merged(PAGES as u64);
}

/// Locked memory is not merged, and merged memory that is locked becomes plain.
fn locked() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    // SAFETY: locks the victim's own memory.
    assert_eq!(unsafe { libc::mlock(one.pointer(4), 4 * page()) }, 0);
    one.mergeable();
    two.mergeable();
    for _ in 0..10 {
        merge_now();
    }
    assert_eq!(one.part(4, 8).merged(), 0, "locked pages were merged");
    assert!(one.merged() > 0 && two.merged() > PAGES / 2);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::mlock(two.pointer(0), two.len()) }, 0, "{}", std::io::Error::last_os_error());
    assert_eq!(two.merged(), 0);
    for _ in 0..5 {
        merge_now();
    }
    assert_eq!(two.merged(), 0, "locked pages were merged");
    one.check_from(50);
    two.check_from(50);
}

/// V6: mlock before and after merging.
#[test]
fn v6_locked_memory() {
    let stand = Stand::on_request();
    stand.run("locked");
    stand.assert_merged(PAGES as u64);
}

/// mlockall after merging, with more memory to come.
fn all_locked() {
    let (one, two) = merged_pair(PAGES, 50);
    // SAFETY: locks this victim.
    assert_eq!(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) }, 0);
    assert_eq!(one.merged() + two.merged(), 0);
    let fresh = Region::map(PAGES);
    fresh.fill_from(50);
    fresh.mergeable();
    for _ in 0..5 {
        merge_now();
    }
    assert_eq!(fresh.merged(), 0);
    assert_eq!(fresh.advise(libc::MADV_DONTNEED), libc::EINVAL);
    fresh.check_from(50);
    one.check_from(50);
    two.check_from(50);
    // SAFETY: unlocks this victim.
    assert_eq!(unsafe { libc::munlockall() }, 0);
    one.fill_from(60);
    one.check_from(60);
}

/// V6: mlockall un-merges, and nothing is merged afterwards.
#[test]
fn v6_all_memory_is_locked() {
    let stand = Stand::on_request();
    stand.run("all_locked");
    stand.assert_merged(PAGES as u64);
}

/// Memory that is not writable is left alone and stays as it is.
fn read_only() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    assert_eq!(one.part(0, 8).protect(libc::PROT_READ), 0);
    one.mergeable();
    two.mergeable();
    for _ in 0..10 {
        merge_now();
    }
    assert_eq!(one.part(0, 8).merged(), 0);
    assert!(one.merged() > 0);
    // Protection of what is merged changes with it.
    let part = one.part(10, 16);
    assert_eq!(part.protect(libc::PROT_READ), 0);
    assert!(flags_at(part.start).contains(" rd mr"), "{}", flags_at(part.start));
    for _ in 0..5 {
        merge_now();
    }
    assert_eq!(part.protect(RW), 0);
    part.fill_from(90);
    part.check_from(90);
    one.part(0, 10).check_from(50);
    two.check_from(50);
}

/// V12: read-only memory.
#[test]
fn v12_read_only_memory() {
    let stand = Stand::on_request();
    stand.run("read_only");
    stand.assert_merged(PAGES as u64);
}

unsafe extern "C" {
    fn pkey_alloc(flags: u32, rights: u32) -> i32;
    fn pkey_set(key: i32, rights: u32) -> i32;
    fn pkey_mprotect(start: *mut libc::c_void, len: usize, prot: i32, key: i32) -> i32;
}

/// The protection key of the mapping at an address, as smaps says.
fn key_at(address: usize) -> i32 {
    field_at(address, "ProtectionKey:").trim_start_matches("ProtectionKey:").trim().parse().unwrap()
}

/// True if the kernel writes a byte there for this process, as far as this thread may.
fn writable(address: usize) -> bool {
    let mut pipe = [0; 2];
    // SAFETY: a pipe of the victim's own; the byte that is read into its memory is the one that is there.
    unsafe {
        let byte = *(address as *const u8);
        assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
        assert_eq!(libc::write(pipe[1], (&raw const byte).cast(), 1), 1);
        let read = libc::read(pipe[0], address as *mut libc::c_void, 1);
        let error = errno();
        libc::close(pipe[0]);
        libc::close(pipe[1]);
        assert!(read == 1 || error == libc::EFAULT, "error {error}");
        read == 1
    }
}

/// Memory under a protection key is left alone, and keeps its key whatever was merged before.
fn keys() {
    const NO_WRITING: u32 = 2;
    // SAFETY: makes a key.
    let key = unsafe { pkey_alloc(0, 0) };
    if key < 0 {
        tell("skipped: protection keys");
        return;
    }
    let give = |part: Region, key: i32| {
        // SAFETY: the victim's own memory.
        assert_eq!(unsafe { pkey_mprotect(part.pointer(0), part.len(), RW, key) }, 0, "error {}", errno());
    };
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    let before = one.part(4, 8);
    give(before, key);
    one.mergeable();
    two.mergeable();
    for _ in 0..10 {
        merge_now();
    }
    assert_eq!(before.stored().len(), 0, "memory under a key was merged");
    let after = two.part(3, 12);
    assert!(one.merged() > 0 && after.merged() > 0);
    give(after, key);
    // From here on this thread writes nothing there, and whoever serves it meanwhile may have its rights.
    // SAFETY: the rights of this thread to memory of its own.
    assert_eq!(unsafe { pkey_set(key, NO_WRITING) }, 0);
    let check = || {
        for part in [before, after] {
            for index in 0..part.pages {
                assert_eq!(key_at(part.address(index)), key, "page {index}");
                assert!(!writable(part.address(index)), "page {index} can be written");
            }
            assert_eq!(part.stored().len(), 0, "memory under a key was merged");
        }
    };
    check();
    for _ in 0..5 {
        merge_now();
        check();
    }
    one.check_from(50);
    two.check_from(50);
    assert_eq!(after.part(0, 2).advise(libc::MADV_DONTNEED), 0);
    assert_eq!(two.part(5, 7).advise(libc::MADV_UNMERGEABLE), 0);
    check();
    two.part(3, 5).check_zero();
    two.part(5, PAGES).check_from(55);
    // Without a key it is memory like any other: its pages are merged again, those that still have twins.
    // SAFETY: as above.
    assert_eq!(unsafe { pkey_set(key, 0) }, 0);
    let free = two.part(8, 12);
    give(free, 0);
    wait_until("they are merged again", || {
        merge_now();
        free.merged() == free.pages
    });
    // What leaves the key as it is changes nothing.
    give(free, -1);
    assert_eq!(free.merged(), free.pages);
    two.part(5, PAGES).check_from(55);
}

/// V12: protection keys.
#[test]
fn v12_protection_keys() {
    let stand = Stand::on_request();
    if !stand.run("keys").contains("skipped:") {
        stand.assert_merged(PAGES as u64);
    }
}
