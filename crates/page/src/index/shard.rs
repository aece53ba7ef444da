//! One shard of the index: an array of words sorted by hash, with gaps.
//!
//! A word's home is its hash scaled to the array, so homes ascend with hashes. Words lie at their home or as little
//! above it as their neighbours leave room, in ascending order of hash, without a gap between a home and its word.
//! Looking up reads on from the home until it meets the hash, a higher one, or a gap; growing is one merge in order.

use super::PageId;

/// Bits of the hash that a word keeps. A shard has at most 2^14 words, so two contents meet in one hash once in two
/// thousand; then the index offers a candidate that is none, which costs one comparison.
pub(super) const HASH_BITS: u32 = 25;
const REPEATED: u64 = 1 << 38;
const AGE_ONE: u64 = 1 << 36;
const AGE: u64 = 3 << 36;
const ID: u64 = AGE_ONE - 1;
const HASH_SHIFT: u32 = 39;

/// Words from a newcomer's place on among which the one to be replaced is chosen: four cache lines.
const NEIGHBOURHOOD: usize = 32;

/// What an id was entered under, and since when.
#[derive(Clone, Copy)]
pub(super) struct Word(u64);

impl Word {
    fn new(hash: u32, id: PageId) -> Self {
        Self(u64::from(hash) << HASH_SHIFT | id.get())
    }

    fn is_gap(self) -> bool {
        self.0 == 0
    }

    fn hash(self) -> u32 {
        u32::try_from(self.0 >> HASH_SHIFT).expect("25 bits are left")
    }

    pub(super) fn id(self) -> PageId {
        PageId::new(self.0 & ID).expect("words hold ids")
    }

    pub(super) fn is_repeated(self) -> bool {
        self.0 & REPEATED != 0
    }

    fn age(self) -> u64 {
        self.0 & AGE
    }
}

/// What a newcomer had to displace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inserted {
    /// Nothing.
    Room,
    /// A word not confirmed for at least one pass; whether its content had been seen again.
    ReplacedOld { repeated: bool },
    /// A word of the current pass.
    ReplacedFresh { repeated: bool },
}

#[derive(Default)]
pub(super) struct Shard {
    words: Box<[u64]>,
    /// Homes; the words behind them take what overflows at the end.
    homes: u32,
    used: u32,
}

impl Shard {
    pub(super) fn bytes(&self) -> usize {
        size_of_val::<[u64]>(&self.words)
    }

    #[cfg(test)]
    pub(super) fn used(&self) -> u32 {
        self.used
    }

    pub(super) fn find(&self, hash: u32) -> Option<Word> {
        self.search(hash).ok().map(|at| Word(self.words[at]))
    }

    /// Reads the word at the home of `hash`, to have it in the cache.
    pub(super) fn touch(&self, hash: u32) -> u64 {
        self.words.get(self.home(hash)).copied().unwrap_or(0)
    }

    /// The word of `hash` is alive: its age starts anew.
    pub(super) fn confirm(&mut self, hash: u32) {
        self.change(hash, |word| word & !AGE);
    }

    /// The content of `hash` was seen a second time. Whether that is news.
    pub(super) fn mark_repeated(&mut self, hash: u32) -> bool {
        self.change(hash, |word| word | REPEATED).is_some_and(|before| !Word(before).is_repeated())
    }

    /// Puts another page in the place of the word of `hash`, as new. The word before.
    pub(super) fn put(&mut self, hash: u32, id: PageId) -> Option<Word> {
        self.change(hash, |_| Word::new(hash, id).0).map(Word)
    }

    /// Enters a hash that is not there. The array grows by an eighth when it is nearly full, up to `max_words`; from
    /// then on the oldest word nearby makes room.
    pub(super) fn insert(&mut self, hash: u32, id: PageId, max_words: u32) -> Inserted {
        loop {
            if self.used < most_used(self.homes) && self.insert_here(hash, id) {
                return Inserted::Room;
            }
            let homes = grown(self.homes, max_words);
            if homes == self.homes {
                return self.replace_nearby(hash, id);
            }
            self.resize(homes);
        }
    }

    pub(super) fn remove(&mut self, hash: u32) -> Option<Word> {
        let at = self.search(hash).ok()?;
        Some(self.remove_at(at))
    }

    /// A pass has gone by: every word is one pass older, three at most.
    pub(super) fn grow_older(&mut self) {
        for word in &mut self.words {
            let older = *word != 0 && *word & AGE != AGE;
            *word += if older { AGE_ONE } else { 0 };
        }
    }

