//! What whoever looks from outside is told: why there is no gate, or no helper. See [`abi::told`].

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use abi::told::{self, Told, helper};

use crate::elf::{for_each_mapping, known};
use crate::state::{STATE, Start};
use crate::sys::{nr, sys};

/// Kept whole, with what it begins with: it is found by that.
#[used]
static TOLD: Told =
    Told { magic: told::MAGIC, start: AtomicU32::new(told::start::NOTHING), helper: AtomicU32::new(helper::MAY_COME) };

/// The table of sites could not be read.
pub(crate) fn no_table() {
    TOLD.start.store(told::start::NO_TABLE, SeqCst);
}

/// What came of setting up the gate with these sites. What was against it is looked up again: only now does it matter.
pub(crate) fn started(outcome: Start, sites: &[u8]) {
    let start = match outcome {
        Start::Ready | Start::Twice => told::start::READY,
        Start::UnknownLibc => match objects(sites) {
            0 | 1 => told::start::UNKNOWN_LIBC,
            2 => told::start::CHANGED_CODE,
            _ => told::start::SECOND_LIBC,
        },
        Start::PatchFailed if denies_new_code() => told::start::DENIED,
        Start::PatchFailed => told::start::PATCH_FAILED,
        Start::KernelLacks => told::start::KERNEL_LACKS,
    };
    TOLD.start.store(start, SeqCst);
}

/// Why no helper comes.
pub(crate) fn no_helper(why: u32) {
    // Called again and again: a store to a page that is copied would cost memory.
    if TOLD.helper.load(SeqCst) != why {
        TOLD.helper.store(why, SeqCst);
    }
}

/// How many of libc and the loader are mapped: two, unless something is wrong.
fn objects(sites: &[u8]) -> u32 {
    let mut count = 0;
    let read = for_each_mapping(|line| count += u32::from(known(&line, sites).is_some()));
    if read { count } else { 0 }
}

fn denies_new_code() -> bool {
    const PR_GET_MDWE: u64 = 66;
    // Not asked where asking may be deadly.
    // SAFETY: asks about a setting of this process.
    !STATE.has_filters() && unsafe { sys!(nr::PRCTL, PR_GET_MDWE, 0, 0, 0, 0) } > 0
}
