//! Every kernel interface that pagefold uses, behind safe functions, and the probe that tells which of them work here.

mod sys;
#[cfg(test)]
mod test_memory;
mod uapi;

pub mod exec_stop;
pub mod ksm_sysfs;
pub mod launch;
pub mod maps;
pub mod memfd;
pub mod pagemap;
pub mod pidfd;
pub mod probe;
pub mod procfs;
pub mod refcheck;
pub mod remote;
pub mod sched;
pub mod seqpacket;
pub mod shared;
pub mod signals;
pub mod smaps;
pub mod status;
pub mod task;
pub mod uffd;
pub mod units;

pub use rustix::io::Errno;
pub use rustix::process::Signal;

pub use ksm_sysfs::{KsmCounters, KsmError, KsmStat, KsmSysfs};
pub use launch::{Launch, LaunchError, Launched};
pub use maps::{MapsFile, MapsReader, Vma};
pub use memfd::MemfdError;
pub use pagemap::{Category, Pagemap, PagemapEntry, PagemapError, Region, ScanEnd, ScanRequest};
pub use pidfd::{Pidfd, PidfdError};
pub use probe::{ExactCheck, Feature, Features, Missing};
pub use procfs::ProcError;
pub use refcheck::{BpfCheck, Unavailable, collapse_oracle_works};
pub use remote::{BatchReader, ReadOutcome, RemoteError};
pub use sched::SchedError;
pub use seqpacket::{Credentials, RecvOutcome, SendOutcome, Seqpacket, SeqpacketListener, SocketError};
pub use shared::{SharedError, SharedLayout, SharedMap, WaitOutcome, futex_wait, futex_wake};
pub use smaps::{MemoryUse, VmFlags, VmaUse};
pub use status::Status;
pub use uffd::{CopyMode, CopyOutcome, CreateFlags, Event, Mode, MoveOutcome, Uffd, UffdError, UffdFeatures};
pub use units::{Bytes, PageCount, Pid, Range, RangeError, Vaddr, page_size};
