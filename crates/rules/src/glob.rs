//! Patterns with `*` and `?`.

use std::fmt;

/// What a pattern is matched with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A path: `*` and `?` stop at `/`, `**` does not.
    Path,
    /// A word: `*` stands for anything.
    Word,
}

/// A pattern: `*` for any characters, `?` for one, `[ab-z]` or `[!ab-z]` for one of a set, `[*]` for the star itself.
/// There is no escape character: names of systemd hold backslashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Glob {
    text: String,
    tokens: Vec<Token>,
    /// What every match ends with, so that most of what does not match is told at once.
    end: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Token {
    One(char),
    AnyOne { slash: bool },
    Set { negated: bool, ranges: Vec<(char, char)>, slash: bool },
    Many { slash: bool },
}

impl Glob {
    /// Reads a pattern.
    ///
    /// # Errors
    /// What is wrong with it, in a few words: it is empty, or a `[` is not closed.
    pub fn new(text: &str, kind: Kind) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("a pattern must not be empty");
        }
        let slash = kind == Kind::Word;
        let mut tokens = Vec::new();
        let mut rest = text.chars().peekable();
        while let Some(next) = rest.next() {
            tokens.push(match next {
                '*' if rest.next_if_eq(&'*').is_some() => Token::Many { slash: true },
                '*' => Token::Many { slash },
                '?' => Token::AnyOne { slash },
                '[' => set(&mut rest, slash)?,
                other => Token::One(other),
            });
        }
        let literal = tokens.iter().rev().map_while(|token| if let Token::One(it) = token { Some(*it) } else { None });
        let end: Vec<char> = literal.collect();
        Ok(Self { text: text.to_owned(), tokens, end: end.into_iter().rev().collect() })
    }

    /// As it was written.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// True if it stands for itself only.
    #[must_use]
    pub fn is_literal(&self) -> bool {
        self.tokens.iter().all(|token| matches!(token, Token::One(_)))
    }

    /// True if the whole of `text` fits the pattern. Takes at most as many steps as both are long, multiplied.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        if !text.ends_with(&self.end) {
            return false;
        }
        // The places in the pattern that could come next, all at once: a pattern cannot send this back and forth.
        let mut places = vec![false; self.tokens.len() + 1];
        let mut next = places.clone();
        places[0] = true;
        self.skip_stars(&mut places);
        for character in text.chars() {
            next.fill(false);
            for (place, token) in self.tokens.iter().enumerate().filter(|(place, _)| places[*place]) {
                if token.takes(character) {
                    let stays = matches!(token, Token::Many { .. });
                    next[if stays { place } else { place + 1 }] = true;
                }
            }
            std::mem::swap(&mut places, &mut next);
            self.skip_stars(&mut places);
        }
        places[self.tokens.len()]
    }

    /// A star may stand for nothing.
    fn skip_stars(&self, places: &mut [bool]) {
        for (place, token) in self.tokens.iter().enumerate() {
            if places[place] && matches!(token, Token::Many { .. }) {
                places[place + 1] = true;
            }
        }
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Token {
    fn takes(&self, character: char) -> bool {
        match self {
            Self::One(own) => *own == character,
            Self::AnyOne { slash } | Self::Many { slash } => *slash || character != '/',
            Self::Set { negated, ranges, slash } => {
                (*slash || character != '/')
                    && ranges.iter().any(|(first, last)| (first..=last).contains(&&character)) != *negated
            }
        }
    }
}

/// What follows a `[`. A `]` that comes first belongs to the set.
fn set(rest: &mut std::iter::Peekable<std::str::Chars<'_>>, slash: bool) -> Result<Token, &'static str> {
    const OPEN: &str = "a `[` is not closed by `]`; the character itself is written `[[]`";
    let negated = rest.next_if_eq(&'!').is_some();
    let mut ranges = Vec::new();
    loop {
        let first = rest.next().ok_or(OPEN)?;
        if first == ']' && !ranges.is_empty() {
            return Ok(Token::Set { negated, ranges, slash });
        }
        if rest.next_if_eq(&'-').is_none() {
            ranges.push((first, first));
        } else if rest.peek() == Some(&']') {
            ranges.extend([(first, first), ('-', '-')]);
        } else {
            let last = rest.next().ok_or(OPEN)?;
            if last < first {
                return Err("a range of characters is reversed");
            }
            ranges.push((first, last));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn path(pattern: &str, text: &str) -> bool {
        Glob::new(pattern, Kind::Path).unwrap().matches(text)
    }

    fn word(pattern: &str, text: &str) -> bool {
        Glob::new(pattern, Kind::Word).unwrap().matches(text)
    }

    #[test]
    fn one_star_stays_in_its_folder_and_two_do_not() {
        assert!(path("/usr/bin/*", "/usr/bin/qemu") && !path("/usr/bin/*", "/usr/bin/a/b"));
        assert!(path("/opt/**", "/opt/a/b") && path("**/ssh-agent", "/usr/bin/ssh-agent"));
        assert!(path("**/ssh-agent", "/ssh-agent") && !path("**/ssh-agent", "/usr/bin/my-ssh-agent"));
        assert!(path("/a/**/z", "/a/b/c/z") && !path("/a/**/z", "/a/z"));
        assert!(word("--config=*", "--config=/etc/x") && word("a?c", "a/c") && !path("a?c", "a/c"));
        assert!(path("/usr/bin/x", "/usr/bin/x") && !path("/usr/bin/x", "/usr/bin/xy"));
        assert!(path("*é", "caffé") && path("**", "") && !path("?", ""));
    }

    #[test]
    fn sets() {
        assert!(path("/dev/[a-cz]", "/dev/b") && path("/dev/[a-cz]", "/dev/z") && !path("/dev/[a-cz]", "/dev/d"));
        assert!(path("[!a]", "b") && !path("[!a]", "a") && !path("[!a]", "/") && word("[!a]", "/"));
        assert!(path("[*]", "*") && !path("[*]", "x") && path("[]x]", "]") && path("[a-]", "-") && path("[[]", "["));
        for wrong in ["", "[", "[]", "[a", "[a-", "[!", "[z-a]"] {
            assert!(Glob::new(wrong, Kind::Path).is_err(), "{wrong}");
        }
    }

    #[test]
    fn backslashes_are_themselves() {
        assert!(word("dev-disk-by\\x2dlabel-*.swap", "dev-disk-by\\x2dlabel-a.swap"));
    }

    #[test]
    fn a_pattern_made_to_take_long_does_not() {
        let pattern = "*a".repeat(60);
        let begun = std::time::Instant::now();
        assert!(!path(&pattern, &"a".repeat(3000).replacen("aaa", "ab/", 1000)));
        assert!(path(&pattern, &"a".repeat(3000)));
        assert!(begun.elapsed().as_secs() < 20, "exponential: would take years");
    }
}
