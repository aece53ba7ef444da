//! D1, D9, D-4, D6, V3: mappings that other threads change while pages of them are merged.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::stand::Stand;
use crate::victim::{Random, Region, Victim, merge_densely, merge_now, merge_pair, page, pid, tell};

pub(crate) const VICTIMS: &[Victim] = &[
    ("churn", churn),
    ("one_page_goes", one_page_goes),
    ("heap", heap),
    ("at_once", at_once),
    ("grows", grows),
    ("split_without_end", split_without_end),
];

const PAGES: usize = 48;
const FIRST: u64 = 1000;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Threads hand memory over, wait for a random moment and change its mapping, while everything is merged that can be.
fn churn() {
    let twins = Region::map(PAGES);
    twins.fill_from(FIRST);
    twins.mergeable();
    merge_densely();
    let cycles = AtomicU64::new(0);
    let until = Instant::now() + Duration::from_secs(6);
    std::thread::scope(|scope| {
        for thread in 1..=2 {
            let cycles = &cycles;
            scope.spawn(move || {
                let mut random = Random(thread * 0x1234_5677);
                while Instant::now() < until {
                    change(&mut random, thread);
                    cycles.fetch_add(1, SeqCst);
                }
            });
        }
    });
    twins.check_from(FIRST);
    tell(&format!("{} cycles", cycles.load(SeqCst)));
}

fn anonymous_at(region: Region) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: replaces the victim's own memory.
    let at = unsafe { libc::mmap(region.pointer(0), region.len(), RW, flags, -1, 0) };
    assert_eq!(at as usize, region.start);
}

/// One piece of memory is handed over, changed at a random moment, and every byte checked.
fn change(random: &mut Random, thread: u64) {
    let region = Region::map(PAGES);
    region.fill_from(FIRST);
    region.mergeable();
    let mut pause = |most: u64| std::thread::sleep(Duration::from_micros(random.below(most)));
    pause(12_000);
    let own = 100_000 * thread;
    let kind = random.below(8);
    match kind {
        0 => {
            region.unmap();
            let fresh = Region::map(PAGES);
            fresh.check_zero();
            fresh.fill_from(own);
            std::thread::sleep(Duration::from_millis(1));
            fresh.check_from(own);
            fresh.unmap();
            return;
        }
        1 => {
            assert_eq!(region.protect(libc::PROT_NONE), 0);
            std::thread::sleep(Duration::from_millis(1));
            assert!(!readable(region.address(7)), "PROT_NONE was undone");
            assert_eq!(region.protect(RW), 0);
            region.check_from(FIRST);
        }
        2 => {
            assert_eq!(region.advise(libc::MADV_DONTNEED), 0);
            region.check_zero();
        }
        3 => {
            anonymous_at(region.part(5, 20));
            region.part(5, 20).fill_from(own);
            std::thread::sleep(Duration::from_millis(1));
            region.part(5, 20).check_from(own);
            region.part(20, PAGES).check_from(FIRST + 20);
        }
        4 => {
            let target = Region::map(PAGES);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: the victim's own memory moves over a mapping made for it.
            let at = unsafe { libc::mremap(region.pointer(0), region.len(), region.len(), flags, target.pointer(0)) };
            assert_eq!(at, target.pointer(0), "mremap: {}", std::io::Error::last_os_error());
            target.check_from(FIRST);
            target.unmap();
            return;
        }
        5 => {
            region.part(10, 11).unmap();
            region.part(0, 10).check_from(FIRST);
            region.part(11, PAGES).check_from(FIRST + 11);
            region.part(0, 10).unmap();
            region.part(11, PAGES).unmap();
            return;
        }
        6 => {
            assert_eq!(region.protect(libc::PROT_READ), 0);
            std::thread::sleep(Duration::from_millis(1));
            region.check_from(FIRST);
            assert_eq!(region.protect(RW), 0);
            region.fill_from(own);
            region.check_from(own);
        }
        _ => {
            region.fill_from(own);
            std::thread::sleep(Duration::from_millis(1));
            region.check_from(own);
        }
    }
    region.unmap();
}

/// True if the kernel can read a byte for this process.
pub(crate) fn readable(address: usize) -> bool {
    let mut byte = [0_u8];
    let to = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let from = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 1 };
    // SAFETY: the kernel writes into `byte`.
    unsafe { libc::process_vm_readv(pid(), &raw const to, 1, &raw const from, 1, 0) == 1 }
}

/// D1, D9, D-4: two threads change mappings (munmap, mmap fixed, mprotect, mremap, DONTNEED) while pages of them are
/// merged, and every byte is as on plain memory.
///
/// Seen to fail: with the gate taken out of the agent (readers never wait, the helper never looks whether anybody is
/// inside or whether the layout has changed) two of two runs on 6.18 ended within two seconds with "PROT_NONE was
/// undone", one of them also with an mremap that failed.
#[test]
fn d1_mappings_change_while_pages_are_merged() {
    let stand = Stand::watching();
    let output = stand.run("churn");
    println!("{}", output.lines().rfind(|line| line.ends_with("cycles")).unwrap_or_default());
    stand.assert_merged(500);
}

/// Pages of a merged run go one by one, are replaced, and come again.
fn one_page_goes() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    merge_pair(one, two);
    merge_densely();
    for index in (1..PAGES - 2).step_by(3) {
        let gap = one.part(index, index + 1);
        gap.unmap();
        assert!(!readable(gap.start), "a page came back");
        anonymous_at(gap);
        gap.check_zero();
        gap.fill(0, FIRST + index as u64);
        gap.mergeable();
        let file = std::fs::File::open("/proc/self/exe").expect("it can be read");
        let next = one.part(index + 1, index + 2);
        // SAFETY: replaces one page of the victim's by one of a file.
        let at = unsafe {
            use std::os::fd::AsRawFd as _;
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
            libc::mmap(next.pointer(0), page(), libc::PROT_READ, flags, file.as_raw_fd(), 0)
        };
        assert_eq!(at as usize, next.start);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(next.read(0)[0].to_le_bytes()[..4], *b"\x7fELF");
        one.part(0, 1).check_from(FIRST);
        one.part(index + 2, PAGES).check_from(FIRST + index as u64 + 2);
    }
    two.check_from(FIRST);
}

