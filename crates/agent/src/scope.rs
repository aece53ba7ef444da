//! `--scope all`: the broker chooses what is managed, in a program that has handed nothing over.
//!
//! Whoever hands a range over knows what its other threads do to it meanwhile. Here nobody does, so three things are
//! otherwise than for ranges that were handed over:
//!
//! * **Every** call that changes mappings passes the gate as a reader, whether it touches managed memory or not. A call
//!   that was looked at before a range came under management, and made afterwards, would be made past the gate: a
//!   DONTNEED would then uncover the store's content. The helper adopts with the gate closed, so no call is in between.
//! * The helper starts by itself ([`begin_if_due`]): at the first call through the gate that the program makes once it
//!   has lived for a second, or has asked for some memory. What ends before that never pays for a helper. A child of fork
//!   is as young as any other process; until it is old enough it has the marks that it was born with, and the gate puts
//!   plain memory where that is needed. A helper is never started by a vfork child, whose memory is its parent's.
//! * Code that comes later could change mappings by itself. Before it is mapped the broker is asked ([`admit`]). If the
//!   answer is no, or there is none, everything gets its own pages back first, and nothing is merged any more. The program
//!   always gets its code, unless its memory could not be given back.
//!
//! Adopting, judging and asking need a helper: before there is one, calls hold the table's lock, and who starts the helper
//! holds it too. So the broker, which judges a program after its helper has come, sees all code of calls that were not
//! asked about.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use abi::control::{Control, code, stop};
use abi::told::helper;

use abi::mark::Mark;

use crate::ask::{HELPERS, bring_helper, end_turn, is_served, served, take_turn};
use crate::calls::{Registers, USER_END, known, publish, reach, unmerge_all};
use crate::gate;
use crate::plain::once_plain;
use crate::space::Space;
use crate::spawn;
use crate::state::{STATE, unwilling};
use crate::sys::{self, MAP_ANONYMOUS, PROT_EXEC, PROT_WRITE, advice, errno, failed, nr, sys};
use crate::table::Table;
use crate::told;

/// What lives shorter than this is not managed.
const YOUNG_NS: u64 = 1_000_000_000;
/// Bytes that a program asks for after which it is managed however young it is: merging them is worth a helper.
const LARGE: u64 = 8 << 20;
/// For how long a thread waits to hear whether code may come. A file that nobody has judged yet takes some milliseconds.
const ADMITTED_WITHIN_NS: u64 = 1_000_000_000;
const LOOK_NS: u64 = 50_000_000;
const SHM_EXEC: u64 = 0o100000;
const RLIMIT_DATA: u64 = 2;
const RLIMIT_AS: u64 = 9;

/// The process that this address space belongs to; a vfork child is another.
static OWNER: AtomicU32 = AtomicU32::new(0);
/// When it began.
static BORN: AtomicU64 = AtomicU64::new(0);
/// Bytes of memory that it has asked for since, roughly: nobody has to be exact.
static ASKED_FOR: AtomicU64 = AtomicU64::new(0);
/// Helpers that were killed and replaced.
static KILLED: AtomicU32 = AtomicU32::new(0);
/// From then on each takes as long as the one before: half a minute.
const KILLED_MAX: u32 = 5;

/// Counts the files with code that have come since the agent began: from 1 on, once before each is mapped and once after.
static FILES: AtomicU32 = AtomicU32::new(1);
/// [`FILES`] when the broker was asked that has admitted code which the program writes; 0 before that. A file that has come
/// since may be an engine of its own.
static MAY_COMPILE: AtomicU32 = AtomicU32::new(0);
/// Not 0 once everything has its own pages because of code that nobody knows. Nothing is merged after that.
static LEFT_TO_CODE: AtomicU32 = AtomicU32::new(0);

/// Where code comes from.
enum Source {
    /// A file, by its descriptor.
    File(u32),
    /// Memory that the program writes.
    Memory,
    /// A file that it can write to while it is executed: what is in it now says nothing.
    Changing,
}

/// At the program's start, and in a copy of its memory made by fork.
pub(crate) fn begin_anew() {
    OWNER.store(sys::getpid(), SeqCst);
    BORN.store(sys::monotonic(), SeqCst);
    ASKED_FOR.store(0, SeqCst);
    KILLED.store(0, SeqCst);
}

/// False in a vfork child, which runs in its parent's memory.
pub(crate) fn is_own() -> bool {
    OWNER.load(SeqCst) == sys::getpid()
}

