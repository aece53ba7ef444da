//! What lives inside other people's processes: the gate and the helper.
//!
//! **The gate** runs in the program's own threads. Every system call of libc and ld.so that could change a managed
//! mapping jumps to [`dispatch`]: the call takes a reader lock that excludes merging, and where the kernel would treat
//! a merged page otherwise than a plain one, plain memory is put there first. The gate also takes the program's own
//! instructions, `madvise(MADV_MERGEABLE)` and its opposite.
//!
//! **The helper** is a process of its own that shares the program's memory (clone with CLONE_VM only). It executes
//! the batches of [`merge`] that the broker orders. Being no thread of the program, it works while the program is
//! stopped, debugged or frozen, and the program's descriptors, signals, credentials and filters are not its own.
//!
//! Rules for everything in here, each learnt from a proven failure:
//! * no libc, no allocation, no thread-local storage, no panic that could be reached;
//! * the helper never dereferences memory of the program, except frozen pages in its scratch areas;
//! * agent memory is never eligible for merging;
//! * no agent code runs in the child of a clone: the next call through the gate finds out where it is;
//! * what a destructive call needs to know stands in the marks, so that nobody has to be asked.
//!
//! This crate is a library without std. `image/` makes the shared object out of it that is loaded into programs.

#![no_std]
#![cfg_attr(not(target_arch = "x86_64"), allow(unused, reason = "the gate exists for x86-64 only so far"))]

mod adoption;
mod alone;
mod apart;
mod arguments;
mod ask;
mod calls;
mod child;
mod elf;
mod execute;
#[cfg(feature = "faults")]
pub mod faults;
mod filter;
mod fork_events;
mod gate;
mod handover;
mod helper;
mod introduction;
mod link;
mod mremap;
mod own;
mod patch;
mod place;
mod plain;
mod priority;
mod program;
mod references;
mod reserved;
mod restrict;
mod scope;
mod scratch;
mod segments;
mod space;
mod spawn;
mod stack;
mod state;
mod stubs;
mod sys;
mod table;
mod threads;
mod told;
mod vectors;

pub use abi::mark::Keep;
pub use abi::wire::Token;
pub use arguments::are_passed;
pub use calls::Registers;
pub use calls::dispatch;
pub use handover::{Adopted, adopt_once, unmergeable as disown};
pub use place::{manage, place};
pub use state::{Config, Start, start, start_from_file, status, uses_priority_inheritance};
pub use stubs::{after_clone, before_clone};
