//! How a helper begins: what it opens and reserves in the program's memory, and its introduction to the broker.
//!
//! The thread that starts it waits for no more than the control area ([`SETUP`]). What if the broker does not answer, or
//! dies meanwhile? Nothing has been touched, and the helper ends. What if the helper is killed in here? Its areas stay
//! reserved; nobody has a userfaultfd yet, or the broker has one of which nothing is registered.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use abi::control::{self, Control};
use abi::wire::{Message, Token};
use abi::{BATCH_MAX, SCRATCH};

use crate::filter;
use crate::link::{self, Link, Received};
use crate::priority::Priority;
use crate::reserved::Places;
use crate::segments::Segments;
use crate::space::Space;
use crate::state::{STATE, unwilling};
use crate::sys::{self, MAP_ANONYMOUS, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PAGE, PROT_NONE, PROT_READ, PROT_WRITE};
use crate::sys::{advice, failed, nr, sys};

const RLIMIT_NOFILE: u64 = 7;

/// What the thread that starts the helper tells it, and hears.
pub(crate) struct Setup {
    pub(crate) stack_top: AtomicU64,
    pub(crate) member: AtomicU32,
    /// 0 not yet, 1 the control area stands, 2 it failed.
    pub(crate) ready: AtomicU32,
}

pub(crate) static SETUP: Setup =
    Setup { stack_top: AtomicU64::new(0), member: AtomicU32::new(0), ready: AtomicU32::new(0) };

/// Introduces this helper to the broker, which may not want it. `None` if that went wrong: then it ends.
pub(crate) fn introduce(connect: fn() -> Option<Link>) -> Option<(Space, Link)> {
    let pid = sys::getpid();
    let pagemap = link::open(c"/proc/self/pagemap")?;
    let maps = link::open(c"/proc/self/maps")?;
    raise_descriptor_limit();
    let scratch = reserve_scratch()?;
    // Within one table of page table entries: see the counts.
    let size = BATCH_MAX as u64 * PAGE;
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    // SAFETY: a free place of the kernel's choice. What is not needed of it is address space and nothing else.
    let diverged_scratch = unsafe { sys::mmap(0, 2 * size, PROT_NONE, flags, -1, 0) }.ok()?.next_multiple_of(size);
    let places = Places::reserve(maps)?;
    if STATE.all.load(SeqCst) != 0 && !STATE.table.reserve_marks() {
        return None;
    }
    let (control, control_fd) = make_control()?;
    let link = connect()?;
    let member = SETUP.member.load(SeqCst);
    control.member.store(member, SeqCst);
    control.scratch.store(scratch, SeqCst);
    control.diverged_scratch.store(diverged_scratch, SeqCst);
    control.stop.store(STATE.early_stop.load(SeqCst), SeqCst);
    control.forks.store(crate::stubs::forks(), SeqCst);
    let address = core::ptr::from_ref(control) as u64;
    let token = Token(STATE.token[0].load(SeqCst), STATE.token[1].load(SeqCst));
    let hello =
        Message::Hello { version: control::VERSION, member, control: address, scratch, diverged_scratch, token };
    if !link.send(hello, Some(control_fd)) {
        return None;
    }
    link::close(control_fd);
    // From here on the gate uses the control area. Whoever handed the range over is waiting for it.
    control.helper.store(pid, SeqCst);
    STATE.set_control(address);
    STATE.helper.store(pid, SeqCst);
    // What was said meanwhile went into the area before, or into none.
    control.stop.fetch_or(STATE.early_stop.load(SeqCst), SeqCst);
    SETUP.ready.store(1, SeqCst);
    sys::futex_wake(&SETUP.ready);

    let (device, descriptor) = match receive(&link) {
        Received::Message(Message::Welcome { device }, descriptor) => (device, descriptor),
        Received::Message(Message::Unwanted, _) => {
            STATE.unwilling.store(unwilling::FOR_GOOD, SeqCst);
            return None;
        }
        _ => return None,
    };
    // From the answer on the broker may have it for a member.
    control.joined.store(1, SeqCst);
    let uffd = userfault(descriptor.filter(|_| device == 1));
    if let Some(fd) = descriptor {
        link::close(fd);
    }
    match uffd {
        Ok(fd) => link.send(Message::Userfault { errno: 0 }, Some(fd)),
        Err(errno) => {
            link.send(Message::Userfault { errno: errno as u32 }, None);
            false
        }
    }
    .then_some(())?;
    let Received::Message(Message::Ready { move_pages, .. }, counts) = receive(&link) else { return None };
    let mut space = Space {
        control,
        pid,
        uffd: uffd.ok()?,
        link: link.descriptor(),
        diverged_scratch_lost: false,
        pagemap,
        maps,
        scratch,
        diverged_scratch,
        segments: Segments::new(places.windows),
        copies: places.copies,
        counts,
        priority: Priority::default(),
        check_mode: 0,
        layout_epoch: 0,
        thread_epoch: 0,
        barrier: false,
        forced: reads_what_is_forbidden(scratch + SCRATCH),
    };
    if !move_pages || !space.open_scratch() {
        return None;
    }
    space.close_scratch();
    filter::drop_privileges().then_some((space, link))
}

