//! Turning system-call sites into jumps to the gate.
//!
//! A site is `mov eax, NUMBER; syscall` (5 + 2 bytes) or, in `syscall()`, `mov r9, [rsp+8]; syscall`. Only its first
//! five bytes become a jump; the `syscall` behind them stays, so that a thread that stands between the two instructions
//! at this moment makes its call and goes on. Control comes back behind the site.
//!
//! Changed pages are put in place whole by mremap, so that no thread ever sees half an instruction or a page that is not
//! there. Where the trampolines lie at the distance that all programs have them at, these pages are those of the launcher's
//! file (see [`abi::jump`]), which cost no process any memory; they are compared with what is there, byte by byte. Else they
//! are copies.
//!
//! From then on they are no part of libc's file to the kernel, and that is meant: a uprobe on a site, such as tracers put on
//! munmap, would replace the jump by a trap and execute what *libc's file* has there. The thread would go on at the
//! `syscall` behind it, past the gate. So uprobes do not reach these pages. One that is there before would stay in a copy as
//! a trap that nobody handles: a page that is not the file's any more is left alone, and the program with it.

use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use abi::jump::{ANY, DISTANCE, JUMP, jump, room};

use crate::elf::{Object, Site, for_each_mapping, known};
use crate::link;
use crate::state::Start;
use crate::stubs;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_PRIVATE, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE};
use crate::sys::{PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE, failed, nr, sys};

/// Room for the trampolines of one object.
const TRAMPOLINES: u64 = 2 * PAGE;
/// What is free above trampolines at their distance: else a program has mapped most of what is between them and libc, and
/// they would be in its way.
const SPARE: u64 = 256 << 20;
/// What is free below them where the heap is, which grows: of thousands of GiB, in the kernel's layouts.
const HEAP: u64 = 64 << 30;
/// How far from an object's beginning they may lie: a jump reaches 2 GiB, and no libc is as long as the rest.
const REACH: u64 = (2 << 30) - (64 << 20);
const OBJECTS_MAX: usize = 4;
const SITES_MAX: usize = 96;
/// Pieces of changed code. Each is told to whoever judges the program, beside the trampolines and the agent's image.
const PIECES_MAX: usize = abi::control::OWN_CODE_MAX - OBJECTS_MAX - 1;
const UFFDIO_REGISTER: u32 = abi::uapi::UFFDIO_REGISTER;

/// Inode numbers of the files whose code was patched.
static INODES: [AtomicU64; OBJECTS_MAX] = [const { AtomicU64::new(0) }; OBJECTS_MAX];

/// Where the trampolines of each object begin.
static ROOMS: [AtomicU64; OBJECTS_MAX] = [const { AtomicU64::new(0) }; OBJECTS_MAX];

/// Changed pages of libc and the loader, in pieces: where each begins and ends.
static PIECES: [[AtomicU64; 2]; PIECES_MAX] = [const { [const { AtomicU64::new(0) }; 2] }; PIECES_MAX];

/// The trampolines, and the pages that lead to them.
pub(crate) fn own_code() -> impl Iterator<Item = (u64, u64)> {
    let rooms = ROOMS.iter().map(|room| room.load(SeqCst)).filter(|room| *room != 0);
    let pieces = PIECES.iter().map(|[start, end]| (start.load(SeqCst), end.load(SeqCst)));
    rooms.map(|room| (room, room + TRAMPOLINES)).chain(pieces.filter(|(start, _)| *start != 0))
}

/// True for the inode number of libc or the loader.
pub(crate) fn is_patched(inode: u64) -> bool {
    INODES.iter().any(|known| inode != 0 && known.load(SeqCst) == inode)
}

