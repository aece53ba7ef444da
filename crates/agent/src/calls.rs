//! What the gate does with each call.
//!
//! A call that touches no managed range goes to the kernel as it is, without lock and without side effect. One that
//! does goes in as a reader, signals blocked, under the table's lock, so that a fork in another thread never copies
//! the memory in one state and the marks in another.
//!
//! The merged pages of a range must behave as plain ones. So before a destructive advice fresh anonymous memory takes
//! their place (the advice would uncover the store's content), before WIPEONFORK and a protection key they get their own
//! copies back (`plain.rs`), and the properties that /proc does not show are written down as they change.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::stop;
use abi::mark::{Keep, Mark};
use abi::uapi::UffdioRegister;

use crate::ask::{is_served, unmerge};
use crate::elf::for_each_mapping;
use crate::handover::{self, unmergeable};
use crate::plain::{collapse, mbind, on_plain};
use crate::restrict::restrict;
use crate::stack::spare_frames;
use crate::state::STATE;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, PAGE, failed};
use crate::sys::{PROT_EXEC, PROT_READ, PROT_WRITE, advice, errno, nr, page_up, sys};
use crate::table::{Locked, Piece};
use crate::vectors::process_madvise;
use crate::{adoption, child, execute, mremap, scope};

/// The registers of a call, in the order in which the stub saves them.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Registers {
    /// Number of the call, then its result.
    pub rax: u64,
    /// First argument.
    pub rdi: u64,
    /// Second argument.
    pub rsi: u64,
    /// Third argument.
    pub rdx: u64,
    /// Fourth argument.
    pub r10: u64,
    /// Fifth argument.
    pub r8: u64,
    /// Sixth argument.
    pub r9: u64,
}

impl Registers {
    /// Makes the call as it was meant.
    pub(crate) fn raw(&self) -> i64 {
        // SAFETY: the program's own call with the program's own arguments.
        unsafe { sys::call6(self.rax, self.rdi, self.rsi, self.rdx, self.r10, self.r8, self.r9) }
    }
}

pub(crate) const USER_END: u64 = 1 << 47;
/// How often the mappings are read that must be known.
const LOOKS: u32 = 3;
const FUTEX: u64 = nr::FUTEX;
const SHM_REMAP: u64 = 0o40000;

/// Every gated call ends up here.
pub extern "C" fn dispatch(registers: &mut Registers) {
    if STATE.is_gone() {
        registers.rax = registers.raw() as u64;
        return;
    }
    // As the kernel takes it.
    registers.rax &= 0xffff_ffff;
    if matches!(registers.rax, nr::EXECVE | nr::EXECVEAT) {
        registers.rax = execute::execute(registers) as u64;
        return;
    }
    child::notice();
    let result = match registers.rax {
        nr::PROCESS_MADVISE => process_madvise(registers),
        nr::MADVISE => spare_frames(registers, handle),
        _ => handle(registers),
    };
    registers.rax = result as u64;
}

/// One call, in a program that is managed whole or not.
pub(crate) fn handle(call: &Registers) -> i64 {
    if STATE.all.load(SeqCst) == 0 { known(call) } else { scope::handle(call) }
}

/// A call, with what its range has of managed memory.
pub(crate) fn known(call: &Registers) -> i64 {
    let given = reach(call.rdi, call.rsi);
    match call.rax {
        nr::MADVISE => madvise(call, given),
        nr::MMAP => {
            if call.rdx & PROT_EXEC != 0 && call.r10 & MAP_ANONYMOUS == 0 && !let_code_in(call.r8) {
                return -errno::ENOMEM;
            }
            if call.r10 & MAP_FIXED == 0 || call.r10 & MAP_FIXED_NOREPLACE != 0 {
                return call.raw();
            }
            replaced(call, given)
        }
        nr::MUNMAP | nr::REMAP_FILE_PAGES => replaced(call, given),
        // A mapping that is made anew has no key, and a mark has no room for one.
        nr::PKEY_MPROTECT if !matches!(call.r10 as i32, -1 | 0) => on_plain(call, given, errno::ENOMEM),
        nr::MPROTECT | nr::PKEY_MPROTECT => protect(call, given),
        // What is locked or sealed can neither be replaced nor be discarded like plain memory any more.
        nr::MLOCK | nr::MLOCK2 => {
            let start = call.rdi & !(PAGE - 1);
            on_plain(call, reach(start, call.rdi.wrapping_sub(start).wrapping_add(call.rsi)), errno::EAGAIN)
        }
        nr::MSEAL => on_plain(call, given, errno::ENOMEM),
        nr::MBIND => mbind(call, given),
        nr::MREMAP => mremap::mremap(call),
        nr::BRK => brk(call),
        nr::SHMAT => shmat(call),
        nr::MLOCKALL => mlockall(call),
        nr::PRCTL => adoption::prctl(call),
        // Only strict mode and filters; the rest are questions.
        nr::SECCOMP if call.rdi & 0xffff_ffff <= 1 => restrict(call, call.rdi & 0xffff_ffff, call.rdx),
        nr::IOCTL => register(call),
        FUTEX => futex(call),
        _ => call.raw(),
    }
}

