//! Does anybody hold a reference to a frozen page? The three ways in which the helper comes to know.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::check;
use abi::{BATCH_MAX, SCRATCH};
use merge::{Checked, FreezeKind};

use crate::filter;
use crate::space::Space;
use crate::sys::{self, advice, errno, nr, sys};

/// How long the broker may take to answer a reference check while pages are frozen.
const CHECK_WITHIN_NS: u64 = 1_000_000;
/// How often the answer is looked for before the helper sleeps on it.
const CHECK_SPINS: u32 = 2_000;

impl Space {
    pub(crate) fn ask_broker(&self, kind: FreezeKind, refs: &mut [u32]) -> Checked {
        let question = &self.control.check;
        question.count.store(refs.len() as u32, SeqCst);
        question.address.store(self.slot(kind, 0), SeqCst);
        question.state.store(check::ASKED, SeqCst);
        sys::futex_wake(&question.state);
        let deadline = sys::monotonic() + CHECK_WITHIN_NS;
        let mut spins = 0;
        loop {
            let state = question.state.load(SeqCst);
            if state == check::ANSWERED {
                break;
            }
            spins += 1;
            if spins < CHECK_SPINS {
                core::hint::spin_loop();
                continue;
            }
            let now = sys::monotonic();
            if now >= deadline {
                // Whoever is writing the answer at this moment finds the question withdrawn.
                question.state.store(check::IDLE, SeqCst);
                self.control.counters.check_timeouts.fetch_add(1, SeqCst);
                return Checked::Unknown;
            }
            let result = sys::futex_wait(&question.state, state, deadline - now);
            if result != 0 && ![-errno::EAGAIN, -errno::EINTR, -errno::ETIMEDOUT].contains(&result) {
                question.state.store(check::IDLE, SeqCst);
                return Checked::Unknown;
            }
        }
        for (count, answer) in refs.iter_mut().zip(&question.refs) {
            *count = answer.load(SeqCst);
        }
        question.state.store(check::IDLE, SeqCst);
        Checked::Counted
    }

    /// Has the references counted by the kernel itself, in this call. `None` if it does not do that here.
    pub(crate) fn count(&self, kind: FreezeKind, refs: &mut [u32]) -> Option<Checked> {
        let program = self.counts?;
        let mut counts = [0_u64; 1 + BATCH_MAX];
        counts[0] = match kind {
            FreezeKind::Move => 0,
            FreezeKind::Remap => 1,
        };
        // union bpf_attr: prog_fd at 0, ctx_size_in at 40, ctx_in at 48.
        let mut attributes = [0_u64; 16];
        attributes[0] = program as u64;
        attributes[5] = size_of_val(&counts) as u64;
        attributes[6] = counts.as_mut_ptr() as u64;
        let (command, size) = (u64::from(filter::BPF_PROG_TEST_RUN), size_of_val(&attributes) as u64);
        // SAFETY: runs a loaded program; the kernel reads the attributes, and reads and writes the counts.
        if unsafe { sys!(nr::BPF, command, attributes.as_mut_ptr() as u64, size) } != 0 {
            return None;
        }
        for (slot, count) in refs.iter_mut().zip(&counts[1..]) {
            *slot = *count as u32;
        }
        Some(Checked::Counted)
    }

    /// MADV_COLLAPSE of the scratch area: the scan stops with EBUSY at the hole behind the pages if nobody holds any
    /// of them, and with EAGAIN at the first page that somebody holds.
    pub(crate) fn ask_collapse(&self) -> Checked {
        // SAFETY: the scratch area is the agent's; the scan changes nothing since it always meets the hole.
        match unsafe { sys!(nr::MADVISE, self.scratch, SCRATCH, advice::COLLAPSE) } {
            result if result == -errno::EBUSY => Checked::AllFree,
            result if result == -errno::EAGAIN => Checked::SomeHeld,
            _ => Checked::Unknown,
        }
    }
}
