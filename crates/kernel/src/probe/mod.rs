//! What this kernel and this user's rights allow, found out by trying each thing once.
//!
//! Versions are never looked at: distributions carry features over, and rights decide as much. What fails in the way
//! that means "this kernel has it not" or "this user may not" is [`State::No`] with the way to get it; what fails in any
//! other way is [`State::Unknown`] with what the kernel said, because it may well be our mistake.

use serde::Serialize;
use thiserror::Error;

mod trials;

/// One thing that can be there or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Name {
    /// A /proc that shows this process's own PID namespace.
    OwnProc,
    /// A userfaultfd that also catches faults in system calls.
    Userfaultfd,
    /// /dev/userfaultfd can be opened, so descriptors of it can be handed to members.
    UserfaultfdDevice,
    /// UFFDIO_MOVE.
    UffdMove,
    /// MINOR registration of shared memory.
    UffdMinorShmem,
    /// Asynchronous write protection.
    UffdWpAsync,
    /// Fork events.
    UffdEventFork,
    /// PAGEMAP_SCAN.
    PagemapScan,
    /// PROCMAP_QUERY.
    ProcmapQuery,
    /// MADV_POPULATE_WRITE.
    MadvPopulateWrite,
    /// Sealed memory files.
    MemfdSeals,
    /// pidfd_getfd.
    PidfdGetfd,
    /// A pidfd of the other end of a socket.
    PeerPidfd,
    /// kcmp.
    Kcmp,
    /// Page frame numbers in pagemap.
    PageFrameNumbers,
    /// Exact reference counts by a BPF program.
    CheckBpf,
    /// Reference check by MADV_COLLAPSE.
    CheckCollapse,
    /// SCHED_FIFO for a thread.
    SchedFifo,
    /// Pressure stall information.
    Pressure,
    /// KSM in this kernel.
    Ksm,
    /// KSM's settings can be written.
    KsmWritable,
    /// Merging for a whole process by prctl.
    KsmPrctl,
    /// KSM's trace events.
    KsmTracing,
    /// Transparent huge pages.
    TransparentHugepage,
    /// The limit of mappings of a process.
    MaxMapCount,
    /// Reading and attaching to other processes of the same user.
    Ptrace,
    /// System calls run in other processes.
    Injection,
}

/// Whether it is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// It works.
    Yes {
        /// A setting or the way in which it works, empty if there is nothing to say.
        detail: String,
    },
    /// It does not.
    No {
        /// Why.
        reason: String,
        /// How to get it.
        remedy: String,
    },
    /// It could not be found out.
    Unknown {
        /// What the kernel said.
        reason: String,
        /// What may help, empty if nobody knows.
        #[serde(skip_serializing_if = "String::is_empty")]
        remedy: String,
    },
}

/// One line of the probe's report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// What.
    pub name: Name,
    /// Whether it is there.
    #[serde(flatten)]
    pub state: State,
    /// What it is needed for.
    pub needed_for: &'static str,
}

impl Feature {
    /// True if it works.
    #[must_use]
    pub const fn works(&self) -> bool {
        matches!(self.state, State::Yes { .. })
    }
}

/// The one missing thing, and how to get it.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{what} {}: {reason}", if *tried { "is missing" } else { "could not be tried" })]
pub struct Missing {
    /// What.
    pub what: &'static str,
    /// False if it may be there for all that is known.
    pub tried: bool,
    /// Why.
    pub reason: String,
    /// How to get it, empty if nobody knows.
    pub remedy: String,
}

/// How references to frozen pages can be checked here, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExactCheck {
    /// By a BPF program: exact, cheap, for all pages.
    Bpf,
    /// By MADV_COLLAPSE: exact, slow on busy machines, not for pages of store mappings.
    Collapse,
}

/// All features, in an order that does not change.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Features {
    list: Vec<Feature>,
}

impl Features {
    /// Tries everything. Takes some tens of milliseconds; a program does it once.
    #[must_use]
    pub fn probe() -> Self {
        Self { list: trials::all() }
    }

    /// All features, for a table or a document.
    #[must_use]
    pub fn list(&self) -> &[Feature] {
        &self.list
    }

    /// One feature; `None` only if a later version of this enum names more than was tried.
    #[must_use]
    pub fn get(&self, name: Name) -> Option<&Feature> {
        self.list.iter().find(|feature| feature.name == name)
    }

    /// True if a feature works.
    #[must_use]
    pub fn has(&self, name: Name) -> bool {
        self.get(name).is_some_and(Feature::works)
    }

