//! What the agent tells of itself to whoever reads its memory from outside: where no helper comes, nobody else says why a
//! program is not managed.
//!
//! A program can write anything there. It is for people to read, and nothing is decided by it.

use core::sync::atomic::AtomicU32;

/// What [`Told`] begins with: it is looked for in the image's data, so that nobody has to know where in it.
pub const MAGIC: [u8; 16] = *b"pagefold-told-1\n";
/// Bytes of [`Told`].
pub const LEN: usize = size_of::<Told>();

/// A static of the image.
#[repr(C, align(8))]
#[derive(Debug)]
pub struct Told {
    /// [`MAGIC`], which changes with the layout.
    pub magic: [u8; 16],
    /// How the gate was set up: one of [`start`].
    pub start: AtomicU32,
    /// Why no helper is going to come: one of [`helper`].
    pub helper: AtomicU32,
}

/// Values of [`Told::start`].
pub mod start {
    /// Nothing was begun: the agent has not found its variable in the environment.
    pub const NOTHING: u32 = 0;
    /// The gate stands.
    pub const READY: u32 = 1;
    /// The table of sites could not be read.
    pub const NO_TABLE: u32 = 2;
    /// Libc or the loader is not one of the table's.
    pub const UNKNOWN_LIBC: u32 = 3;
    /// There is more than one libc.
    pub const SECOND_LIBC: u32 = 4;
    /// Their code is not as in their files.
    pub const CHANGED_CODE: u32 = 5;
    /// Their code could not be changed.
    pub const PATCH_FAILED: u32 = 6;
    /// Their code must not be changed: PR_SET_MDWE.
    pub const DENIED: u32 = 7;
    /// The kernel lacks something.
    pub const KERNEL_LACKS: u32 = 8;
}

/// Values of [`Told::helper`].
pub mod helper {
    /// Nothing is against it.
    pub const MAY_COME: u32 = 0;
    /// A limit of address space or of data.
    pub const LIMITED: u32 = 1;
    /// The program has restricted its own system calls.
    pub const RESTRICTED: u32 = 2;
    /// The program's children go to another name space.
    pub const ELSEWHERE: u32 = 3;
    /// The program does what cannot be merged under.
    pub const STOPPED: u32 = 4;
}

/// `start` and `helper`, if that is what lies at the beginning of `bytes`.
#[must_use]
pub fn parse(bytes: &[u8]) -> Option<(u32, u32)> {
    let words = bytes.strip_prefix(&MAGIC)?;
    let word = |at: usize| Some(u32::from_ne_bytes(words.get(at..at + 4)?.try_into().ok()?));
    Some((word(0)?, word(4)?))
}

const _: () = assert!(LEN == MAGIC.len() + 8);
