//! What can go wrong in the broker itself. A member that dies, vanishes or lies is an outcome, not an error.

use std::io;
use std::path::PathBuf;

/// Errors of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// No socket for helpers could be made.
    #[error("cannot make the socket that helpers connect to")]
    Listen(#[from] kernel::SocketError),
    /// The partition could not be opened.
    #[error("cannot open a partition")]
    Partition(#[from] store::StoreError),
    /// Random bytes could not be had.
    #[error("cannot draw a secret")]
    Secret(#[source] io::Error),
    /// The agent could not be put where members can load it.
    #[error("cannot write the agent to {path}")]
    Agent {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The system-call sites of this machine's libc are not known.
    #[error("cannot find the system-call sites of libc: {reason}")]
    Sites {
        /// What is wrong with it.
        reason: String,
    },
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The limit of address space is too low.
    #[error("its limit (RLIMIT_AS) leaves {} MiB of address space, too little for a broker; raise ulimit -v", left.get() >> 20)]
    AddressSpace {
        /// What is left.
        left: kernel::Bytes,
    },
    /// Waiting for events failed.
    #[error("cannot wait for events")]
    Poll(#[source] io::Error),
    /// The broker is not there any more.
    #[error("the broker has ended")]
    Ended,
}
