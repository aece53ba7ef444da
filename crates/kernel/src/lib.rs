//! Every kernel interface that pagefold uses, behind safe functions, and the probe that tells which of them work here.
//!
//! * What a process has in memory: [`maps`], [`smaps`], [`pagemap`] (with PAGEMAP_SCAN), [`remote`] and [`memory_file`] (its content),
//!   [`page_flags`] (what the kernel does with its frames).
//! * What is done to it: [`uffd`] (freeze, track writes, give pages back), [`memfd`], [`ksm_sysfs`].
//! * What it is made to do itself: [`inject`], system calls in one of its threads.
//! * Whether that is safe: [`refcheck`], exact reference counts of frozen pages.
//! * Whom we talk to: [`pidfd`], [`seqpacket`], [`shared`] memory with futexes, [`launch`], [`exec_stop`], [`signals`].
//! * What goes on: [`status`], [`stat`], [`task`], [`mod@current_call`], [`sched`], [`address_space`], [`age`], [`program`], [`membership`],
//!   [`descriptors`], [`cgroup_memory`], [`mempolicy`], [`tracefs`].
//! * What works here: [`probe`].
//!
//! A process that has ended, a mapping that has changed, a race that is lost are outcomes, i.e. values of an enum;
//! errors carry what they were about and what the kernel said. Descriptors are owned and closed on exec.
//!
//! ```
//! use pagefold_kernel::{Category, Pagemap, Pid, ScanRequest, maps};
//!
//! // How many of our own pages are there?
//! let pagemap = Pagemap::open(Pid::this())?;
//! let present = ScanRequest { mask: Category::PRESENT, ret: Category::PRESENT, ..ScanRequest::default() };
//! let (mut pages, mut regions) = (0, Vec::new());
//! for vma in maps::read(Pid::this())? {
//!     match pagemap.scan_all(vma.range, &present, &mut regions) {
//!         Ok(()) => pages += regions.iter().map(|region| region.range.pages().get()).sum::<u64>(),
//!         Err(error) => println!("{}: {error}", vma.range), // e.g. a kernel before 6.7
//!     }
//! }
//! println!("{pages} pages");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod own_memory;
mod ptrace;
mod sys;
#[cfg(test)]
mod test_memory;
mod uapi;

pub mod address_space;
pub mod age;
pub mod agent_image;
pub mod cgroup_memory;
pub mod current_call;
pub mod descriptors;
pub mod error_chain;
pub mod exec_stop;
pub mod inject;
pub mod ksm_sysfs;
pub mod launch;
pub mod lru;
pub mod mapping_word;
pub mod maps;
pub mod membership;
pub mod memfd;
pub mod memory_file;
pub mod mempolicy;
pub mod numa_maps;
pub mod owned_memory;
pub mod page_flags;
pub mod pagemap;
pub mod pidfd;
pub mod probe;
pub mod procfs;
pub mod program;
pub mod refcheck;
pub mod remote;
pub mod sched;
pub mod seqpacket;
pub mod shared;
pub mod signals;
pub mod smaps;
pub mod stat;
pub mod status;
pub mod task;
pub mod tracefs;
pub mod uffd;
pub mod units;

pub use rustix::io::Errno;
pub use rustix::process::Signal;

pub use agent_image::{Adoption, AgentImage, AgentImageError, StartFailure};
pub use current_call::{CurrentCall, current_call};
pub use error_chain::error_chain;
pub use ksm_sysfs::{KsmCounters, KsmError, KsmStat, KsmSysfs};
pub use launch::{Launch, LaunchError, Launched};
pub use mapping_word::{MappingWord, MappingWordError};
pub use maps::{MapsFile, MapsReader, Vma};
pub use memfd::MemfdError;
pub use memory_file::MemoryFile;
pub use owned_memory::OwnedMemory;
pub use page_flags::{FrameFlags, FrameFlagsFile};
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
pub use units::{Bytes, PageCount, Pid, Range, RangeError, Vaddr, page_size, pages_of_huge};
