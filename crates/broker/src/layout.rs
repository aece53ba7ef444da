//! A process's mappings as the broker judges them: smaps, and NUMA policies where there may be some.

use std::sync::atomic::Ordering::SeqCst;

use abi::control::policies;
use kernel::{Pid, ProcError, VmaUse, mempolicy, numa_maps, smaps};
use store::mappings;

use crate::member::Member;

/// Whose mappings are read, and with what.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pid: Pid,
    /// smaps does not show policies, and the file that does costs as much again. So it is read only where somebody may have
    /// set one.
    policies: bool,
    /// Where the broker chooses what is managed: what a program keeps out of core dumps is not looked at, also if it was
    /// chosen before it was kept out of them.
    pub(crate) whole: bool,
}

impl Layout {
    /// Of a member: its gate hears of every policy that the program asks for by libc. Where the gate came later, what was
    /// asked for before matters only if there is a choice of nodes.
    pub(crate) fn at(member: &Member) -> Self {
        let heard = member.control().policies.load(SeqCst);
        let policies = heard == policies::SET || heard == policies::UNHEARD && mempolicy::has_nodes();
        Self { pid: member.helper, policies, whole: false }
    }

    /// Of a process without a gate.
    pub(crate) fn from_outside(pid: Pid) -> Self {
        Self { pid, policies: mempolicy::has_nodes(), whole: false }
    }

    /// Reads them.
    pub(crate) fn read(self) -> Result<Vec<VmaUse>, ProcError> {
        let mut vmas = smaps::read(self.pid)?;
        if self.policies {
            numa_maps::mark(self.pid, &mut vmas)?;
        }
        Ok(vmas)
    }
}

/// Why a mapping must be left alone, or `None`.
pub(crate) fn refuses(vma: &VmaUse) -> Option<&'static str> {
    // A mapping of the store has no policy, and its pages lie where they lie.
    mappings::refuses(vma).or(vma.policy.then_some("numa_policy"))
}