fn receive(link: &Link) -> Received {
    loop {
        match link.receive(true) {
            Received::Nothing => {}
            received => return received,
        }
    }
}

/// True if /proc/PID/mem shows memory whose protection forbids to read it: since 6.12 a kernel can be built so that it does
/// not. `page` is one of that kind.
fn reads_what_is_forbidden(page: u64) -> bool {
    let Some(memory) = link::open(c"/proc/self/mem") else { return false };
    let mut byte = 0_u8;
    // SAFETY: the kernel writes one byte.
    let read = unsafe { sys!(nr::PREAD64, memory as u64, (&raw mut byte) as u64, 1, page) };
    link::close(memory);
    // The page that is read is there now, and is to be a hole.
    // SAFETY: the agent's own, which nobody uses.
    unsafe { sys!(nr::MADVISE, page, PAGE, advice::DONTNEED) };
    read == 1
}

/// A helper holds one descriptor for each segment; its limit is its own.
fn raise_descriptor_limit() {
    let mut limit = [0_u64; 2];
    // SAFETY: the kernel writes the limits of this process.
    if unsafe { sys!(nr::PRLIMIT64, 0, RLIMIT_NOFILE, 0, limit.as_mut_ptr() as u64) } == 0 {
        limit[0] = limit[1];
        // SAFETY: the kernel reads the limits.
        unsafe { sys!(nr::PRLIMIT64, 0, RLIMIT_NOFILE, limit.as_ptr() as u64, 0) };
    }
}

/// A huge page's worth of address space, aligned, with one more page behind it for the barrier.
fn reserve_scratch() -> Option<u64> {
    let all = 2 * SCRATCH + PAGE;
    let start = sys::allocate(all)?;
    let scratch = start.next_multiple_of(SCRATCH);
    let end = scratch + SCRATCH + PAGE;
    // SAFETY: the parts of the agent's own mapping that are not needed; the barrier's page; a property of the rest.
    unsafe {
        if scratch > start {
            sys!(nr::MUNMAP, start, scratch - start);
        }
        if start + all > end {
            sys!(nr::MUNMAP, end, start + all - end);
        }
        sys!(nr::MPROTECT, scratch + SCRATCH, PAGE, PROT_NONE);
        // A child has no helper and nothing to look for in here.
        sys!(nr::MADVISE, scratch, SCRATCH + PAGE, advice::DONTFORK);
    }
    crate::own::forget(start);
    crate::own::record(scratch, end).then_some(scratch)
}

fn make_control() -> Option<(&'static Control, i32)> {
    const MFD_CLOEXEC: u64 = 1;
    const MFD_ALLOW_SEALING: u64 = 2;
    const F_ADD_SEALS: u64 = 1033;
    const SEAL_SEAL_SHRINK_GROW: u64 = 1 | 2 | 4;
    let size = sys::page_up(size_of::<Control>() as u64);
    // SAFETY: makes a descriptor in the helper's own table.
    let fd = unsafe { sys!(nr::MEMFD_CREATE, c"pagefold-control".as_ptr() as u64, MFD_CLOEXEC | MFD_ALLOW_SEALING) };
    if failed(fd) {
        return None;
    }
    // SAFETY: sizes the file just made, for good: the broker would be killed if it became shorter.
    if unsafe {
        sys!(nr::FTRUNCATE, fd as u64, size) != 0 || sys!(nr::FCNTL, fd as u64, F_ADD_SEALS, SEAL_SEAL_SHRINK_GROW) != 0
    } {
        return None;
    }
    // SAFETY: a free place of the kernel's choice.
    let address = unsafe { sys::mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd as i32, 0) }.ok()?;
    // SAFETY: a property of the mapping just made: a child's gate must not move this one's slots.
    unsafe { sys!(nr::MADVISE, address, size, advice::DONTFORK) };
    // SAFETY: a fresh file of the right size, zero-filled, never unmapped; the structure holds only atomics.
    let control = unsafe { &*(address as *const Control) };
    control.magic.store(control::MAGIC, SeqCst);
    control.version.store(control::VERSION, SeqCst);
    let own = crate::patch::own_code().chain([crate::own::image()]);
    for ((start, end), slot) in own.zip(&control.own_code) {
        slot.start.store(start, SeqCst);
        slot.end.store(end, SeqCst);
    }
    Some((control, fd as i32))
}

/// A userfaultfd of this address space: from the broker's device, or by the system call.
fn userfault(device: Option<i32>) -> Result<i32, i64> {
    const O_NONBLOCK: u64 = 0o4000;
    let flags = sys::O_CLOEXEC | O_NONBLOCK;
    let request = u64::from(abi::uapi::USERFAULTFD_IOC_NEW);
    let fd = match device {
        // SAFETY: makes a descriptor in the helper's own table.
        Some(device) => unsafe { sys!(nr::IOCTL, device as u64, request, flags) },
        // SAFETY: as above.
        None => unsafe { sys!(nr::USERFAULTFD, flags) },
    };
    if failed(fd) { Err(-fd) } else { Ok(fd as i32) }
}
