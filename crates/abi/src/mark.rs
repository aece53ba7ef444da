//! The byte that the gate keeps for each page of a managed range.
//!
//! /proc shows too little to make a destructive call exact (not DONTFORK, not whether a mapping reserves memory), and
//! the gate must not ask anybody. So it keeps what it needs: whether the page is the store's, and with which
//! protection and properties fresh anonymous memory has to be put in its place.

/// Protection and properties that a mapping must keep when it is replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep(u8);

impl Keep {
    /// PROT_READ, PROT_WRITE and PROT_EXEC as the kernel numbers them.
    pub const PROT: u8 = 0x07;
    /// MADV_DONTFORK was applied.
    pub const DONTFORK: u8 = 0x08;
    /// MADV_DONTDUMP was applied.
    pub const DONTDUMP: u8 = 0x10;
    /// The mapping was made with MAP_NORESERVE.
    pub const NORESERVE: u8 = 0x20;

    /// From the bits above; others are dropped.
    #[must_use]
    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & (Self::PROT | Self::DONTFORK | Self::DONTDUMP | Self::NORESERVE))
    }

    /// The bits above.
    #[must_use]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The protection bits, as mmap(2) takes them.
    #[must_use]
    pub const fn prot(self) -> u8 {
        self.0 & Self::PROT
    }

    /// True if any of `bits` is set.
    #[must_use]
    pub const fn has(self, bits: u8) -> bool {
        self.0 & bits != 0
    }

    /// The same with `set` added and `clear` taken away.
    #[must_use]
    pub const fn with(self, set: u8, clear: u8) -> Self {
        Self::from_bits(self.0 & !clear | set)
    }
}

/// What the gate knows of one page of a managed range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(u8);

const MERGED: u8 = 0x80;
const EXCLUDED: u8 = 0x40;

impl Mark {
    /// An ordinary page.
    pub const PLAIN: Self = Self(0);
    /// A page that must not be merged.
    pub const EXCLUDED: Self = Self(EXCLUDED);

    /// A page that lies in the store, clean or diverged.
    #[must_use]
    pub const fn merged(keep: Keep) -> Self {
        Self(MERGED | keep.0)
    }

    /// From the byte in the table.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Self {
        Self(byte)
    }

    /// The byte in the table.
    #[must_use]
    pub const fn byte(self) -> u8 {
        self.0
    }

    /// Protection and properties, if the page is merged.
    #[must_use]
    pub const fn keep(self) -> Option<Keep> {
        if self.0 & MERGED != 0 { Some(Keep::from_bits(self.0)) } else { None }
    }

    /// True if the page may be merged.
    #[must_use]
    pub const fn is_plain(self) -> bool {
        self.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_keeps_what_a_replacement_needs() {
        let keep = Keep::from_bits(3 | Keep::DONTFORK);
        let mark = Mark::from_byte(Mark::merged(keep).byte());
        assert_eq!(mark.keep(), Some(keep));
        assert!(!mark.is_plain());
        assert_eq!(Mark::PLAIN.keep(), None);
        assert_eq!(Mark::EXCLUDED.keep(), None);
        assert!(!Mark::EXCLUDED.is_plain());
    }
}