/// Patches libc and the loader. Nothing is changed unless both are found and every byte is as the table says.
/// `file`: where the table stands, with the changed pages behind it.
pub(crate) fn patch_all(table: &[u8], file: Option<i32>) -> Start {
    let mut found = [None; OBJECTS_MAX];
    let mut count = 0;
    let read = for_each_mapping(|line| {
        if let Some((object, bias)) = known(&line, table)
            && count < OBJECTS_MAX
        {
            found[count] = Some((object, bias, line.start));
            INODES[count].store(line.inode, SeqCst);
            count += 1;
        }
    });
    // Exactly two: one libc and one loader. A second libc (dlmopen) would go unpatched.
    if !read || count != 2 {
        return Start::UnknownLibc;
    }
    let all_there = found.iter().flatten().all(|(object, bias, _)| object.sites(*bias).all(|site| is_there(&site)));
    if !all_there {
        return Start::UnknownLibc;
    }
    let Some(pagemap) = link::open(c"/proc/self/pagemap") else { return Start::PatchFailed };
    let patched = found.iter().flatten().all(|(object, bias, near)| {
        let prepared = file.and_then(|file| Prepared::map(file, table.len() as u64, object));
        patch_object(object.sites(*bias), (*near, *bias), pagemap, prepared)
    });
    link::close(pagemap);
    if patched { Start::Ready } else { Start::PatchFailed }
}

fn is_there(site: &Site) -> bool {
    // SAFETY: the site lies in the code of an object that is mapped here, as its build-id says.
    let bytes = unsafe { core::slice::from_raw_parts(site.address as *const u8, site.bytes.len()) };
    bytes == site.bytes
}

/// Pages of an object as they are when they are changed, mapped from the launcher's file: what is left of them.
struct Prepared {
    start: u64,
    end: u64,
}

impl Prepared {
    /// `None` if the file, which is so long, does not have them, or may not be executed.
    fn map(file: i32, len: u64, object: &Object<'_>) -> Option<Self> {
        let (offset, bytes) = (object.changed?.checked_mul(PAGE)?, object.pages() * PAGE);
        if offset.checked_add(bytes)? > len {
            return None;
        }
        // SAFETY: a free place of the kernel's choice.
        let start = unsafe { sys::mmap(0, bytes, PROT_READ | PROT_EXEC, MAP_PRIVATE, file, offset) }.ok()?;
        Some(Self { start, end: start + bytes })
    }

    /// The next pages, so many bytes: of another piece from now on.
    fn next(&mut self, len: u64) -> Option<u64> {
        let pages = self.start;
        self.start = pages.checked_add(len).filter(|next| *next <= self.end)?;
        Some(pages)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if self.start < self.end {
            unmap(self.start, self.end - self.start);
        }
    }
}

/// A jump, and the address where it goes.
type Jump = (u64, [u8; JUMP]);

/// `near`: where the object begins, and what its link-time zero is here.
fn patch_object(
    sites: impl Iterator<Item = Site>,
    (near, bias): (u64, u64),
    pagemap: i32,
    prepared: Option<Prepared>,
) -> bool {
    let Some(start) = room_near(near, bias.wrapping_sub(DISTANCE)) else { return false };
    if let Some(slot) = ROOMS.iter().find(|slot| slot.load(SeqCst) == 0) {
        slot.store(start, SeqCst);
    }
    let mut jumps = [(0_u64, [0_u8; JUMP]); SITES_MAX];
    let mut count = 0;
    let mut at = start;
    for site in sites {
        let end = at + room(site.number);
        let mut code = Code { start: at, at, end };
        let Some(slot) = jumps.get_mut(count).filter(|_| end <= start + TRAMPOLINES) else { return false };
        let Some(jump) = jump(site.address, at).filter(|_| trampoline(&mut code, &site)) else { return false };
        *slot = (site.address, jump);
        count += 1;
        at = end;
    }
    // SAFETY: the trampolines' own pages; from here on they are code.
    if unsafe { sys!(nr::MPROTECT, start, TRAMPOLINES, PROT_READ | PROT_EXEC) } != 0 {
        return false;
    }
    replace_pages(&jumps[..count], pagemap, prepared)
}

