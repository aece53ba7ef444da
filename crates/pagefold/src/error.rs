//! Everything that can keep a program from merging, each with the way out.

use abi::control::RANGES_MAX;
use broker::{BrokerError, ClientError, RefusedKind};
use kernel::{AgentImageError, MemfdError, ProcError, Range, StartFailure, Vaddr};

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No broker could be started in this process.
    #[error("cannot serve a partition")]
    Serve(#[source] BrokerError),
    /// The partition's descriptor could not be made.
    #[error("cannot make a partition's descriptor")]
    Descriptor(#[source] MemfdError),
    /// The descriptor is something else.
    #[error("the descriptor is no partition's: pass on what `Partition::as_fd` gives")]
    NotAPartition,
    /// The process that serves the partition has ended.
    #[error(
        "the process that serves this partition has ended, or runs in another network namespace; \
         what is merged stays merged, nothing new is: open a new partition"
    )]
    Ended,
    /// The broker did not let this process in.
    #[error("the partition's broker did not let this process in: it must run as the same user and the same build")]
    Rejected,
    /// The connection to the broker failed.
    #[error("the connection to the partition's broker failed")]
    Connection(#[source] ClientError),
    /// The process runs under `pagefold run`, or has another copy of this library.
    #[error(
        "this process has an agent already, brought by {by}: hand ranges over with madvise(MADV_MERGEABLE) \
         instead, or start the program without it"
    )]
    AgentPresent {
        /// Who brought it.
        by: &'static str,
    },
    /// The process merges in another partition already.
    #[error(
        "this process merges in another partition already, and can be in one at a time: call leave on that one, \
         and unmap what could not be given back"
    )]
    OtherPartition,
    /// This machine's C library is not known.
    #[error(
        "the C library of this process is not understood ({reason}), so no gate can be set up: \
         merge_quiescent needs one too; use kernel KSM (`pagefold run --backend ksm`)"
    )]
    UnknownLibc {
        /// What is wrong with it.
        reason: String,
    },
    /// The agent could not be loaded.
    #[error("cannot load the agent: a statically linked program cannot, nor one under vm.memfd_noexec=2")]
    Load(#[source] AgentImageError),
    /// This process's mappings could not be read.
    #[error("cannot read which memory this process has")]
    Mappings(#[source] ProcError),
    /// A range is not throughout private memory of the program's: its length is wrong, or its address.
    #[error("cannot merge {range}: at {address} there is {what}")]
    NotMergeable {
        /// The range.
        range: Range,
        /// The first address of it that cannot be merged.
        address: Vaddr,
        /// What is there.
        what: &'static str,
    },
    /// No helper could be started.
    #[error(
        "cannot start the helper for {range}: out of processes or memory, or the program filters its own system calls \
         (seccomp)"
    )]
    NoHelper {
        /// The range that was to be handed over.
        range: Range,
    },
    /// The process may not use userfaultfd.
    #[error(
        "userfaultfd is not to be had here: let the user open /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1, \
         or use merge_quiescent, which needs none"
    )]
    NoUserfault,
    /// The kernel's userfaultfd cannot move pages.
    #[error("this kernel's userfaultfd cannot move pages (Linux 6.8 can): use merge_quiescent, which needs none")]
    NoMove,
    /// The broker may not read this process's memory.
    #[error("{reason}")]
    Unreadable {
        /// The broker's words.
        reason: String,
    },
    /// The table of managed ranges is full.
    #[error(
        "cannot put {range} under management: a process has {max} separate ranges at most, so merge larger ones, or \
         unmerge some",
        max = RANGES_MAX
    )]
    TooManyRanges {
        /// The range.
        range: Range,
    },
    /// A range could not be given its own pages back.
    #[error("cannot give {range} its own pages back: out of memory, or a kernel before 5.14; they stay merged")]
    NotGivenBack {
        /// The range.
        range: Range,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The helper has left, or has not come up in time.
    #[error(
        "this process's helper has left, since another thread takes the process out of the partition, or has not come \
         up in time: try again"
    )]
    HelperGone,
    /// The helper was refused for another reason.
    #[error("the broker refused this process's helper: {reason}")]
    HelperRefused {
        /// The broker's words.
        reason: String,
    },
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::NoBroker(_) | ClientError::Ended => Self::Ended,
            ClientError::Rejected => Self::Rejected,
            ClientError::Refused { kind: RefusedKind::NoUserfault, .. } => Self::NoUserfault,
            ClientError::Refused { kind: RefusedKind::NoMove, .. } => Self::NoMove,
            ClientError::Refused { kind: RefusedKind::Unreadable, reason } => Self::Unreadable { reason },
            ClientError::Refused { reason, .. } => Self::HelperRefused { reason },
            ClientError::NoMember => Self::HelperGone,
            other => Self::Connection(other),
        }
    }
}

impl From<AgentImageError> for Error {
    fn from(error: AgentImageError) -> Self {
        match error {
            AgentImageError::Present { by } => Self::AgentPresent { by },
            AgentImageError::Start(StartFailure::UnknownLibc) => {
                Self::UnknownLibc { reason: "its code is not what its file says".to_owned() }
            }
            other => Self::Load(other),
        }
    }
}