/// D1, D9: single pages of a merged run are unmapped, replaced by other memory and by a file.
#[test]
fn d1_single_pages_of_a_run_are_replaced() {
    let stand = Stand::on_request();
    stand.run("one_page_goes");
    stand.assert_merged(PAGES as u64);
}

/// The heap shrinks into merged pages and grows over them.
fn heap() {
    // SAFETY: moves the end of the heap; std's allocator in this victim uses what lies below.
    let start = unsafe { libc::sbrk(0) } as usize;
    let start = start.next_multiple_of(page());
    let heap = Region { start, pages: PAGES };
    let twins = Region::map(PAGES);
    twins.fill_from(FIRST);
    for round in 0..8 {
        // SAFETY: as above.
        assert_eq!(unsafe { libc::brk(heap.pointer(PAGES)) }, 0);
        heap.check_zero_if(round > 0);
        heap.fill_from(FIRST);
        if round == 0 {
            merge_pair(heap, twins);
        } else {
            heap.mergeable();
            merge_now();
        }
        heap.check_from(FIRST);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::brk(heap.pointer(PAGES / 2)) }, 0);
        heap.part(0, PAGES / 2).check_from(FIRST);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::brk(heap.pointer(PAGES)) }, 0);
        heap.part(0, PAGES / 2).check_from(FIRST);
        heap.part(PAGES / 2, PAGES).check_zero();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::brk(heap.pointer(0)) }, 0);
    }
    twins.check_from(FIRST);
}

impl Region {
    fn check_zero_if(&self, condition: bool) {
        if condition {
            self.check_zero();
        }
    }
}

/// D1, D6, f12: brk into and over merged pages.
#[test]
fn d1_the_heap_shrinks_and_grows() {
    let stand = Stand::on_request();
    stand.run("heap");
    stand.assert_merged(PAGES as u64);
}

/// Few pages, written this moment: most of them wait in a CPU's batch, which holds a reference to each.
fn at_once() {
    for round in 0..20 {
        let region = Region::map(9);
        // Four pairs, and a last page that stays.
        (0..9).for_each(|index| region.fill(index, FIRST + round * 8 + index as u64 % 4));
        region.mergeable();
        merge_now();
        assert_eq!(region.merged(), 8, "round {round}");
        (0..9).for_each(|index| assert!(region.holds(index, FIRST + round * 8 + index as u64 % 4)));
        region.unmap();
    }
}

/// The kernel's own references to pages on their way to the LRU lists keep nothing from being merged.
#[test]
fn pages_written_a_moment_ago_are_merged_at_the_first_request() {
    let stand = Stand::on_request();
    stand.run("at_once");
    stand.assert_merged(160);
}

/// A mapping of which only the middle is handed over is moved and grown as a whole, again and again.
fn grows() {
    let twins = Region::map(PAGES);
    twins.fill_from(FIRST);
    twins.mergeable();
    merge_densely();
    let mut whole = Region::map(2 * PAGES);
    whole.fill_from(FIRST - PAGES as u64 / 2);
    let until = Instant::now() + Duration::from_secs(4);
    let mut times = 0;
    let mut random = Random(0x6_0bad);
    while Instant::now() < until {
        whole.part(PAGES / 2, PAGES / 2 + PAGES).mergeable();
        std::thread::sleep(Duration::from_micros(random.below(6000)));
        let grown = Region { start: whole.start, pages: if times % 2 == 0 { 3 * PAGES } else { 2 * PAGES } };
        // SAFETY: moves the victim's own memory.
        let at = unsafe { libc::mremap(whole.pointer(0), whole.len(), grown.len(), libc::MREMAP_MAYMOVE) };
        assert_ne!(at, libc::MAP_FAILED, "mremap: {}", std::io::Error::last_os_error());
        whole = Region { start: at as usize, pages: grown.pages };
        whole.part(0, 2 * PAGES).check_from(FIRST - PAGES as u64 / 2);
        if whole.pages > 2 * PAGES {
            whole.part(2 * PAGES, 3 * PAGES).check_zero();
        }
        times += 1;
    }
    twins.check_from(FIRST);
    tell(&format!("{times} times"));
}

/// V3: registration cuts mappings in two for a moment; mremap of the whole never meets that.
#[test]
fn v3_a_mapping_grows_while_its_middle_is_merged() {
    let stand = Stand::on_request();
    let output = stand.run("grows");
    println!("{}", output.lines().rfind(|line| line.ends_with("times")).unwrap_or_default());
    stand.assert_merged(PAGES as u64);
}

/// Ranges are handed over, cut in two and unmapped, more often than the table has rows or the agent's list has room.
fn split_without_end() {
    for _ in 0..1500 {
        let region = Region::map(9);
        region.mergeable();
        region.part(3, 5).unmap();
        region.part(0, 3).unmap();
        region.part(5, 9).unmap();
    }
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    merge_pair(one, two);
    one.check_from(FIRST);
}

/// What is cut and given back leaves nothing behind: memory can be handed over for ever.
///
/// Seen to fail: halves that shared their marks could not be used again, and after 500 of them nothing was managed.
#[test]
fn ranges_are_split_without_end() {
    let stand = Stand::on_request();
    stand.run("split_without_end");
    stand.assert_merged(PAGES as u64);
}