    pub(super) fn words(&self) -> impl Iterator<Item = Word> + '_ {
        self.words.iter().map(|word| Word(*word)).filter(|word| !word.is_gap())
    }

    fn home(&self, hash: u32) -> usize {
        let scaled = (u64::from(hash) * u64::from(self.homes)) >> HASH_BITS;
        usize::try_from(scaled).expect("below the number of homes")
    }

    /// Where `hash` is, or where it would have to be put (at a gap or in front of a higher hash, or past the end).
    fn search(&self, hash: u32) -> Result<usize, usize> {
        let home = self.home(hash);
        for (at, word) in self.words.iter().enumerate().skip(home) {
            let word = Word(*word);
            if word.is_gap() || word.hash() > hash {
                return Err(at);
            }
            if word.hash() == hash {
                return Ok(at);
            }
        }
        Err(self.words.len())
    }

    fn change(&mut self, hash: u32, change: impl FnOnce(u64) -> u64) -> Option<u64> {
        let at = self.search(hash).ok()?;
        let before = self.words[at];
        self.words[at] = change(before);
        Some(before)
    }

    /// Whether there was a gap between the word's place and the end of the array.
    fn insert_here(&mut self, hash: u32, id: PageId) -> bool {
        let at = match self.search(hash) {
            Ok(at) | Err(at) => at,
        };
        let Some(gap) = self.words[at..].iter().position(|word| *word == 0) else { return false };
        self.words.copy_within(at..at + gap, at + 1);
        self.words[at] = Word::new(hash, id).0;
        self.used += 1;
        true
    }

    fn replace_nearby(&mut self, hash: u32, id: PageId) -> Inserted {
        let at = match self.search(hash) {
            Ok(at) | Err(at) => at,
        };
        // Only words at the place or behind it: the gap that one leaves moves up, and has to be found from the place.
        let from = at.min(self.words.len() - 1);
        let to = (from + NEIGHBOURHOOD).min(self.words.len());
        // Of equally old ones the hash picks one, not the order of arrival: else a scan that is longer than the index
        // would always push out what it comes back to next.
        let turn = usize::try_from(hash).expect("25 bits");
        let oldest = (from..to)
            .filter(|at| self.words[*at] != 0)
            .max_by_key(|at| (Word(self.words[*at]).age(), (at + turn) % NEIGHBOURHOOD));
        let replaced = oldest.map(|oldest| self.remove_at(oldest));
        let entered = self.insert_here(hash, id);
        debug_assert!(entered, "a gap was made at the place or behind it");
        match replaced {
            Some(word) if word.age() > 0 => Inserted::ReplacedOld { repeated: word.is_repeated() },
            Some(word) => Inserted::ReplacedFresh { repeated: word.is_repeated() },
            None => Inserted::Room,
        }
    }

    fn remove_at(&mut self, at: usize) -> Word {
        let word = Word(self.words[at]);
        // Those behind it that are not at home move down, up to the next gap or the next one that is at home.
        let behind = self.words[at + 1..]
            .iter()
            .enumerate()
            .take_while(|(offset, word)| **word != 0 && self.home(Word(**word).hash()) < at + 1 + offset)
            .count();
        self.words.copy_within(at + 1..at + 1 + behind, at);
        self.words[at + behind] = 0;
        self.used -= 1;
        word
    }

    fn resize(&mut self, homes: u32) {
        let words = vec![0; words_for(homes) as usize].into_boxed_slice();
        let old = Self { words: std::mem::replace(&mut self.words, words), homes: self.homes, used: 0 };
        self.homes = homes;
        let mut free = 0;
        for word in old.words() {
            let at = self.home(word.hash()).max(free);
            // The old array held them all with fewer homes, so the spare words at the end are enough.
            self.words[at] = word.0;
            free = at + 1;
        }
    }
}

/// Words behind the last home. With 15 of 16 homes used a word lies 7.5 words from its home on average and farther
/// than d with probability e^(-d/8).
fn spare(homes: u32) -> u32 {
    8 + homes / 128
}

fn words_for(homes: u32) -> u32 {
    if homes == 0 { 0 } else { homes + spare(homes) }
}

fn most_used(homes: u32) -> u32 {
    homes - homes / 16
}

/// An eighth more homes, as long as home and spare words are no more than `max_words`.
fn grown(homes: u32, max_words: u32) -> u32 {
    let most = max_words.saturating_sub(8) - max_words.saturating_sub(8) / 129;
    let most = if words_for(most) > max_words { most - 1 } else { most };
    (homes + (homes / 8).max(8)).min(most.max(homes))
}
