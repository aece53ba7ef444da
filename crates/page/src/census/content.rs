//! What is kept of a page: its class, and enough of a hash to know it again.

use crate::{PageClass, Secret};

/// What a page holds, as far as it helps to say where duplicates come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum ContentClass {
    /// Zeros.
    Zero = 1,
    /// One 64-bit word over and over.
    Repeated = 2,
    /// Text, as far as the words looked at tell.
    Text = 3,
    /// Mostly addresses, as far as the words looked at tell: an object heap, a table of pointers.
    Pointers = 4,
    /// Anything else.
    Other = 5,
}

impl ContentClass {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Zero, Self::Repeated, Self::Text, Self::Pointers, Self::Other];

    /// The word that reports use.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Repeated => "repeated_word",
            Self::Text => "text",
            Self::Pointers => "pointers",
            Self::Other => "other",
        }
    }

    pub(super) fn of_mark(mark: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|class| *class as u8 == mark & CLASS)
    }
}

/// Words of a page that are looked at to guess its class.
const LOOKED_AT: usize = 16;
/// Bits of a mark that are the class; 0 is a page that was not read.
const CLASS: u8 = 7;
/// Bits of a mark that are the hash's.
const CHECK_BITS: u32 = 5;

/// A page's hash and class: what is kept of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    pub(super) hash: u64,
    pub(super) mark: u8,
}

impl Content {
    /// What is kept of `page`, under a secret that is drawn for each snapshot.
    ///
    /// # Panics
    /// If `page` is not a page: empty, or not a whole number of cache lines.
    pub fn of(page: &[u8], secret: &Secret) -> Self {
        let class = match PageClass::of(page) {
            PageClass::Zero => return Self::ZERO,
            PageClass::Repeated(_) => ContentClass::Repeated,
            PageClass::Data => guess(page),
        };
        let fingerprint = secret.fingerprint(page);
        let check = u8::try_from(fingerprint.low() >> (64 - CHECK_BITS)).expect("five bits");
        Self { hash: fingerprint.high(), mark: check << (8 - CHECK_BITS) | class as u8 }
    }

    /// What [`Content::hash`] and [`Content::mark`] gave; `None` for a mark that is none.
    pub fn from_parts(hash: u64, mark: u8) -> Option<Self> {
        let class = ContentClass::of_mark(mark)?;
        Some(if class == ContentClass::Zero { Self::ZERO } else { Self { hash, mark } })
    }

    /// Its class and five more bits of its hash.
    pub const fn mark(self) -> u8 {
        self.mark
    }

    /// A page of zeros.
    pub const ZERO: Self = Self { hash: 0, mark: ContentClass::Zero as u8 };

    /// Its class.
    pub fn class(self) -> ContentClass {
        ContentClass::of_mark(self.mark).expect("a content has a class")
    }

    /// 64 bits that select the content under the snapshot's secret; 0 for zeros. Classes are not in it.
    pub const fn hash(self) -> u64 {
        self.hash
    }
}

/// The class of a page that is neither zero nor one word repeated, from words spread over it. Equal pages have equal
/// classes, so no process's layout may be asked.
fn guess(page: &[u8]) -> ContentClass {
    let (words, _) = page.as_chunks::<8>();
    let step = (words.len() / LOOKED_AT).max(1);
    // An odd offset: allocators begin pages and power-of-two objects with words of their own.
    let looked_at = words.iter().skip((step / 2) | 1).step_by(step);
    let (mut seen, mut text, mut pointers, mut zeros) = (0, 0, 0, 0);
    for word in looked_at {
        seen += 1;
        let value = u64::from_ne_bytes(*word);
        zeros += usize::from(value == 0);
        pointers += usize::from(looks_like_a_pointer(value));
        // Nearly all that is no text has a byte above ASCII or a zero one, which is seen at once.
        let ascii = value & 0x8080_8080_8080_8080 == 0 && value & 0xff != 0;
        let is_text = ascii && word.iter().all(|byte| matches!(byte, b' '..=b'~' | b'\n' | b'\t' | b'\r'));
        text += usize::from(is_text);
    }
    if text * 4 >= seen * 3 {
        ContentClass::Text
    } else if zeros < seen && pointers * 5 >= (seen - zeros) * 2 {
        ContentClass::Pointers
    } else {
        ContentClass::Other
    }
}

/// True for a number that could be an address of a mapping: above 1 TiB, below the end of a 48-bit address space.
pub fn looks_like_a_pointer(value: u64) -> bool {
    (1 << 40..1 << 48).contains(&value)
}
