//! Who adopts the helper, and could he notice?
//!
//! When the process in the middle ends, the kernel gives the helper to the nearest living child subreaper above it, or
//! to the first process of its name space (find_new_reaper in kernel/exit.c). From then on it is a child that this one
//! has not made: in its `waitpid(-1)`, and as a SIGCHLD. Under `pagefold run` it should be the broker, which knows. Who
//! else can it be?
//!
//! * *The program*, as a subreaper. The attribute is one for all of its threads. It is cleared for the time of the two
//!   clones, but only while the program has one thread, this one, and no child of any kind: then nobody else can look at
//!   it or set it, and nobody is below who could leave an orphan, which would be lost to the program. Otherwise there is
//!   no helper.
//! * *A program above it*, between it and the broker. That one's attribute can be neither seen nor cleared from here. So
//!   the gate leaves a sign where a program becomes a subreaper: a mapping whose name everybody who may read its
//!   /proc/PID/maps can see. The helper looks for it in everybody above, before it is adopted; if it finds one there is
//!   no helper. Programs without a gate show nothing (static ones, those of another user). There the helper sees whose
//!   child it has become, and leaves at once if it is one of those: they get one orphan that ends by itself, as they do
//!   from any daemon that starts below them.
//! * *The first process of a name space* of its own: then the broker cannot see the program either, or is not seen from
//!   here. No helper.
//! * *Somebody above the broker*, of a library caller's: init, a service manager. Not a program that is merged.
//!
//! What else could be done? A child with CLONE_PARENT is the program's parent's, whose it would be for as long as it
//! lives. A direct child without an exit signal escapes `waitpid(-1)`, but not one with __WALL, and whoever adopts it
//! when the program has ended sees an ordinary child. A child of a process of the broker's in a name space below would
//! be adopted by that process and nobody else, but could not see the program's threads any more.
//!
//! A helper that does not come says so to the broker, whose summary tells. It is a child of the process in the middle
//! until then, and reaped there.

use core::ffi::CStr;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use abi::wire::{Message, Token};

use crate::calls::Registers;
use crate::introduction::SETUP;
use crate::link::{self, Link};
use crate::restrict::restrict;
use crate::state::STATE;
use crate::sys::{self, MAP_SHARED, PAGE, PROT_NONE, advice, failed, nr, sys};

const PR_SET_SECCOMP: u64 = 22;
const PR_SET_CHILD_SUBREAPER: u64 = 36;
const PR_GET_CHILD_SUBREAPER: u64 = 37;
const WNOHANG: u64 = 1;
const WEXITED: u64 = 4;
const WNOWAIT: u64 = 0x0100_0000;
pub(crate) const WALL: u64 = 0x4000_0000;
const SIGKILL: u64 = 9;

/// The sign, as it stands in /proc/PID/maps.
const SIGN: &[u8] = b"/memfd:pagefold-subreaper";
const SIGN_NAME: &CStr = c"pagefold-subreaper";
/// Programs above one another that are looked at. Deeper trees end in whoever the helper finds.
const DEPTH: usize = 64;

/// For how long the helper may look, and the broker not answer its call.
const DECIDED_WITHIN_NS: u64 = 1_000_000_000;
/// For how long the process in the middle may take to end.
const ADOPTED_WITHIN_NS: u64 = 1_000_000_000;
const PAUSE_NS: u64 = 20_000;
const LOOK_NS: u64 = 1_000_000;

const UNDECIDED: u32 = 0;
const GO: u32 = 1;
const DECLINED: u32 = 2;

/// Between the process in the middle, which waits for it, and the helper.
#[unsafe(link_section = ".data")]
static VERDICT: AtomicU32 = AtomicU32::new(UNDECIDED);
/// Where the sign is, 0 while there is none.
#[unsafe(link_section = ".data")]
static SIGN_AT: AtomicU64 = AtomicU64::new(0);

/// What has been done about the program's own attribute.
pub(crate) struct Prepared {
    cleared: bool,
}

/// Sees to it that the program does not adopt the helper, or that none comes. To be called with signals blocked.
pub(crate) fn prepare() -> Prepared {
    let subreaper = is_subreaper();
    let declined = sys::getpid() == 1 || subreaper && !is_alone();
    VERDICT.store(if declined { DECLINED } else { UNDECIDED }, SeqCst);
    let cleared = subreaper && !declined;
    if cleared {
        set_subreaper(false);
    }
    Prepared { cleared }
}

impl Prepared {
    /// Once the process in the middle has been reaped: then the helper has its parent. `false` if it has ended.
    pub(crate) fn restore(self) -> bool {
        if self.cleared {
            set_subreaper(true);
        }
        VERDICT.load(SeqCst) == GO
    }
}

