//! Words that people use for mappings: `heap`, `stack`, `anon`, a range of addresses, a name.

use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::str::FromStr;

use thiserror::Error;

use crate::maps::Vma;
use crate::procfs;
use crate::units::{Range, RangeError, Vaddr};

/// Which mappings a word stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MappingWord {
    /// `heap`: what brk(2) made, `[heap]`. Other memory of malloc(3) is `anon`.
    Heap,
    /// `stack`: that of the main thread, `[stack]`. Those of other threads are `anon`.
    Stack,
    /// `anon`: private memory without a file and without a name.
    Anon,
    /// `START-END`, hexadecimal as /proc/PID/maps shows them: the parts of mappings in it.
    Addresses(Range),
    /// Anything else: the name that /proc/PID/maps shows, in which `*` stands for any characters and `?` for one. Without a
    /// `/` and not in brackets it is the last part of a path.
    Name(String),
}

/// Why a word stands for no mappings.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MappingWordError {
    /// Nothing was said.
    #[error("must be heap, stack, anon, START-END or a name")]
    Empty,
    /// Two addresses that are no range.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A range without a page.
    #[error("{0} holds no page")]
    NoPage(String),
}

impl FromStr for MappingWord {
    type Err = MappingWordError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |text: &str| procfs::hexadecimal(text.strip_prefix("0x").unwrap_or(text).as_bytes()).map(Vaddr);
        let addresses = text.split_once('-').and_then(|(start, end)| number(start).zip(number(end)));
        match (text, addresses) {
            ("", _) => Err(MappingWordError::Empty),
            ("heap" | "[heap]", _) => Ok(Self::Heap),
            ("stack" | "[stack]", _) => Ok(Self::Stack),
            ("anon", _) => Ok(Self::Anon),
            (_, Some((start, end))) => match Range::new(start, end)? {
                range if range.is_empty() => Err(MappingWordError::NoPage(text.to_owned())),
                range => Ok(Self::Addresses(range)),
            },
            (name, None) => Ok(Self::Name(name.to_owned())),
        }
    }
}

impl fmt::Display for MappingWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Heap => f.write_str("heap"),
            Self::Stack => f.write_str("stack"),
            Self::Anon => f.write_str("anon"),
            Self::Addresses(range) => write!(f, "{range}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl MappingWord {
    /// The part of a mapping that the word stands for: all of it, what lies in the range of addresses, or nothing.
    #[must_use]
    pub fn part_of(&self, vma: &Vma) -> Option<Range> {
        let all = match self {
            Self::Heap => vma.name == "[heap]",
            Self::Stack => vma.name == "[stack]",
            Self::Anon => vma.is_private_anonymous() && vma.name.is_empty(),
            Self::Addresses(range) => return range.intersect(&vma.range),
            Self::Name(pattern) => is_called(pattern.as_bytes(), vma.name.as_bytes()),
        };
        all.then_some(vma.range)
    }
}

/// What the kernel adds to the path of a file that is no longer there.
const DELETED: &[u8] = b" (deleted)";

fn is_called(pattern: &[u8], name: &[u8]) -> bool {
    if name.is_empty() {
        return false;
    }
    let path = name.strip_suffix(DELETED).unwrap_or(name);
    let whole = pattern.contains(&b'/') || pattern.starts_with(b"[");
    let last = path.rsplit(|byte| *byte == b'/').next().unwrap_or(path);
    fits(pattern, name) || fits(pattern, path) || !whole && path.starts_with(b"/") && fits(pattern, last)
}

