//! Why pages are nearly equal, and what would make them equal.

use std::collections::BTreeSet;
use std::fmt;

use super::compare::Difference;
use super::words::WordKind::{HighEntropy, Pointer, SmallInteger};

/// Bytes at either end of a page in which an allocator keeps its header or an owner its trailer.
const END: u32 = 128;
/// Most words that count as the same few offsets.
const FEW: usize = 8;

/// Why pages differ although they are nearly equal.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// Only addresses differ, between processes: each has its own address-space layout.
    AddressSpaceLayout,
    /// High-entropy words differ between processes, perhaps addresses too: hashes under a seed of the process's own.
    HashSeed,
    /// Small integers differ between processes, perhaps hashes and addresses too: reference counts, counters.
    Counters,
    /// Whatever differs lies in the first 128 bytes: a header.
    Header,
    /// Whatever differs lies in the last 128 bytes: a trailer.
    Trailer,
    /// Whatever differs lies at the same few offsets.
    FixedOffsets {
        /// The offsets in bytes, ascending.
        offsets: Vec<u32>,
    },
    /// The same data lies at other offsets in another process: it was allocated in another order or among other things.
    /// With one layout and one seed programs often allocate in the same order, but that is a guess.
    Shifted,
    /// None of these, or several of them.
    Mixed,
}

impl Cause {
    /// One word for reports.
    pub fn code(&self) -> &'static str {
        match self {
            Self::AddressSpaceLayout => "address-space-layout",
            Self::HashSeed => "hash-seed",
            Self::Counters => "counters",
            Self::Header => "header",
            Self::Trailer => "trailer",
            Self::FixedOffsets { .. } => "fixed-offsets",
            Self::Shifted => "shifted",
            Self::Mixed => "mixed",
        }
    }

    /// What would make the pages equal, in one line.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::AddressSpaceLayout => "one layout for all: pagefold run --layout shared",
            Self::HashSeed => {
                "one hash seed for all, such as PYTHONHASHSEED=0; where addresses differ too, also --layout shared"
            }
            Self::Counters => {
                "keep counters away from data: immortal objects, gc.freeze, or fork workers after loading"
            }
            Self::Header => "keep the header out of the page: metadata apart from data, or an allocator that does so",
            Self::Trailer => "keep the trailer out of the page",
            Self::FixedOffsets { .. } => "keep what is at these offsets out of the page, or make it equal",
            Self::Shifted => {
                "the same order of allocation: try --layout shared with one hash seed, or fork workers after loading"
            }
            Self::Mixed => "no single remedy",
        }
    }

    /// Whether the remedy makes processes equal to each other, and not the pages of one process.
    pub fn is_between_processes(&self) -> bool {
        matches!(self, Self::AddressSpaceLayout | Self::HashSeed | Self::Counters | Self::Shifted)
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())?;
        if let Self::FixedOffsets { offsets } = self {
            write!(f, " {offsets:#x?}")?;
        }
        Ok(())
    }
}

/// What explains the differences between pages of different processes, from pairs of them.
pub(super) fn between_processes(pairs: &[Difference]) -> Option<Cause> {
    let all = |kinds: &[_]| pairs.iter().all(|pair| pair.only(kinds));
    if pairs.is_empty() {
        None
    } else if all(&[Pointer]) {
        Some(Cause::AddressSpaceLayout)
    } else if all(&[Pointer, HighEntropy]) {
        Some(Cause::HashSeed)
    } else if all(&[Pointer, HighEntropy, SmallInteger])
        // Else it is the counters that the page consists of.
        && pairs.iter().all(|pair| pair.count(SmallInteger) < pair.alike)
    {
        Some(Cause::Counters)
    } else {
        None
    }
}

/// What explains them by where they lie, in whatever process. `size` is the length of a page in bytes.
pub(super) fn by_place(pairs: &[Difference], size: u32) -> Option<Cause> {
    let offsets: BTreeSet<u32> = pairs.iter().flat_map(|pair| pair.words.iter().map(|word| word.offset)).collect();
    let (first, last) = (*offsets.first()?, *offsets.last()?);
    if last < END {
        Some(Cause::Header)
    } else if first >= size - END {
        Some(Cause::Trailer)
    } else if offsets.len() <= FEW {
        Some(Cause::FixedOffsets { offsets: offsets.into_iter().collect() })
    } else {
        None
    }
}
