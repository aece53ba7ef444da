//! Where the code lies: the slack behind the vDSO, in its last page.
//!
//! The vDSO is in every 64-bit process, executable, private, and zero behind its end. The kernel lets tracers write
//! there, as debuggers put breakpoints into it; sealing does not forbid that. The first write gives the process a copy
//! of this page, which stays until it ends or executes another program.

use std::cmp::Ordering;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::arch;
use super::asleep::Asleep;
use super::refusal::Refusal;
use super::slot::{HEAD, Head, Owner, SLOT, Slot};
use crate::maps;
use crate::procfs::ProcError;
use crate::ptrace::Tracee;
use crate::remote::{self, ReadOutcome};
use crate::stat::Stat;
use crate::task;
use crate::units::{Bytes, Pid, Range, Vaddr};

/// More stack than this is not searched for a way back into a slot.
const STACK_MAX: u64 = 8 << 20;
/// Bytes below the stack pointer that a function may use.
const RED_ZONE: u64 = 128;

/// The slots of an address space.
#[derive(Debug)]
pub(super) struct Place {
    /// The memory that the slots were looked for in: after an exec it is that of the old program, and nobody's.
    memory: Option<OwnedFd>,
    slots: Vec<Slot>,
    namespace: u32,
    process_start: u64,
}