/// True if the whole of `text` fits a pattern of `*` and `?`. The last star is the only one to go back to, so this takes at
/// most as many steps as both are long, multiplied.
fn fits(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut place) = (0, 0);
    // Behind the last star, and the text that it does not yet stand for.
    let mut star = None;
    while at < text.len() {
        match pattern.get(place) {
            Some(b'*') => {
                place += 1;
                star = Some((place, at));
            }
            Some(byte) if *byte == b'?' || *byte == text[at] => {
                place += 1;
                at += 1;
            }
            _ => {
                let Some((behind, from)) = star else { return false };
                star = Some((behind, from + 1));
                (place, at) = (behind, from + 1);
            }
        }
    }
    pattern[place..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn vma(start: u64, pages: u64, name: &str, inode: u64) -> Vma {
        let range = Range::new(Vaddr(start), Vaddr(start + pages * crate::page_size())).unwrap();
        Vma { range, name: name.into(), inode, read: true, write: true, ..Vma::default() }
    }

    fn stands_for(word: &str, name: &str) -> bool {
        let inode = u64::from(name.starts_with('/'));
        word.parse::<MappingWord>().unwrap().part_of(&vma(0x10000, 1, name, inode)).is_some()
    }

    #[test]
    fn words_of_the_kernel() {
        assert!(stands_for("heap", "[heap]") && stands_for("[heap]", "[heap]") && !stands_for("heap", ""));
        assert!(stands_for("stack", "[stack]") && !stands_for("stack", "[heap]"));
        assert!(stands_for("anon", "") && !stands_for("anon", "[heap]") && !stands_for("anon", "/usr/lib/libc.so.6"));
        let shared = Vma { shared: true, ..vma(0x10000, 1, "", 0) };
        assert_eq!(MappingWord::Anon.part_of(&shared), None);
    }

    #[test]
    fn names_are_whole_or_the_last_part_of_a_path() {
        assert!(stands_for("libc.so.6", "/usr/lib/libc.so.6") && !stands_for("libc", "/usr/lib/libc.so.6"));
        assert!(stands_for("libc*", "/usr/lib/libc.so.6") && stands_for("/usr/*/libc.so.?", "/usr/lib/libc.so.6"));
        assert!(
            !stands_for("lib/libc.so.6", "/usr/lib/libc.so.6") && stands_for("*/lib/libc.so.6", "/usr/lib/libc.so.6")
        );
        assert!(stands_for("/x/jit", "/x/jit (deleted)") && stands_for("jit", "/x/jit (deleted)"));
        assert!(stands_for("[anon:js-*]", "[anon:js-gc-heap]") && !stands_for("[anon:js-*]", "[heap]"));
        assert!(stands_for("*", "/usr/lib/x") && stands_for("*", "[heap]") && !stands_for("*", ""));
        assert!(!stands_for("a*b?d", "/abd") && stands_for("a*b?d", "/axxbbcd") && stands_for("**a", "/ba"));
    }

    #[test]
    fn addresses_are_cut_to_the_mapping() {
        let page = crate::page_size();
        let word: MappingWord = format!("0x{:X}-{:x}", 0x10000 + page, 0x10000 + 9 * page).parse().unwrap();
        let part = word.part_of(&vma(0x10000, 4, "[heap]", 0)).unwrap();
        assert_eq!((part.start(), part.pages().get()), (Vaddr(0x10000 + page), 3));
        assert_eq!(word.part_of(&vma(0x10000, 1, "", 0)), None);
        assert_eq!(word.to_string().parse::<MappingWord>().unwrap(), word);
    }

    #[test]
    fn what_stands_for_nothing_is_an_error() {
        for (word, said) in
            [("", "heap, stack"), ("1000-1000", "no page"), ("2000-1000", "ends before"), ("1-2", "page")]
        {
            let error = word.parse::<MappingWord>().unwrap_err().to_string();
            assert!(error.contains(said), "{word:?}: {error}");
        }
        assert_eq!("dead-beeg".parse(), Ok(MappingWord::Name("dead-beeg".to_owned())));
    }

    #[test]
    fn a_pattern_made_to_take_long_does_not() {
        let begun = std::time::Instant::now();
        assert!(!fits("*a".repeat(500).as_bytes(), "b".repeat(4000).as_bytes()));
        assert!(!fits(format!("{}z", "*a".repeat(500)).as_bytes(), "a".repeat(4000).as_bytes()));
        assert!(begun.elapsed().as_secs() < 20, "exponential: would take years");
    }
}
