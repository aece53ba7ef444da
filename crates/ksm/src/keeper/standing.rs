//! How a process stands that this crate's keeper has dealt with.

use serde::{Deserialize, Serialize};

/// What was done with a process, by us or by somebody else after us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "standing", rename_all = "snake_case")]
pub enum Standing {
    /// About to be enabled: noted before it is done. Whether it was is seen by the marks.
    Asked {
        /// How many times it was let go before.
        drops: u32,
    },
    /// Refused halfway: enabled in part.
    Part {
        /// How many times it was let go before.
        drops: u32,
    },
    /// Enabled here, or by inheritance from a process that was.
    Enabled {
        /// How many times it was let go before.
        drops: u32,
    },
    /// Enabled here and disabled by somebody else: left so.
    Released,
    /// Let go, since merging it did not pay.
    Dropped {
        /// Until then, in seconds since boot.
        until: u64,
        /// How many times by now.
        drops: u32,
    },
}

impl Standing {
    /// Enabled here, as far as is known.
    #[must_use]
    pub const fn is_ours(self) -> bool {
        matches!(self, Self::Asked { .. } | Self::Part { .. } | Self::Enabled { .. })
    }

    /// How many times it was let go.
    #[must_use]
    pub const fn drops(self) -> u32 {
        match self {
            Self::Asked { drops } | Self::Part { drops } | Self::Enabled { drops } | Self::Dropped { drops, .. } => {
                drops
            }
            Self::Released => 0,
        }
    }
}
