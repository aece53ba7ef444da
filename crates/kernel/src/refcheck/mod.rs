//! Does anybody hold a reference to a frozen page? Two ways to know, each with a self-test that must pass before it
//! is trusted.
//!
//! A page that is moved out of reach can still be written by whoever took a plain reference to it before: NFS and FUSE
//! I/O, vhost-scsi, process_vm_writev, drivers. UFFDIO_MOVE refuses only pages that are pinned for DMA. So each frozen
//! page's exact reference count is needed: [`bpf`] reads it, [`collapse`] has the kernel compare it. [`holders()`] asks the same of pages in their places.

pub mod bpf;
mod btf;
pub mod collapse;
pub mod holders;
pub mod own_counts;
mod program;

pub use bpf::{BpfCheck, Unavailable};
pub use collapse::collapse_oracle_works;
pub use holders::{Holders, holders};
pub use own_counts::OwnCounts;