/// A call through the gate of a program whose memory the broker chooses from.
pub(crate) fn handle(call: &Registers) -> i64 {
    let code = brings_code(call);
    let may_come = code.as_ref().is_none_or(admit);
    if !may_come || call.rax == nr::IO_URING_SETUP && !leave_to_ring() {
        return -errno::ENOMEM;
    }
    if call.rax == nr::MADVISE && call.rdx & 0xffff_ffff == advice::DONTDUMP {
        // Not to be dumped is what programs say of their keys.
        if let Some((start, end)) = reach(call.rdi, call.rsi).filter(|(start, end)| STATE.table.overlaps(*start, *end))
        {
            let _ = leave_alone(start, end);
        }
    }
    let result = known(call);
    if matches!(code, Some(Source::File(_))) {
        // Whoever was asked about memory meanwhile has not seen it.
        FILES.fetch_add(1, SeqCst);
    }
    if !failed(result) {
        count(call);
    }
    begin_if_due();
    result
}

/// Gives a range its own pages back, and has it stay managed without being merged again: what was merged consists of several
/// mappings, which the program takes for one, and the gate has to move them when it does. `false` if others hold pages.
fn leave_alone(start: u64, end: u64) -> bool {
    once_plain(start, end, |_| STATE.table.set(start, end, Mark::EXCLUDED)).is_some()
}

/// Makes a call that touches nothing managed. Where the broker chooses it is made as a reader of the gate, so that nothing
/// of its ranges comes under management meanwhile; if something has since the call was looked at, that is looked at anew.
pub(crate) fn past(call: &Registers, ranges: [Option<(u64, u64)>; 2]) -> i64 {
    if STATE.all.load(SeqCst) == 0 {
        return call.raw();
    }
    let mask = sys::block_signals();
    let (reader, locked) = STATE.enter();
    let managed = ranges.iter().flatten().any(|(start, end)| STATE.table.overlaps(*start, *end));
    let result = if managed {
        None
    } else if reader.is_some() {
        drop(locked);
        Some(call.raw())
    } else {
        let result = call.raw();
        drop(locked);
        Some(result)
    };
    drop(reader);
    sys::restore_signals(mask);
    result.unwrap_or_else(|| known(call))
}

fn count(call: &Registers) {
    static HEAP: AtomicU64 = AtomicU64::new(0);
    let bytes = match call.rax {
        nr::MMAP if call.r10 & MAP_ANONYMOUS != 0 => call.rsi,
        nr::BRK if call.rdi != 0 => {
            let before = HEAP.swap(call.rdi, SeqCst);
            if before == 0 { 0 } else { call.rdi.saturating_sub(before) }
        }
        _ => return,
    };
    ASKED_FOR.fetch_add(bytes.min(LARGE), SeqCst);
}

/// Starts the helper if there is none and it is time. Whatever keeps it from coming is not tried again. One that was killed
/// is replaced as a program gets its first one, and each next one later than the one before: whatever kills them may go on.
fn begin_if_due() {
    let said = |word: &AtomicU32| word.load(SeqCst) != 0;
    let (stopped, restricted) = (said(&STATE.early_stop), said(&STATE.restricted));
    let killed = spawn::helper_was_killed();
    if STATE.control().is_none() && (stopped || restricted) {
        told::no_helper(if restricted { helper::RESTRICTED } else { helper::STOPPED });
    }
    if said(&STATE.unwilling) || stopped || restricted || STATE.control().is_some() && !killed {
        return;
    }
    let times = KILLED.load(SeqCst).min(KILLED_MAX);
    let asked_for = times == 0 && ASKED_FOR.load(SeqCst) >= LARGE;
    let due = asked_for || sys::monotonic().wrapping_sub(BORN.load(SeqCst)) >= YOUNG_NS << times;
    if !due || !is_own() {
        return;
    }
    // What the helper reserves would be missing to a program that has been given just so much.
    if [RLIMIT_AS, RLIMIT_DATA].into_iter().any(is_limited) {
        STATE.unwilling.store(unwilling::HERE, SeqCst);
        told::no_helper(helper::LIMITED);
        return;
    }
    if bring_helper(Table::try_lock) && killed {
        KILLED.fetch_add(1, SeqCst);
        BORN.store(sys::monotonic(), SeqCst);
    }
}

fn is_limited(resource: u64) -> bool {
    const NONE: u64 = u64::MAX;
    let mut limit = [0_u64; 2];
    // SAFETY: the kernel writes the limits of this process.
    let known = unsafe { sys!(nr::PRLIMIT64, 0, resource, 0, limit.as_mut_ptr() as u64) } == 0;
    !known || limit[0] != NONE
}