impl Place {
    /// Looks for slots, without touching the process. `Ok(None)` if it has no address space now, or not all of one: it
    /// is about to end, or to execute a program.
    pub(super) fn find(pid: Pid) -> Result<Result<Option<Self>, Refusal>, ProcError> {
        let none = |why| Ok(Err(Refusal::NoPlaceForCode { why }));
        let path = format!("/proc/{pid}/mem");
        // Not permitted: then the kernel writes for us, word by word.
        let memory = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).ok();
        let maps = maps::read(pid)?;
        let Some(vdso) = maps.iter().find(|vma| vma.name == "[vdso]") else { return Ok(Ok(None)) };
        let Some(used) = used(pid, vdso.range) else { return Ok(Ok(None)) };
        let slots = Slot::all(vdso.range, used);
        if slots.is_empty() {
            return none("no room behind its vDSO");
        }
        // Numbers in slots are those of this PID namespace.
        let namespace = std::fs::metadata("/proc/self/ns/pid").map_or(0, |meta| meta.ino() as u32);
        Ok(Ok(Some(Self { memory, slots, namespace, process_start: Stat::read(pid)?.start_time })))
    }

    pub(super) fn owner(&self, process: Pid, thread: Pid, thread_start: u64) -> Owner {
        Owner { namespace: self.namespace, process, thread, process_start: self.process_start, thread_start }
    }

    /// The slot that an address lies in, with what stands there.
    pub(super) fn at(&self, tid: Pid, address: u64) -> Option<(Slot, [u8; SLOT as usize])> {
        let slot = *self.slots.iter().find(|slot| slot.holds(address))?;
        Some((slot, read(tid, slot)?))
    }

    /// A slot for a stopped thread: its own if it has left that, so that a thread keeps one only; or a free one; or one
    /// that another thread has left.
    pub(super) fn choose(&self, owner: &Owner, stack: u64, instruction: u64) -> Option<Slot> {
        self.find_slot(owner, Some(At { stack, instruction }))
    }

    /// True if [`Place::choose`] may find one once the thread is stopped.
    pub(super) fn may_have_room(&self, owner: &Owner) -> bool {
        self.find_slot(owner, None).is_some()
    }

    /// True if a thread still has the memory in which the slots are.
    pub(super) fn is_there(&self, tid: Pid) -> bool {
        self.slots.first().is_some_and(|slot| read(tid, *slot).is_some())
    }

    /// `stopped`: where the owner is stopped; until it is, the best is hoped of it.
    fn find_slot(&self, owner: &Owner, stopped: Option<At>) -> Option<Slot> {
        let own = |slot: Slot, head: &Head| stopped.is_none_or(|at| has_left(slot, head, at));
        let all: Vec<_> = self.slots.iter().filter_map(|slot| Some((*slot, read(owner.thread, *slot)?))).collect();
        let heads = || all.iter().filter_map(|(slot, bytes)| Some((*slot, Head::from_bytes(bytes)?)));
        let leads_here =
            |slot: Slot| all.iter().any(|(other, bytes)| *other != slot && leads_into(slot, *other, bytes));
        let own = heads().find(|(slot, head)| head.owner == *owner && !leads_here(*slot) && own(*slot, head));
        let own = own.map(|(slot, _)| slot);
        let free = || all.iter().find(|(_, bytes)| bytes.iter().all(|byte| *byte == 0)).map(|(slot, _)| *slot);
        let left = |slot: Slot, head: &Head| !leads_here(slot) && left_by_another(slot, head, owner, stopped);
        own.or_else(free).or_else(|| heads().find(|(slot, head)| left(*slot, head)).map(|(slot, _)| slot))
    }

    /// Writes a slot; false if the thread is not in the address space any more in which the slots were found.
    ///
    /// By one call, so that whoever dies has written all of it or nothing. Where the kernel does not let that file write
    /// what is not writable (proc_mem.force_override=never), word by word.
    pub(super) fn write(&self, tracee: Tracee, slot: Slot, bytes: &[u8; SLOT as usize]) -> io::Result<bool> {
        if let Some(memory) = &self.memory {
            match rustix::io::pwrite(memory, bytes, slot.0.0) {
                // What was written is what the thread has: no exec has come between.
                Ok(written) if written == bytes.len() => return Ok(read(tracee.tid(), slot).as_ref() == Some(bytes)),
                Ok(_) => return Ok(false),
                Err(Errno::IO | Errno::FAULT | Errno::PERM | Errno::ACCESS) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let maps = maps::read(tracee.tid()).unwrap_or_default();
        if !maps.iter().any(|vma| vma.name == "[vdso]" && vma.range.contains(slot.0)) {
            return Ok(false);
        }
        tracee.poke(slot.0, bytes)?;
        Ok(true)
    }

    /// Makes a slot free again.
    pub(super) fn clear(&self, tracee: Tracee, slot: Slot) -> io::Result<bool> {
        self.write(tracee, slot, &[0; SLOT as usize])
    }
}

fn read(tid: Pid, slot: Slot) -> Option<[u8; SLOT as usize]> {
    let mut bytes = [0; SLOT as usize];
    let outcome = remote::read(tid, slot.0, &mut bytes).ok()?;
    matches!(outcome, ReadOutcome::Complete { .. }).then_some(bytes)
}

/// True if the code of another slot leads into this one: an injector that found a thread in this one, and died, has left it
/// so. The thread may be in that other one still.
fn leads_into(slot: Slot, other: Slot, bytes: &[u8; SLOT as usize]) -> bool {
    arch::decode(&bytes[HEAD as usize..], other.code().0).is_some_and(|onward| slot.holds(onward.to))
}

/// Where a thread sleeps or is stopped.
#[derive(Clone, Copy)]
struct At {
    stack: u64,
    instruction: u64,
}

/// True if the thread that a slot was written for has left it.
///
/// A slot stays marked if its injector died, or if a call went on in it. Its thread may be back in its own code, or in
/// a signal handler that was called in the slot and will return there: such a handler runs on the stack above which the
/// address waits to be returned to. If the thread is on another stack than it was, there is no telling: the handler may
/// have gone over to it, as schedulers in user space do, and come back some day.
fn has_left(slot: Slot, head: &Head, at: At) -> bool {
    head.stack.is_near(at.stack) && is_outside(slot, head.owner.thread, at)
}

/// True if a thread is not in a slot, and not about to return there from where it is.
fn is_outside(slot: Slot, thread: Pid, at: At) -> bool {
    !slot.holds(at.instruction) && returns_to(slot, thread, at.stack) == Some(false)
}

/// True if a slot that is marked as used by another thread is used no more.
fn left_by_another(slot: Slot, head: &Head, owner: &Owner, stopped: Option<At>) -> bool {
    let user = &head.owner;
    if user.namespace != owner.namespace {
        // Its numbers are those of another PID namespace: nobody knows.
        return false;
    }
    let same_process = (user.process, user.process_start) == (owner.process, owner.process_start);
    if !same_process && !runs_in_memory_of(user, owner.process) {
        return copy_is_unused(slot, head, owner, stopped);
    }
    let other = user.thread;
    if other == owner.thread {
        return false;
    }
    if !Stat::read(other).is_ok_and(|stat| stat.start_time == user.thread_start) {
        return true;
    }
    // Another thread of the process is not stopped. But if it sleeps, it only gets into a slot by returning, for only
    // injectors put it there, of which there is one at a time; and it has slept all the while if its counts say so.
    let Some(asleep) = Asleep::look(other) else { return false };
    has_left(slot, head, At::of(&asleep)) && Asleep::look(other) == Some(asleep)
}

/// True if a process lives and shares the memory of another, as between vfork and exec.
fn runs_in_memory_of(user: &Owner, process: Pid) -> bool {
    Stat::read(user.process).is_ok_and(|stat| stat.start_time == user.process_start)
        && task::kcmp_vm(user.process, process).is_ok_and(Ordering::is_eq)
}

/// True if nobody is in a slot that was copied by a fork: of all threads only the one that forked has come along, as the
/// first of the new process. If it was another one than the slot's, then what is on that one's stack is nobody's, unless
/// the program goes over to stacks by itself: so nothing there may lead into the slot either.
fn copy_is_unused(slot: Slot, head: &Head, owner: &Owner, stopped: Option<At>) -> bool {
    let first = owner.process;
    let nobody_returns = |at: At| {
        is_outside(slot, first, at) && (head.stack.is_near(at.stack) || leads_to(slot, first, head) == Some(false))
    };
    if owner.thread == first {
        return stopped.is_none_or(nobody_returns);
    }
    let Some(asleep) = Asleep::look(first) else { return false };
    nobody_returns(At::of(&asleep)) && Asleep::look(first) == Some(asleep)
}

impl At {
    fn of(asleep: &Asleep) -> Self {
        Self { stack: asleep.stack, instruction: asleep.instruction }
    }
}

/// True if a word on the stack of a thread, which is outside of the slot, is an address in it. `None` if the
/// stack cannot be read, or is too large.
fn returns_to(slot: Slot, tid: Pid, stack: u64) -> Option<bool> {
    let vma = maps::read(tid).ok()?.into_iter().find(|vma| vma.range.contains(Vaddr(stack)))?;
    let from = stack.saturating_sub(RED_ZONE).max(vma.range.start().0) & !7;
    has_address_of(slot, tid, from, vma.range.end().0)
}

/// The same, of all of the mapping with the stack that a slot's thread was on. Where nothing is mapped there any more,
/// nothing leads anywhere.
fn leads_to(slot: Slot, tid: Pid, head: &Head) -> Option<bool> {
    let maps = maps::read(tid).ok()?;
    let mut found = Some(false);
    for vma in maps.iter().filter(|vma| head.stack.may_be_in(vma.range)) {
        found = Some(found? | has_address_of(slot, tid, vma.range.start().0, vma.range.end().0)?);
    }
    found
}

fn has_address_of(slot: Slot, tid: Pid, from: u64, to: u64) -> Option<bool> {
    let length = to - from;
    if length > STACK_MAX {
        return None;
    }
    let mut bytes = vec![0; length as usize];
    match remote::read(tid, Vaddr(from), &mut bytes).ok()? {
        ReadOutcome::Complete { .. } => {}
        ReadOutcome::Partial { .. } | ReadOutcome::Gone => return None,
    }
    Some(bytes.chunks_exact(8).any(|word| slot.holds(u64::from_ne_bytes(word.try_into().expect("eight bytes")))))
}

/// How many bytes of the vDSO's mapping its ELF file uses; `None` if there is none.
fn used(pid: Pid, range: Range) -> Option<u64> {
    let mut image = vec![0; range.len().0 as usize];
    if !matches!(remote::read(pid, range.start(), &mut image).ok()?, ReadOutcome::Complete { .. }) {
        return None;
    }
    end_of_elf(&image)
}

/// Behind the last byte that an ELF file's headers, segments and table of sections speak of; `None` if what they say does
/// not fit the image, which the process may have written itself.
fn end_of_elf(image: &[u8]) -> Option<u64> {
    let bytes = |at: u64, length: usize| {
        let at = usize::try_from(at).ok()?;
        image.get(at..at.checked_add(length)?)
    };
    let half = |at: u64| Some(u64::from(u16::from_le_bytes(bytes(at, 2)?.try_into().ok()?)));
    let word = |at: u64| Some(u64::from_le_bytes(bytes(at, 8)?.try_into().ok()?));
    if image.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let (segments, sections) = (word(0x20)?, word(0x28)?);
    let (segment_size, segment_count, section_size, section_count) =
        (half(0x36)?, half(0x38)?, half(0x3a)?, half(0x3c)?);
    // Places of entries of a table whose header says where it is: products of two halves fit, the sums need not.
    let field = |table: u64, size: u64, index: u64, at: u64| word(table.checked_add(size * index + at)?);
    let mut end = sections.checked_add(section_size * section_count)?;
    for index in 0..segment_count {
        let field = |at| field(segments, segment_size, index, at);
        end = end.max(field(8)?.checked_add(field(0x20)?.max(field(0x28)?))?);
    }
    for index in 0..section_count {
        let field = |at| field(sections, section_size, index, at);
        // Without NOBITS: they have no bytes. The type is the upper half of the first word.
        if field(0)? >> 32 != 8 {
            end = end.max(field(0x18)?.checked_add(field(0x20)?)?);
        }
    }
    // Aligned to words, for ptrace writes words.
    let end = end.checked_next_multiple_of(8)?;
    // What lies behind must be the padding that it is taken for. Slots in use are looked at apart, from the end on.
    (end <= image.len() as u64).then_some(end)
}

/// Reads two words of a thread's memory.
pub(super) fn two_words(tid: Pid, address: u64) -> Option<[i64; 2]> {
    let mut bytes = [0; 16];
    let outcome = remote::read(tid, Vaddr(address), &mut bytes).ok()?;
    (outcome.bytes() == Bytes(16)).then(|| {
        let word = |at: usize| i64::from_ne_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        [word(0), word(8)]
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn our_own_vdso_has_room() {
        let vdso = maps::read(Pid::this()).unwrap().into_iter().find(|vma| vma.name == "[vdso]").unwrap();
        // SAFETY: the vDSO is mapped and readable for as long as the process lives.
        let image =
            unsafe { std::slice::from_raw_parts(vdso.range.start().0 as *const u8, vdso.range.len().0 as usize) };
        let end = end_of_elf(image).unwrap() as usize;
        assert!(image[end..].iter().all(|byte| *byte == 0));
        assert!(image[end - 64..end].iter().any(|byte| *byte != 0));
        assert!(!Slot::all(vdso.range, end as u64).is_empty());
        assert_eq!(end_of_elf(&image[..100]), None);
        assert_eq!(end_of_elf(&[0; 4096]), None);
    }

    #[test]
    fn headers_that_speak_of_the_end_of_all_addresses_are_no_vdso() {
        let header = |places: [u64; 2], counts: [u16; 2]| {
            let mut image = vec![0_u8; 4096];
            image[..6].copy_from_slice(b"\x7fELF\x02\x01");
            image[0x20..0x28].copy_from_slice(&places[0].to_le_bytes());
            image[0x28..0x30].copy_from_slice(&places[1].to_le_bytes());
            for (at, half) in [(0x36, 56), (0x38, counts[0]), (0x3a, 64), (0x3c, counts[1])] {
                image[at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
            image
        };
        // The end itself, a segment's fields, and a section's lie behind the last address.
        for (places, counts) in [
            ([0, u64::MAX], [0, 0]),
            ([u64::MAX - 4, 0], [1, 0]),
            ([u64::MAX - 0x25, 0], [1, 0]),
            ([u64::MAX, 0], [2, 0]),
            ([0, u64::MAX - 64], [0, 1]),
            ([0, u64::MAX - 63], [0, 1]),
        ] {
            assert_eq!(end_of_elf(&header(places, counts)), None, "{places:x?}");
        }
        // A segment that lies there.
        let mut image = header([64, 0], [1, 0]);
        image[64 + 8..64 + 16].copy_from_slice(&(u64::MAX - 2).to_le_bytes());
        assert_eq!(end_of_elf(&image), None);
    }
}