/// A page-aligned range from a start and a length, as mapping calls take them; `None` if the kernel will refuse it.
pub(crate) fn span(start: u64, len: u64) -> Option<(u64, u64)> {
    let end = start.checked_add(page_up(len))?;
    (start.is_multiple_of(PAGE) && len != 0 && len < USER_END && end <= USER_END).then_some((start, end))
}

/// As [`span`], where a length may go on behind the end of all addresses: most calls do what they can and then refuse.
pub(crate) fn reach(start: u64, len: u64) -> Option<(u64, u64)> {
    let end = start.checked_add(page_up(len))?;
    span(start, end.min(USER_END).checked_sub(start)?)
}

/// Runs `inside` as a reader of the gate, with the table locked and signals blocked. What it changes of the layout has
/// an epoch of its own: who reads the mappings while the call is at work has read them under another.
pub(crate) fn gated<R>(inside: impl FnOnce(&Locked<'_>) -> R) -> R {
    let mask = sys::block_signals();
    let (reader, locked) = STATE.enter();
    let epoch = STATE.layout_epoch();
    let result = inside(&locked);
    if STATE.layout_epoch() != epoch {
        STATE.layout_changes();
    }
    drop(locked);
    drop(reader);
    sys::restore_signals(mask);
    result
}

/// The range, if something of it is managed.
pub(crate) fn touches(range: Option<(u64, u64)>) -> Option<(u64, u64)> {
    range.filter(|(start, end)| STATE.table.overlaps(*start, *end))
}

/// A call after which something else, or nothing, is mapped in the range.
fn replaced(call: &Registers, range: Option<(u64, u64)>) -> i64 {
    let Some((start, end)) = touches(range) else { return scope::past(call, [range, None]) };
    gated(|locked| {
        STATE.layout_changes();
        locked.prepare_to_disown(start, end);
        let result = call.raw();
        if !failed(result) {
            locked.disown(start, end);
            publish();
        } else if STATE.table.next_merged(start, end).is_some() {
            disown_holes(locked, start, end);
        }
        result
    })
}

/// A call that replaces memory may unmap it and fail then: what lies there later has not been merged.
#[inline(never)]
pub(crate) fn disown_holes(locked: &Locked<'_>, start: u64, end: u64) {
    let known = (0..LOOKS).any(|_| {
        let mut at = start;
        let read = for_each_mapping(|line| {
            let gap = line.start.min(end);
            if at < gap {
                locked.disown(at, gap);
            }
            at = at.max(line.end);
        });
        if read && at < end {
            locked.disown(at, end);
        }
        read
    });
    if !known {
        STATE.stop(stop::BROKEN);
    }
    publish();
}

/// mprotect, and pkey_mprotect without a key.
fn protect(call: &Registers, range: Option<(u64, u64)>) -> i64 {
    let Some((start, end)) = touches(range) else { return scope::past(call, [range, None]) };
    gated(|_| {
        STATE.layout_changes();
        let result = call.raw();
        let set = |from: u64, to: u64, prot: u8| {
            for_merged(from, to, |piece, keep| {
                STATE.table.set(piece.start, piece.end, Mark::merged(keep.with(prot, Keep::PROT)));
            });
        };
        if result == 0 {
            set(start, end, (call.rdx & u64::from(Keep::PROT)) as u8);
            return result;
        }
        // At a hole, or where there are too many mappings, it stops: what lies before has the new protection.
        // Whoever closed the descriptor in the middle did not mean it; what was read before is right, too.
        let known = (0..LOOKS).any(|_| {
            for_each_mapping(|line| {
                let bits = [(line.readable, PROT_READ), (line.writable, PROT_WRITE), (line.executable, PROT_EXEC)];
                let prot = bits.iter().filter(|(has, _)| *has).fold(0, |all, (_, bit)| all | *bit as u8);
                set(start.max(line.start), end.min(line.end), prot);
            })
        });
        if !known {
            STATE.stop(stop::BROKEN);
        }
        result
    })
}

/// DONTFORK, DONTDUMP and their opposites: `how` is what they do to a mark.
fn advised(call: &Registers, range: Option<(u64, u64)>, how: impl Fn(Keep) -> Keep) -> i64 {
    let Some((start, end)) = touches(range) else { return scope::past(call, [range, None]) };
    gated(|_| {
        STATE.layout_changes();
        let result = call.raw();
        // ENOMEM says that there are holes. Everything else is changed all the same.
        let whole = |result: i64| result == 0 || result == -errno::ENOMEM;
        let again = |from: u64, to: u64| from == to || whole(Registers { rdi: from, rsi: to - from, ..*call }.raw());
        let mut at = start;
        while let Some(piece) = STATE.table.next_merged(at, end) {
            // What else stops it (a mapping that cannot have the property, too many mappings) stops it in the middle.
            // Asked again piece by piece, which changes nothing that is changed already, it stops there again.
            let applied = whole(result) || again(at, piece.start) && again(piece.start, piece.end);
            if !applied {
                break;
            }
            if let Some(keep) = piece.mark.keep() {
                STATE.table.set(piece.start, piece.end, Mark::merged(how(keep)));
            }
            at = piece.end;
        }
        result
    })
}

/// A second copy of libc (dlmopen) would make its calls past the gate: before it is mapped nothing may be merged any
/// more. `false` if that cannot be had.
fn let_code_in(fd: u64) -> bool {
    // struct stat: the inode number is the second word.
    let mut stat = [0_u64; 18];
    // SAFETY: the kernel writes a struct stat of 144 bytes.
    if unsafe { sys!(nr::FSTAT, fd, stat.as_mut_ptr() as u64) } != 0 || !crate::patch::is_patched(stat[1]) {
        return true;
    }
    STATE.stop(stop::UNKNOWN_CODE);
    unmerge_all()
}

/// Un-merges every managed range. Something that keeps pages from being merged again must have been said before. A batch
/// that began before that is waited for: it is over when the gate can be passed.
///
/// What cannot be had at once, since others hold pages, is tried again: the program is going to fail without it. `false` if
/// several tries have brought nothing more, or all of it takes too long.
pub(crate) fn unmerge_all() -> bool {
    /// Tries that bring nothing. The helper takes a second for each, of each range.
    const IN_VAIN: u32 = 5;
    const AT_MOST_NS: u64 = 30_000_000_000;
    gated(|_| ());
    if STATE.table.next_merged(0, USER_END).is_none() {
        return true;
    }
    let until = sys::monotonic().saturating_add(AT_MOST_NS);
    let (mut left, mut in_vain) = (merged_pages(), 0);
    while left > 0 && in_vain < IN_VAIN && sys::monotonic() < until {
        let mut at = 0;
        while let Some((start, end)) = STATE.table.next_managed(at, USER_END) {
            if !unmerge(start, end) && (!STATE.control().is_some_and(is_served) || sys::monotonic() > until) {
                return false;
            }
            at = end;
        }
        let now = merged_pages();
        in_vain = if now < left { 0 } else { in_vain + 1 };
        left = now;
    }
    left == 0
}

fn merged_pages() -> u64 {
    let mut pages = 0;
    for_merged(0, USER_END, |piece, _| pages += (piece.end - piece.start) / PAGE);
    pages
}

/// Nothing is merged any more in a process that locks all its memory, and nothing that was stays so.
fn mlockall(call: &Registers) -> i64 {
    STATE.stop(stop::MLOCKALL);
    if !unmerge_all() {
        return -errno::EAGAIN;
    }
    gated(|_| {
        if let Some(control) = STATE.control() {
            // Locking populates whatever can be accessed. In the scratch area, which is registered, it would wait for
            // ever; and plain pages are not moved there any more.
            // SAFETY: the agent's own memory, empty outside of batches.
            unsafe { sys!(nr::MPROTECT, control.scratch.load(SeqCst), abi::SCRATCH, sys::PROT_NONE) };
        }
        call.raw()
    })
}

/// Calls `each` for every piece of merged pages in a range.
pub(crate) fn for_merged(start: u64, end: u64, mut each: impl FnMut(Piece, Keep)) {
    let mut at = start;
    while let Some(piece) = STATE.table.next_merged(at, end) {
        if let Some(keep) = piece.mark.keep() {
            each(piece, keep);
        }
        at = piece.end;
    }
}

/// Tells the broker what the table holds, and whether memory may have policies.
pub(crate) fn publish() {
    if let Some(control) = STATE.control() {
        control.policies.store(STATE.policies.load(SeqCst), SeqCst);
        STATE.table.publish(control);
    }
}

fn madvise(call: &Registers, range: Option<(u64, u64)>) -> i64 {
    let advice = call.rdx & 0xffff_ffff;
    match (advice, range) {
        (advice::MERGEABLE, Some((start, end))) => handover::advise_mergeable(call, start, end),
        (advice::UNMERGEABLE, Some((start, end))) => handover::advise_unmergeable(call, start, end),
        (advice::DONTNEED | advice::DONTNEED_LOCKED | advice::FREE | advice::GUARD_INSTALL, _) => {
            let Some((start, end)) = touches(range) else { return scope::past(call, [range, None]) };
            gated(|_| discard(call, start, end))
        }
        (advice::REMOVE, _) => {
            let result = call.raw();
            let merged = touches(range).is_some_and(|(start, end)| STATE.table.next_merged(start, end).is_some());
            // What a private mapping of a file answers, where anonymous memory says EINVAL.
            if result == -errno::EACCES && merged { -errno::EINVAL } else { result }
        }
        (advice::WIPEONFORK, _) => on_plain(call, range, errno::ENOMEM),
        (advice::COLLAPSE, _) => collapse(call, range),
        (advice::DONTFORK, _) => advised(call, range, |keep| keep.with(Keep::DONTFORK, 0)),
        (advice::DOFORK, _) => advised(call, range, |keep| keep.with(0, Keep::DONTFORK)),
        (advice::DONTDUMP, _) => advised(call, range, |keep| keep.with(Keep::DONTDUMP, 0)),
        (advice::DODUMP, _) => advised(call, range, |keep| keep.with(0, Keep::DONTDUMP)),
        _ => call.raw(),
    }
}

/// A destructive advice, piece by piece in the kernel's order: what lies behind a piece that it refuses (locked
/// memory) keeps its content, what lies behind a hole does not.
fn discard(call: &Registers, start: u64, end: u64) -> i64 {
    let mut hole = 0;
    let mut advise = |from: u64, to: u64| {
        let result = Registers { rdi: from, rsi: to - from, ..*call }.raw();
        if result == -errno::ENOMEM {
            hole = result;
            return 0;
        }
        result
    };
    let mut at = start;
    while let Some(piece) = STATE.table.next_merged(at, end) {
        if at < piece.start {
            let result = advise(at, piece.start);
            if result != 0 {
                return result;
            }
        }
        if drop_merged(piece.start, piece.end) {
            let result = advise(piece.start, piece.end);
            if result != 0 {
                return result;
            }
        } else if piece.mark.keep().is_none_or(|keep| !keep.has(PROT_WRITE as u8)) {
            return -errno::ENOMEM;
        }
        // Otherwise the pages hold zeros now, and the kernel must not be asked: it would show the store's again.
        at = piece.end;
    }
    let result = if at < end { advise(at, end) } else { 0 };
    if result != 0 { result } else { hole }
}

/// Puts fresh anonymous memory in the place of merged pages: for calls after which their content must be gone.
///
/// `false` if memory could not be had for all of it. Then writable pages hold zeros, in the store's mapping.
pub(crate) fn drop_merged(start: u64, end: u64) -> bool {
    let mut whole = true;
    for_merged(start, end, |piece, keep| {
        if put_anonymous(piece, keep) {
            STATE.table.set(piece.start, piece.end, Mark::PLAIN);
            if let Some(control) = STATE.control() {
                control.counters.dropped.fetch_add((piece.end - piece.start) / PAGE, SeqCst);
            }
        } else {
            STATE.stop(stop::BROKEN);
            whole = false;
        }
    });
    whole
}

fn put_anonymous(piece: Piece, keep: Keep) -> bool {
    let len = piece.end - piece.start;
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | if keep.has(Keep::NORESERVE) { MAP_NORESERVE } else { 0 };
    // SAFETY: the program asked for this content to be thrown away, and the pages are managed.
    if unsafe { sys::mmap(piece.start, len, keep.prot().into(), flags, -1, 0) } == Ok(piece.start) {
        apply(piece.start, len, keep);
        return true;
    }
    if keep.has(PROT_WRITE as u8) {
        // No memory for a mapping. The pages stay in the store's mapping, but read as zeros.
        for word in (piece.start..piece.end).step_by(8) {
            // SAFETY: writable memory of the program whose content it asked to be thrown away.
            unsafe { (word as *mut u64).write_volatile(0) };
        }
    }
    false
}

/// Applies the properties that a new mapping does not have by itself.
pub(crate) fn apply(start: u64, len: u64, keep: Keep) {
    for (bit, advice) in [(Keep::DONTFORK, advice::DONTFORK), (Keep::DONTDUMP, advice::DONTDUMP)] {
        if keep.has(bit) {
            // SAFETY: a property of a mapping that was just made, as the mapping before it had.
            unsafe { sys!(nr::MADVISE, start, len, advice) };
        }
    }
}

fn brk(call: &Registers) -> i64 {
    if call.rdi == 0 || STATE.manages_nothing() {
        return call.raw();
    }
    // SAFETY: asks where the heap ends.
    let current = unsafe { sys!(nr::BRK, 0) } as u64;
    let (new_end, old_end) = (page_up(call.rdi), page_up(current));
    if new_end >= old_end {
        return call.raw();
    }
    if !STATE.table.overlaps(new_end, old_end) {
        return scope::past(call, [Some((new_end, old_end)), None]);
    }
    gated(|locked| {
        STATE.layout_changes();
        let result = call.raw();
        if result as u64 == call.rdi {
            locked.disown(new_end, old_end);
            publish();
        }
        result
    })
}

fn shmat(call: &Registers) -> i64 {
    if call.rdx & SHM_REMAP == 0 || call.rsi == 0 || STATE.manages_nothing() {
        return call.raw();
    }
    // struct shmid64_ds: the size stands behind ipc64_perm.
    let mut segment = [0_u64; 14];
    // SAFETY: the kernel writes a shmid64_ds of 112 bytes.
    let known = unsafe { sys!(nr::SHMCTL, call.rdi, 2, segment.as_mut_ptr() as u64) } == 0;
    let size = if known { segment[6] } else { 0 };
    replaced(call, span(call.rsi & !(PAGE - 1), size))
}

/// UFFDIO_REGISTER: another user of userfaultfd (postcopy, snapshots) gets the range first, and whole. Nothing is merged in
/// the process from then on: up to Linux 6.16 memory can be taken out of anybody's registration through anybody's
/// descriptor.
fn register(call: &Registers) -> i64 {
    const TRIES: u32 = 5;
    STATE.stop(stop::USERFAULTFD);
    let mut raw = [0_u8; size_of::<UffdioRegister>()];
    if STATE.table.is_empty() || !sys::read_own(sys::gettid(), call.rdx, &mut raw) {
        return call.raw();
    }
    let word = |at: usize| raw[at..at + 8].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    let Some((start, end)) = touches(span(word(0), word(8))) else { return call.raw() };
    for _ in 0..TRIES {
        // What was managed is let go of; what the program has registered itself is not touched.
        if unmergeable(start, end) || !STATE.table.overlaps(start, end) {
            let result = call.raw();
            if result != -errno::EBUSY {
                return result;
            }
        }
        sys::sleep_ns(10_000_000);
    }
    call.raw()
}

/// Futex operations that fail on a frozen page, where they come through `syscall()`: their words' pages are excluded.
fn futex(call: &Registers) -> i64 {
    const WAKE_OP: u64 = 5;
    const LOCK_PI: u64 = 6;
    const LOCK_PI2: u64 = 13;
    let operation = call.rsi & 0x7f;
    let risky = operation == WAKE_OP || (LOCK_PI..=LOCK_PI2).contains(&operation) && !(9..=10).contains(&operation);
    if !risky || STATE.table.is_empty() {
        return call.raw();
    }
    for word in [call.rdi, call.r8] {
        let page = word & !(PAGE - 1);
        if STATE.table.overlaps(page, page + 1) {
            if STATE.table.mark(page).keep().is_some() {
                let _ = unmerge(page, page + PAGE);
            }
            gated(|_| {
                if STATE.table.mark(page).is_plain() {
                    STATE.table.set(page, page + PAGE, Mark::EXCLUDED);
                }
            });
        }
    }
    call.raw()
}