    /// Ok if a feature works.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn require(&self, name: Name) -> Result<(), Missing> {
        let what = name.text();
        match self.get(name).map(|feature| &feature.state) {
            Some(State::Yes { .. }) => Ok(()),
            Some(State::No { reason, remedy }) => {
                Err(Missing { what, tried: true, reason: reason.clone(), remedy: remedy.clone() })
            }
            Some(State::Unknown { reason, remedy }) => {
                Err(Missing { what, tried: false, reason: reason.clone(), remedy: remedy.clone() })
            }
            None => {
                Err(Missing { what, tried: false, reason: "this version does not".to_owned(), remedy: String::new() })
            }
        }
    }

    /// Can pages of running processes be replaced by pages of a store?
    ///
    /// # Errors
    /// The first thing that is [`Missing`]. The reference check is apart: [`Features::exact_check`].
    pub fn live_merge(&self) -> Result<(), Missing> {
        for name in [Name::OwnProc, Name::MemfdSeals, Name::Userfaultfd, Name::UffdMove, Name::ProcmapQuery] {
            self.require(name)?;
        }
        Ok(())
    }

    /// Can memory at rest be replaced by pages of a store, in its owner's own thread?
    ///
    /// # Errors
    /// [`Missing`].
    pub fn rest_merge(&self) -> Result<(), Missing> {
        self.require(Name::OwnProc)?;
        self.require(Name::MemfdSeals)
    }

    /// How can references to frozen pages be checked?
    ///
    /// # Errors
    /// [`Missing`] if there is no way; then only an owner's word helps.
    pub fn exact_check(&self) -> Result<ExactCheck, Missing> {
        if self.has(Name::CheckBpf) {
            return Ok(ExactCheck::Bpf);
        }
        self.require(Name::CheckCollapse).map(|()| ExactCheck::Collapse)
    }

    /// Can merged pages that were written be merged again?
    ///
    /// # Errors
    /// The first thing that is [`Missing`].
    pub fn retake(&self) -> Result<(), Missing> {
        self.live_merge()?;
        self.require(Name::UffdMinorShmem)?;
        self.require(Name::CheckBpf)
    }

    /// Can writes to the pages of running processes be tracked?
    ///
    /// # Errors
    /// The first thing that is [`Missing`].
    pub fn write_tracking(&self) -> Result<(), Missing> {
        self.require(Name::UffdWpAsync)?;
        self.require(Name::PagemapScan)
    }

    /// Can a fork in the middle of a batch be served?
    ///
    /// # Errors
    /// [`Missing`]; then only programs proven free of raw forks can be merged.
    pub fn fork_events(&self) -> Result<(), Missing> {
        self.require(Name::UffdEventFork)
    }

    /// Can the kernel's KSM be driven?
    ///
    /// # Errors
    /// The first thing that is [`Missing`].
    pub fn drive_ksm(&self) -> Result<(), Missing> {
        self.require(Name::OwnProc)?;
        self.require(Name::Ksm)?;
        self.require(Name::KsmWritable)
    }
}