fn is_subreaper() -> bool {
    let mut on = 0_u32;
    // SAFETY: the kernel writes one integer.
    unsafe { sys!(nr::PRCTL, PR_GET_CHILD_SUBREAPER, (&raw mut on) as u64, 0, 0, 0) == 0 && on != 0 }
}

fn set_subreaper(on: bool) {
    // SAFETY: an attribute of this process.
    unsafe { sys!(nr::PRCTL, PR_SET_CHILD_SUBREAPER, u64::from(on), 0, 0, 0) };
}

/// True if this process has one thread, and neither children nor processes that it traces.
fn is_alone() -> bool {
    const ANY: u64 = 0;
    // SAFETY: the kernel writes nothing, and nobody is reaped.
    let child = unsafe { sys!(nr::WAITID, ANY, 0, 0, WEXITED | WNOHANG | WNOWAIT | WALL, 0) };
    child == -sys::errno::ECHILD && crate::spawn::status_number(b"\nThreads:") == Some(1)
}

/// At the start: exec keeps the attribute.
pub(crate) fn learn() {
    if is_subreaper() {
        put_sign();
    }
}

/// In a copy made by fork: the attribute stays behind, and so does the sign.
pub(crate) fn forget() {
    SIGN_AT.store(0, SeqCst);
}

/// The gated call.
pub(crate) fn prctl(call: &Registers) -> i64 {
    if call.rdi & 0xffff_ffff == PR_SET_SECCOMP {
        return match call.rsi {
            // Strict mode and filters, which seccomp numbers from 0 on.
            mode @ (1 | 2) => restrict(call, mode - 1, call.rdx),
            _ => call.raw(),
        };
    }
    if call.rdi & 0xffff_ffff != PR_SET_CHILD_SUBREAPER || STATE.active.load(SeqCst) == 0 {
        return call.raw();
    }
    let mask = sys::block_signals();
    let locked = STATE.table.lock();
    // Before it is so: helpers of other programs look meanwhile.
    if call.rsi != 0 {
        put_sign();
    }
    let result = call.raw();
    if !is_subreaper() {
        take_sign();
    }
    drop(locked);
    sys::restore_signals(mask);
    result
}

fn put_sign() {
    const MFD_CLOEXEC: u64 = 1;
    if SIGN_AT.load(SeqCst) != 0 {
        return;
    }
    // SAFETY: makes a descriptor, which is closed below.
    let fd = unsafe { sys!(nr::MEMFD_CREATE, SIGN_NAME.as_ptr() as u64, MFD_CLOEXEC) };
    if failed(fd) {
        return;
    }
    // SAFETY: a free place of the kernel's choice.
    if let Ok(address) = unsafe { sys::mmap(0, PAGE, PROT_NONE, MAP_SHARED, fd as i32, 0) } {
        // SAFETY: a property of the mapping just made.
        unsafe { sys!(nr::MADVISE, address, PAGE, advice::DONTFORK) };
        SIGN_AT.store(address, SeqCst);
    }
    link::close(fd as i32);
}

fn take_sign() {
    let address = SIGN_AT.swap(0, SeqCst);
    if address != 0 {
        // SAFETY: the sign, which nobody reads.
        unsafe { sys!(nr::MUNMAP, address, PAGE) };
    }
}

/// In the process in the middle: waits until the helper may be adopted, or has ended. It must not be left behind while
/// it is still to find out whose child it would be.
pub(crate) fn let_go(helper: i64) {
    let until = sys::monotonic().saturating_add(DECIDED_WITHIN_NS);
    loop {
        let verdict = VERDICT.load(SeqCst);
        if verdict == GO || reap(helper, WNOHANG) {
            return;
        }
        let late = sys::monotonic() > until;
        if late && VERDICT.compare_exchange(verdict, DECLINED, SeqCst, SeqCst).is_ok() {
            // The broker is stopped, and its queue of callers full.
            // SAFETY: this process's own child.
            unsafe { sys!(nr::KILL, helper as u64, SIGKILL) };
            reap(helper, 0);
            return;
        }
        sys::futex_wait(&VERDICT, verdict, LOOK_NS);
    }
}

/// True once the helper has been reaped, or is not there.
fn reap(helper: i64, how: u64) -> bool {
    // SAFETY: no status is asked for.
    unsafe { sys!(nr::WAIT4, helper as u64, 0, WALL | how, 0) != 0 }
}

