//! Every kernel interface that pagefold uses, behind safe functions, and the probe that tells which of them work here.

mod sys;
mod uapi;

pub mod memfd;
pub mod pagemap;
pub mod pidfd;
pub mod remote;
pub mod seqpacket;
pub mod shared;
pub mod uffd;
pub mod units;

pub use rustix::io::Errno;
pub use rustix::process::Signal;

pub use memfd::MemfdError;
pub use pagemap::{Category, Pagemap, PagemapEntry, PagemapError, Region, ScanEnd, ScanRequest};
pub use pidfd::{Pidfd, PidfdError};
pub use remote::{BatchReader, ReadOutcome, RemoteError};
pub use seqpacket::{Credentials, RecvOutcome, SendOutcome, Seqpacket, SeqpacketListener, SocketError};
pub use shared::{SharedError, SharedLayout, SharedMap, WaitOutcome, futex_wait, futex_wake};
pub use uffd::{CopyMode, CopyOutcome, CreateFlags, Event, Mode, MoveOutcome, Uffd, UffdError, UffdFeatures};
pub use units::{Bytes, PageCount, Pid, Range, RangeError, Vaddr, page_size};