impl Name {
    /// In words, as tables show it.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::OwnProc => "/proc",
            Self::Userfaultfd => "userfaultfd",
            Self::UserfaultfdDevice => "/dev/userfaultfd",
            Self::UffdMove => "UFFDIO_MOVE",
            Self::UffdMinorShmem => "userfaultfd MINOR on shared memory",
            Self::UffdWpAsync => "userfaultfd WP_ASYNC",
            Self::UffdEventFork => "userfaultfd fork events",
            Self::PagemapScan => "PAGEMAP_SCAN",
            Self::ProcmapQuery => "PROCMAP_QUERY",
            Self::MadvPopulateWrite => "MADV_POPULATE_WRITE",
            Self::MemfdSeals => "sealed memory files",
            Self::PidfdGetfd => "pidfd_getfd",
            Self::PeerPidfd => "SO_PEERPIDFD",
            Self::Kcmp => "kcmp",
            Self::PageFrameNumbers => "page frame numbers",
            Self::CheckBpf => "reference check by BPF",
            Self::CheckCollapse => "reference check by MADV_COLLAPSE",
            Self::SchedFifo => "SCHED_FIFO",
            Self::Pressure => "pressure stall information",
            Self::Ksm => "KSM",
            Self::KsmWritable => "KSM settings",
            Self::KsmPrctl => "PR_SET_MEMORY_MERGE",
            Self::KsmTracing => "KSM trace events",
            Self::TransparentHugepage => "transparent huge pages",
            Self::MaxMapCount => "vm.max_map_count",
            Self::Ptrace => "access to other processes",
            Self::Injection => "injecting system calls",
        }
    }

    const fn needed_for(self) -> &'static str {
        match self {
            Self::OwnProc => "everything: what processes hold is read there",
            Self::Userfaultfd | Self::UffdMove | Self::MemfdSeals | Self::ProcmapQuery => {
                "merging in running processes (store)"
            }
            Self::UserfaultfdDevice => "merging in processes of other users (store)",
            Self::UffdMinorShmem => "merging pages again that were written (store)",
            Self::UffdWpAsync | Self::PagemapScan => "leaving written pages alone, keeping merged",
            Self::UffdEventFork => "programs that fork by raw system calls (store)",
            Self::MadvPopulateWrite => "processes that have forked (store)",
            Self::PidfdGetfd => "processes that did not start under pagefold",
            Self::PeerPidfd => "knowing members beyond doubt",
            Self::Kcmp => "counting shared address spaces once",
            Self::PageFrameNumbers => "exact figures of what is shared already, the check by BPF",
            Self::CheckBpf => "safe merging while other threads run (store)",
            Self::CheckCollapse => "safe merging without privilege (store)",
            Self::SchedFifo => "short waits on busy machines",
            Self::Pressure => "standing back when the machine is busy",
            Self::Ksm | Self::KsmWritable | Self::KsmPrctl => "the ksm backend",
            Self::KsmTracing => "ksm trace",
            Self::TransparentHugepage => "the check by MADV_COLLAPSE; splitting costs",
            Self::MaxMapCount => "how many separate runs a process can have merged",
            Self::Ptrace => "eval, merge --pid",
            Self::Injection => "enable and disable on running processes",
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::{as_nobody, started_by_a_test};

    fn features(missing: &[Name]) -> Features {
        let list = trials::NAMES.map(|name| {
            let state = if missing.contains(&name) {
                State::No { reason: "a test".to_owned(), remedy: "end the test".to_owned() }
            } else {
                State::Yes { detail: String::new() }
            };
            Feature { name, state, needed_for: name.needed_for() }
        });
        Features { list: list.to_vec() }
    }

    #[test]
    fn the_best_check_is_chosen_and_the_missing_thing_is_named() {
        assert_eq!(features(&[]).exact_check().unwrap(), ExactCheck::Bpf);
        assert_eq!(features(&[Name::CheckBpf]).exact_check().unwrap(), ExactCheck::Collapse);
        let none = features(&[Name::CheckBpf, Name::CheckCollapse]).exact_check().unwrap_err();
        assert_eq!(none.to_string(), "reference check by MADV_COLLAPSE is missing: a test");
        assert_eq!(features(&[Name::UffdMove]).live_merge().unwrap_err().what, "UFFDIO_MOVE");
        // The helper looks at mappings in no other way.
        assert_eq!(features(&[Name::ProcmapQuery]).live_merge().unwrap_err().what, "PROCMAP_QUERY");
        assert_eq!(features(&[Name::CheckBpf]).retake().unwrap_err().what, "reference check by BPF");
        assert!(features(&[Name::Ksm]).live_merge().is_ok());
        assert!(features(&[Name::UffdMove, Name::PagemapScan]).rest_merge().is_ok());
        let blind = features(&[Name::OwnProc]);
        for verdict in [blind.live_merge(), blind.rest_merge(), blind.drive_ksm()] {
            assert_eq!(verdict.unwrap_err().what, "/proc");
        }
    }

    #[test]
    fn what_could_not_be_tried_is_not_called_missing() {
        let scarce = std::io::Error::from_raw_os_error(libc::EMFILE);
        let mut found = features(&[]);
        found.list.retain(|feature| feature.name != Name::MemfdSeals);
        let state = trials::unknown(&crate::MemfdError::Create { size: crate::Bytes(4096), source: scarce });
        found.list.push(Feature { name: Name::MemfdSeals, state, needed_for: "" });
        let missing = found.live_merge().unwrap_err();
        assert!(missing.to_string().starts_with("sealed memory files could not be tried: "), "{missing}");
        assert!(missing.to_string().contains("Too many open files") && missing.remedy.contains("ulimit -n"));
    }

    #[test]
    fn everything_is_tried_once_and_root_has_most() {
        let found = Features::probe();
        for name in trials::NAMES {
            assert_eq!(found.list().iter().filter(|feature| feature.name == name).count(), 1, "{name:?}");
            println!("{:?}", found.get(name).unwrap());
        }
        assert!(found.has(Name::OwnProc) && found.has(Name::MemfdSeals) && found.has(Name::MaxMapCount));
        assert_eq!(found.has(Name::CheckBpf), crate::BpfCheck::new().is_ok());
        for feature in found.list() {
            assert!(!matches!(feature.state, State::Unknown { .. }), "{feature:?}");
        }
        let document = serde_json::to_value(&found).unwrap();
        assert_eq!(document[0]["name"], "own_proc");
        assert!(document[0]["state"] == "yes" || document[0]["state"] == "no");
    }

    #[test]
    fn nobody_has_less_and_is_told_how_to_get_it() {
        if !as_nobody("probe::tests::body_as_nobody") {
            println!("skipped: root, or a test binary that everybody may execute");
        }
    }

    #[test]
    #[ignore = "runs as another user, started by the test above"]
    fn body_as_nobody() {
        if !started_by_a_test() {
            return;
        }
        let found = Features::probe();
        for feature in found.list() {
            assert!(!matches!(feature.state, State::Unknown { .. }), "{feature:?}");
            if let State::No { reason, remedy } = &feature.state {
                assert!(!reason.is_empty() && !remedy.is_empty(), "{feature:?}");
            }
        }
        for name in [Name::PageFrameNumbers, Name::CheckBpf, Name::KsmWritable, Name::SchedFifo, Name::UffdEventFork] {
            assert!(!found.has(name), "{name:?}");
        }
        assert!(found.retake().is_err() && found.drive_ksm().is_err());
    }
}