/// Room for trampolines within reach of a 32-bit jump of an object: at `wanted` if that is in nobody's way, see
/// [`abi::jump`]; else above a mapping, in the gap that brings it nearest. There is one wherever a program has not filled
/// 4 GiB around its libc; an allocator's arenas alone can take half a GiB. Never right below a mapping, since that could be
/// a stack, and not right above the heap, which grows too.
fn room_near(near: u64, wanted: u64) -> Option<u64> {
    /// Another thread may take the gap first.
    const TRIES: usize = 16;
    for attempt in 0..TRIES {
        let mut best = None;
        let mut behind = None;
        let mut at_distance = false;
        // SAFETY: asks for the end of the heap.
        let heap = sys::page_up(unsafe { sys!(nr::BRK, 0) } as u64);
        for_each_mapping(|line| {
            let gap = behind.replace(line.end);
            let above_heap = gap == Some(heap);
            let near_by = gap.filter(|_| !above_heap).and_then(|start| room_above(near, start, line.start));
            best = nearer(near, best, near_by);
            let below = if above_heap { HEAP } else { PAGE };
            at_distance |= gap.is_some_and(|start| has_room(wanted, start.saturating_add(below), line.start));
        })
        .then_some(())?;
        // Once: the kernel has its reasons to refuse a place.
        let place = if at_distance && attempt == 0 {
            fenced(wanted)
        } else {
            map_at(best?, TRAMPOLINES, PROT_READ | PROT_WRITE)
        };
        if place.is_some() {
            return place;
        }
    }
    None
}

/// Maps trampolines between two pages that nobody can use: what the program maps beside them later, and may execute, would
/// else become one mapping with them.
fn fenced(place: u64) -> Option<u64> {
    let fence = map_at(place - PAGE, TRAMPOLINES + 2 * PAGE, PROT_NONE)?;
    // SAFETY: mapped just now.
    if unsafe { sys!(nr::MPROTECT, place, TRAMPOLINES, PROT_READ | PROT_WRITE) } == 0 {
        return Some(place);
    }
    unmap(fence, TRAMPOLINES + 2 * PAGE);
    None
}

/// Maps anonymous memory at a place, if it is free.
fn map_at(place: u64, len: u64, protection: u64) -> Option<u64> {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    // SAFETY: MAP_FIXED_NOREPLACE takes only what is free.
    let got = unsafe { sys::mmap(place, len, protection, flags, -1, 0) }.ok()?;
    if got == place {
        return Some(got);
    }
    // A kernel that does not know the flag took it for a hint.
    unmap(got, len);
    None
}

/// Gives back what this file has mapped and nobody uses yet.
fn unmap(start: u64, len: u64) {
    // SAFETY: the caller's own mapping, whose address nobody else has.
    unsafe { sys!(nr::MUNMAP, start, len) };
}

/// Whether there is room at this place, in the gap from `start` to `end`.
fn has_room(wanted: u64, start: u64, end: u64) -> bool {
    start.checked_add(PAGE).is_some_and(|start| start <= wanted)
        && wanted.checked_add(TRAMPOLINES + SPARE).is_some_and(|behind| behind <= end)
}

/// The lowest place for trampolines in the gap from `start` to `end`, if it is within reach of `near`. A page on either
/// side stays free, so that it does not look like a part of its neighbours.
fn room_above(near: u64, start: u64, end: u64) -> Option<u64> {
    let place = start.checked_add(PAGE)?;
    (place.checked_add(TRAMPOLINES + PAGE)? <= end && place.abs_diff(near) < REACH).then_some(place)
}

fn nearer(near: u64, one: Option<u64>, other: Option<u64>) -> Option<u64> {
    [one, other].into_iter().flatten().min_by_key(|place| place.abs_diff(near))
}

/// Puts changed pages in place. Neighbouring pages are one piece, as are those that a site crosses.
fn replace_pages(jumps: &[Jump], pagemap: i32, mut prepared: Option<Prepared>) -> bool {
    let mut done = 0;
    while done < jumps.len() {
        let first = sys::page_down(jumps[done].0);
        let mut end = sys::page_up(jumps[done].0 + JUMP as u64);
        let mut next = done + 1;
        while next < jumps.len() && jumps[next].0 >= first && sys::page_down(jumps[next].0) <= end {
            end = end.max(sys::page_up(jumps[next].0 + JUMP as u64));
            next += 1;
        }
        let (len, jumps) = (end - first, &jumps[done..next]);
        let pages = prepared.as_mut().and_then(|prepared| prepared.next(len));
        let shared = pages.filter(|pages| are_equal(first, *pages, len, jumps));
        if let (Some(pages), None) = (pages, shared) {
            unmap(pages, len);
        }
        let Some(changed) = shared.or_else(|| copy(first, len, jumps)) else { return false };
        let placed = place(changed, (first, end), pagemap);
        if shared.is_none() {
            crate::own::forget(changed);
        }
        if !placed {
            unmap(changed, len);
            return false;
        }
        done = next;
    }
    true
}

