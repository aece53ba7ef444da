//! What of a process is never managed whole, by reason: for the summary and for `pagefold doctor`.

use std::collections::BTreeMap;

use kernel::{Bytes, Pid, ProcError, Vaddr, VmaUse, status};
use store::mappings;

use crate::fitness::{unfit, unfit_whole};
use crate::layout::Layout;
use crate::scope::{is_worth_it, leaves_alone, thread_heads};

/// Anonymous memory in bytes, by the word that says why nobody manages it.
pub(crate) type ByReason = BTreeMap<&'static str, u64>;

/// What `run --scope all` would leave alone of a process as it is now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftAlone {
    /// Why nothing of it would be managed for now, or `None`: what it holds or how it is scheduled. What its code could do
    /// is another question.
    pub process: Option<&'static str>,
    /// Its anonymous memory, merged or not.
    pub anonymous: Bytes,
    /// What of it would never be managed, in bytes by reason.
    pub memory: BTreeMap<&'static str, u64>,
}

impl LeftAlone {
    /// Looks at a process. It need not be managed, and nothing is changed.
    ///
    /// # Errors
    /// Those of reading its mappings; above all that it has ended or is somebody else's.
    pub fn of(pid: Pid) -> Result<Self, ProcError> {
        let vmas = Layout::from_outside(pid).read()?;
        // Whoever cannot be asked for them has no thread's stack told from other memory.
        let heads = thread_heads(pid).unwrap_or_default();
        let uid = status::read(pid)?.uid.effective;
        let merged = vmas.iter().filter(|vma| mappings::is_segment(&vma.vma)).map(|vma| vma.memory.rss.get());
        let anonymous = vmas.iter().map(|vma| vma.memory.anonymous.get()).chain(merged).sum();
        Ok(Self {
            process: unfit(pid).or_else(|| unfit_whole(pid, uid)),
            anonymous: Bytes(anonymous),
            memory: by_reason(&vmas, &heads),
        })
    }
}

/// Sums up what is there of mappings that are not chosen. Merged memory is a mapping of the store.
pub(crate) fn by_reason(vmas: &[VmaUse], heads: &[Vaddr]) -> ByReason {
    let mut all = ByReason::new();
    for vma in vmas.iter().filter(|vma| !mappings::is_segment(&vma.vma) && vma.memory.anonymous.get() > 0) {
        let small = || (!is_worth_it(vma.vma.range)).then_some("small");
        if let Some(why) = leaves_alone(vma, heads).or_else(small) {
            *all.entry(why).or_default() += vma.memory.anonymous.get();
        }
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// A stack of the main thread, data of programs and libraries: every process has these.
    #[test]
    fn this_process_has_memory_that_is_left_alone() {
        let left = LeftAlone::of(Pid::this()).unwrap();
        assert!(left.memory["stack"] >= kernel::page_size() && left.memory["file"] >= kernel::page_size(), "{left:?}");
        assert!(left.anonymous.get() >= left.memory.values().sum(), "{left:?}");
    }

    #[test]
    fn who_has_ended_has_nothing() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid(i32::try_from(child.id()).unwrap());
        child.wait().unwrap();
        assert!(LeftAlone::of(pid).is_err());
    }
}
