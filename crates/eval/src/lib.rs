//! What merging would save, where and why, before anything is changed.
//!
//! This room reads and never changes: no process is stopped, attached to or written to, no setting is touched, and
//! pages that are swapped out stay there.
#![forbid(unsafe_code)]