/// Moves changed pages to where they belong, from `first` to `end`, and writes that down.
fn place(changed: u64, (first, end): (u64, u64), pagemap: i32) -> bool {
    let len = end - first;
    // After they were read: a trap that comes only now is not in what takes their place.
    if !is_of_file(pagemap, first, len) {
        return false;
    }
    let Some([start_word, end_word]) = PIECES.iter().find(|[start, _]| start.load(SeqCst) == 0) else {
        return false;
    };
    // SAFETY: code with the same bytes but for the verified sites replaces the pages at once.
    if failed(unsafe { sys!(nr::MREMAP, changed, len, len, MREMAP_MAYMOVE | MREMAP_FIXED, first) }) {
        return false;
    }
    end_word.store(end, SeqCst);
    start_word.store(first, SeqCst);
    true
}

/// Whether changed pages are what a copy of those at `first` would be.
fn are_equal(first: u64, changed: u64, len: u64, jumps: &[Jump]) -> bool {
    // SAFETY: code pages of a mapped object, and pages that were mapped to be put in their place.
    let [before, after] =
        [first, changed].map(|at| unsafe { core::slice::from_raw_parts(at as *const u8, len as usize) });
    let mut from = 0;
    for (address, jump) in jumps {
        let at = (address - first) as usize;
        if before.get(from..at) != after.get(from..at) || after.get(at..at + JUMP) != Some(jump) {
            return false;
        }
        from = at + JUMP;
    }
    before.get(from..) == after.get(from..)
}

/// A changed copy of pages, as code.
fn copy(first: u64, len: u64, jumps: &[Jump]) -> Option<u64> {
    let copy = sys::allocate(len)?;
    // SAFETY: code pages of a mapped object are readable, and the copy is fresh memory of the same length.
    unsafe { core::ptr::copy_nonoverlapping(first as *const u8, copy as *mut u8, len as usize) };
    for (address, jump) in jumps {
        // SAFETY: inside the copy.
        unsafe { core::ptr::copy_nonoverlapping(jump.as_ptr(), (copy + (address - first)) as *mut u8, JUMP) };
    }
    // SAFETY: the copy's own pages; from here on they are code.
    if unsafe { sys!(nr::MPROTECT, copy, len, PROT_READ | PROT_EXEC) } != 0 {
        // SAFETY: nobody else has its address.
        unsafe { sys::free(copy, len) };
        return None;
    }
    Some(copy)
}

/// True if nobody has written to any of these pages, which were read just now: they are the file's.
fn is_of_file(pagemap: i32, start: u64, len: u64) -> bool {
    /// Bits of an entry: a page of a file, and present.
    const FILE: u64 = 1 << 61;
    const PRESENT: u64 = 1 << 63;
    (start / PAGE..(start + len) / PAGE).all(|page| {
        let mut entry = 0_u64;
        // SAFETY: the kernel writes one word.
        let read = unsafe { sys!(nr::PREAD64, pagemap as u64, (&raw mut entry) as u64, 8, page * 8) };
        read == 8 && entry & (FILE | PRESENT) == FILE | PRESENT
    })
}

/// A place where code is written.
struct Code {
    start: u64,
    at: u64,
    end: u64,
}

impl Code {
    fn put(&mut self, bytes: &[u8]) -> bool {
        if self.at + bytes.len() as u64 > self.end || self.at < self.start {
            return false;
        }
        // SAFETY: inside the trampolines' pages, which are writable until all are written.
        unsafe { core::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at as *mut u8, bytes.len()) };
        self.at += bytes.len() as u64;
        true
    }

    /// `movabs r11, value`
    fn r11(&mut self, value: u64) -> bool {
        self.put(&[0x49, 0xbb]) && self.put(&value.to_le_bytes())
    }

    /// `jmp [rip]` to an absolute address
    fn jump(&mut self, target: u64) -> bool {
        self.put(&[0xff, 0x25, 0, 0, 0, 0]) && self.put(&target.to_le_bytes())
    }

    /// The call itself between the stub before it and the stub behind it; the child goes straight back.
    fn around_clone(&mut self, back: u64) -> bool {
        let entries = stubs::entries();
        const R11: u64 = 10;
        const JUMP: u64 = 14;
        let call = self.at + R11 + JUMP;
        self.r11(call)
            && self.jump(entries.before_clone)
            && self.put(&[0x0f, 0x05]) // syscall
            && self.put(&[0x48, 0x85, 0xc0]) // test rax, rax
            && self.put(&[0x74, (R11 + JUMP) as u8]) // jz: the child runs no code of the agent
            && self.r11(back)
            && self.jump(entries.after_clone)
            // The stub before it comes here if it has made the call itself.
            && self.at == call + stubs::AROUND_CLONE
            && self.jump(back)
    }
}