/// The code that a call brings into the process, if it does.
fn brings_code(call: &Registers) -> Option<Source> {
    match call.rax {
        nr::MMAP if call.rdx & PROT_EXEC != 0 && call.r10 & MAP_ANONYMOUS == 0 => {
            let file = Source::File(call.r8 as u32);
            Some(if call.rdx & PROT_WRITE != 0 { Source::Changing } else { file })
        }
        nr::MMAP | nr::MPROTECT | nr::PKEY_MPROTECT if call.rdx & PROT_EXEC != 0 => Some(Source::Memory),
        nr::SHMAT if call.rdx & SHM_EXEC != 0 => Some(Source::Memory),
        _ => None,
    }
}

/// A ring can discard memory past the gate: before there is one everything gets its own pages back, and nothing is merged
/// any more. `false` if that could not be had.
fn leave_to_ring() -> bool {
    STATE.stop(stop::IO_URING);
    unmerge_all()
}

/// Asks whether code may come. If nobody says yes, nothing is merged any more when this returns true; with false that
/// could not be had.
fn admit(source: &Source) -> bool {
    if STATE.control().is_none() && STATE.table.next_merged(0, USER_END).is_none() {
        // The broker judges what it finds once the helper has come.
        return true;
    }
    if STATE.early_stop.load(SeqCst) & stop::UNKNOWN_CODE != 0 {
        // It was refused before if what was merged then could not be given back, and still cannot be.
        return LEFT_TO_CODE.load(SeqCst) != 0 || leave_to_code();
    }
    let files = match source {
        Source::File(_) => FILES.fetch_add(1, SeqCst),
        Source::Memory if MAY_COMPILE.load(SeqCst) == FILES.load(SeqCst) => return true,
        Source::Memory => FILES.load(SeqCst),
        Source::Changing => return leave_to_code(),
    };
    for _ in 0..HELPERS {
        let Some(control) = served() else { break };
        if ask(control, source) {
            // An engine that may compile may go on to: each new piece of code would ask for itself.
            if matches!(source, Source::Memory) {
                MAY_COMPILE.store(files, SeqCst);
            }
            return true;
        }
        if is_served(control) {
            break;
        }
    }
    leave_to_code()
}

/// Code comes that nobody has admitted: before it is there everything gets its own pages back, and nothing is merged any
/// more. `false` if that could not be had.
fn leave_to_code() -> bool {
    STATE.stop(stop::UNKNOWN_CODE);
    let plain = unmerge_all();
    LEFT_TO_CODE.fetch_or(u32::from(plain), SeqCst);
    plain
}

fn ask(control: &Control, source: &Source) -> bool {
    let question = &control.code;
    let tid = sys::gettid();
    let until = sys::monotonic().saturating_add(ADMITTED_WITHIN_NS);
    let goes_on = || is_served(control) && sys::monotonic() <= until;
    // A signal handler of the thread that asks may map code too; it is told no.
    if !take_turn(&question.owner, |owner| owner != tid && goes_on()) {
        return false;
    }
    let fd = if let Source::File(fd) = source { *fd } else { code::NO_FILE };
    question.fd.store(fd, SeqCst);
    question.state.store(code::ASKED, SeqCst);
    sys::futex_wake(&question.state);
    let admitted = loop {
        match question.state.load(SeqCst) {
            code::ADMITTED => break true,
            code::ASKED if goes_on() => {
                sys::futex_wait(&question.state, code::ASKED, LOOK_NS);
            }
            _ => break false,
        }
    };
    question.state.store(code::IDLE, SeqCst);
    end_turn(&question.owner);
    admitted
}

/// In the helper: puts memory under management that the broker has chosen, if it still is what the broker has seen. With
/// the gate closed no call is under way that was looked at before.
pub(crate) fn adopt(space: &mut Space, start: u64, end: u64) {
    let pages = start < end && start.is_multiple_of(sys::PAGE) && end.is_multiple_of(sys::PAGE);
    if !pages || STATE.all.load(SeqCst) == 0 {
        return;
    }
    gate::while_closed(space.control, |control| {
        // Whoever holds the lock without being inside starts a helper, or is a child subreaper's sign.
        let Some(locked) = STATE.table.try_lock() else { return };
        if control.stop.load(SeqCst) == 0 && space.is_plain(start, end) {
            locked.adopt_reserved(start, end);
        }
        STATE.layout_changes();
        publish();
    });
}