/// In the helper: calls the broker, finds out who would adopt it, and lets itself be adopted. `None` if it must leave.
pub(crate) fn be_adopted() -> Option<Link> {
    let link = Link::connect()?;
    let (middle, member) = (parent(), SETUP.member.load(SeqCst));
    let above = Above::of(member, link.peer());
    if VERDICT.load(SeqCst) == DECLINED || above.noticed {
        return decline(&link, member);
    }
    if VERDICT.compare_exchange(UNDECIDED, GO, SeqCst, SeqCst).is_err() {
        return None;
    }
    sys::futex_wake(&VERDICT);
    let until = sys::monotonic().saturating_add(ADOPTED_WITHIN_NS);
    while parent() == middle {
        if sys::monotonic() > until {
            return None;
        }
        sys::sleep_ns(PAUSE_NS);
    }
    if above.has(parent()) || parent() == member { decline(&link, member) } else { Some(link) }
}

/// Says to the broker that nobody comes for this program.
fn decline(link: &Link, member: u32) -> Option<Link> {
    let token = Token(STATE.token[0].load(SeqCst), STATE.token[1].load(SeqCst));
    link.send(Message::Declined { member, token }, None);
    None
}

fn parent() -> u32 {
    // SAFETY: reads an id.
    unsafe { sys!(nr::GETPPID) as u32 }
}

/// Who is above a program, up to its broker.
struct Above {
    /// None of these may have the helper. Empty if the broker is not above.
    between: [u32; DEPTH],
    count: usize,
    /// Somebody would adopt the helper and notice.
    noticed: bool,
}

impl Above {
    /// `broker` is 0 if it cannot be seen from here, being outside of this name space.
    fn of(member: u32, broker: u32) -> Self {
        let mut above = Self { between: [0; DEPTH], count: 0, noticed: broker == 0 };
        let mut next = parent_of(member);
        while let Some(process) = next.filter(|process| *process > 1 && *process != broker) {
            let Some(slot) = above.between.get_mut(above.count) else { break };
            *slot = process;
            above.count += 1;
            above.noticed |= has_sign(process);
            next = parent_of(process);
        }
        if next != Some(broker) {
            above.count = 0;
        }
        above
    }

    fn has(&self, process: u32) -> bool {
        self.between.iter().take(self.count).any(|between| *between == process)
    }
}

/// Opens a file in a process's directory in /proc.
fn open_of(process: u32, name: &[u8]) -> Option<i32> {
    const ROOT: &[u8] = b"/proc/";
    const DIGITS: usize = 10;
    let mut digits = [0_u8; DIGITS];
    let mut rest = process;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
    let number = digits.iter().skip(digits.iter().take(DIGITS - 1).take_while(|digit| **digit == b'0').count());
    let mut path = [0_u8; 40];
    // The last byte stays 0.
    let text = ROOT.iter().chain(number).chain(name);
    path.iter_mut().take(39).zip(text).for_each(|(to, from)| *to = *from);
    link::open(CStr::from_bytes_until_nul(&path).ok()?)
}

/// The parent of a process, 0 if it lies outside. `None` if it cannot be told.
fn parent_of(process: u32) -> Option<u32> {
    let fd = open_of(process, b"/stat")?;
    let mut text = [0_u8; 128];
    // SAFETY: the kernel writes into `text`.
    let got = unsafe { sys!(nr::PREAD64, fd as u64, text.as_mut_ptr() as u64, text.len() as u64, 0) };
    link::close(fd);
    let text = text.get(..usize::try_from(got).ok()?)?;
    // "PID (NAME) STATE PARENT ...": the name may hold anything.
    let state = text.iter().rposition(|byte| *byte == b')')? + 2;
    let digits = text.get(state + 2..)?.iter().take_while(|byte| byte.is_ascii_digit());
    Some(digits.fold(0, |sum: u32, digit| sum.wrapping_mul(10).wrapping_add(u32::from(digit - b'0'))))
}

/// True if a process shows the sign. What cannot be read shows none.
fn has_sign(process: u32) -> bool {
    const KEPT: usize = SIGN.len() - 1;
    let Some(fd) = open_of(process, b"/maps") else { return false };
    let mut buffer = [0_u8; 512];
    let (mut kept, mut position) = (0, 0_u64);
    let found = loop {
        let (at, room) = (buffer.as_mut_ptr() as u64 + kept as u64, (buffer.len() - kept) as u64);
        // SAFETY: the kernel writes into the rest of the buffer.
        let got = unsafe { sys!(nr::PREAD64, fd as u64, at, room, position) };
        if got <= 0 {
            break false;
        }
        position += got as u64;
        let filled = (kept + got as usize).min(buffer.len());
        if buffer[..filled].windows(SIGN.len()).any(|part| part == SIGN) {
            break true;
        }
        // The sign may lie across two reads.
        kept = filled.min(KEPT);
        buffer.copy_within(filled - kept..filled, 0);
    };
    link::close(fd);
    found
}