/// Writes the trampoline for one site.
fn trampoline(code: &mut Code, site: &Site) -> bool {
    let entries = stubs::entries();
    let back = site.address + site.bytes.len() as u64;
    let number = site.number;
    let head = [site.bytes[0], site.bytes[1], site.bytes[2], site.bytes[3], site.bytes[4]];
    if !code.put(&head) {
        return false;
    }
    match u64::from(number) {
        nr::CLONE | nr::CLONE3 | 57 => code.around_clone(back),
        nr::IOCTL => {
            code.put(&[0x81, 0xfe]) // cmp esi, UFFDIO_REGISTER
                && code.put(&UFFDIO_REGISTER.to_le_bytes())
                && code.put(&[0x74, 16]) // je: only this one matters
                && code.put(&[0x0f, 0x05])
                && code.jump(back)
                && code.r11(back)
                && code.jump(entries.call)
        }
        _ if number == ANY => {
            // syscall(): the number is in eax, all of rax being the program's. Bytes from here to the two targets at the end:
            const COMPARES: u8 = 5 + 5 + 7 + 5 + 5;
            const CALL: u8 = 10 + 14;
            const DIRECT: u8 = 2 + 14;
            code.put(&[0x83, 0xf8, 56, 0x74, COMPARES - 5 + CALL + DIRECT]) // clone
                && code.put(&[0x83, 0xf8, 57, 0x74, COMPARES - 10 + CALL + DIRECT]) // fork
                && code.put(&[0x3d, 0xb3, 1, 0, 0, 0x74, COMPARES - 17 + CALL + DIRECT]) // clone3
                && code.put(&[0x83, 0xf8, 58, 0x74, COMPARES - 22 + CALL]) // vfork: returns twice
                && code.put(&[0x83, 0xf8, 15, 0x74, COMPARES - 27 + CALL]) // rt_sigreturn: never returns
                && code.r11(back)
                && code.jump(entries.call)
                && code.put(&[0x0f, 0x05])
                && code.jump(back)
                && code.around_clone(back)
        }
        _ => code.r11(back) && code.jump(entries.call),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_gap_is_taken_if_a_jump_reaches_it() {
        let near = 0x7f00_0000_0000;
        let (start, far) = (near - (1 << 30), near - (3 << 30));
        assert_eq!(room_above(near, start, near), Some(start + PAGE));
        assert_eq!(room_above(near, near, near + (1 << 30)), Some(near + PAGE), "also above");
        assert_eq!(room_above(near, start, start + TRAMPOLINES + PAGE), None, "a page must stay free on either side");
        assert_eq!(room_above(near, far, near), None, "out of reach");
        assert_eq!(room_above(near, u64::MAX, u64::MAX), None);
        assert_eq!(nearer(near, Some(near - 5), Some(near + 4)), Some(near + 4));
        assert_eq!(nearer(near, None, None), None);
    }

    #[test]
    fn at_their_distance_trampolines_are_in_nobodys_way() {
        let libc = 0x7fff_f672_d000;
        let wanted = libc - DISTANCE;
        assert!(has_room(wanted, 0x5555_5555_5000, libc - (8 << 20)));
        assert!(!has_room(wanted, 0x5555_5555_5000, wanted + SPARE), "a program that has mapped much");
        assert!(!has_room(wanted, wanted, libc), "a page must stay free");
        assert!(has_room(wanted, wanted - PAGE, libc));
        assert!(!has_room(u64::MAX, 0, u64::MAX));
    }
}
