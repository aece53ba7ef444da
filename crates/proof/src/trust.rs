//! What the operator of a machine trusts: a file of plain lines.
//!
//! ```text
//! # `code`: the system calls of this file were reviewed. `jit`: and what it compiles while it runs.
//! code 2f8a1c0d7e5b4a39c6d1e0f2a3b4c5d6e7f80912 libfoo.so.3
//! jit  9c0e4b7a61d2f3c58e90ab12cd34ef5678901234 libjvm.so
//! ```

use std::path::PathBuf;

/// What an entry is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrustedAs {
    /// The file's own system calls.
    Code,
    /// These, and executable memory in processes that have the file mapped.
    Engine,
}

impl TrustedAs {
    /// The first word of a line.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Code => "code",
            Self::Engine => "jit",
        }
    }
}

/// The lines of a trust file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trust {
    lines: Vec<Line>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    number: usize,
    build_id: String,
    name: String,
    trusted_as: TrustedAs,
}

/// A trust file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Others could add to it.
    #[error("{} can be written by others than its owner, or its owner is neither root nor this user", path.display())]
    Writable {
        /// The file.
        path: PathBuf,
    },
    /// A line is none.
    #[error("line {line}: {what}")]
    Line {
        /// From 1 on.
        line: usize,
        /// What is wrong.
        what: String,
    },
}

impl Trust {
    /// Reads a file that only its owner, root or this user, can write to.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn read(path: &std::path::Path) -> Result<Self, TrustError> {
        use std::io::Read as _;
        use std::os::unix::fs::MetadataExt as _;

        let fail = |source| TrustError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(fail)?;
        let about = file.metadata().map_err(fail)?;
        let owners = [0, rustix::process::geteuid().as_raw()];
        if !about.is_file() || about.mode() & 0o022 != 0 || !owners.contains(&about.uid()) {
            return Err(TrustError::Writable { path: path.to_owned() });
        }
        let mut text = String::new();
        file.take(1 << 20).read_to_string(&mut text).map_err(fail)?;
        Self::parse(&text)
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    /// [`TrustError::Line`] for the first line that is none.
    pub fn parse(text: &str) -> Result<Self, TrustError> {
        let mut lines = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let fail = |what: &str| TrustError::Line { line: number, what: what.to_owned() };
            let mut words = line.splitn(3, char::is_whitespace).map(str::trim);
            let trusted_as = match words.next() {
                Some("code") => TrustedAs::Code,
                Some("jit") => TrustedAs::Engine,
                _ => return Err(fail("must begin with `code` or `jit`")),
            };
            // Several blanks between the words make empty ones.
            let rest = line.trim_start_matches(trusted_as.word()).trim();
            let Some((build_id, name)) = rest.split_once(char::is_whitespace) else {
                return Err(fail("must be `code BUILD-ID NAME` or `jit BUILD-ID NAME`"));
            };
            let build_id = build_id.to_lowercase();
            if build_id.len() < 16 || !build_id.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(fail("the build-id must be at least 16 hexadecimal digits"));
            }
            lines.push(Line { number, build_id, name: name.trim().to_owned(), trusted_as });
        }
        Ok(Self { lines })
    }

    /// The line for a file with this build-id and one of these names, and its number.
    pub(crate) fn find(&self, build_id: &str, names: &[&str], trusted_as: TrustedAs) -> Option<usize> {
        let fits = |line: &&Line| {
            line.build_id == build_id
                && names.contains(&line.name.as_str())
                && (line.trusted_as == trusted_as || trusted_as == TrustedAs::Code)
        };
        self.lines.iter().find(fits).map(|line| line.number)
    }
}

/// The line that would make a file trusted; `None` if its name cannot stand in one.
#[must_use]
pub fn trust_line(trusted_as: TrustedAs, build_id: &str, name: &str) -> Option<String> {
    // A name is what its file says, and somebody copies the line.
    let fits = !name.is_empty() && name.trim() == name && !name.contains('#') && !name.contains(char::is_control);
    fits.then(|| format!("{} {build_id} {name}", trusted_as.word()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const ID: &str = "2f8a1c0d7e5b4a39";

    #[test]
    fn a_line_that_is_printed_is_read() {
        let text = format!("# mine\n\n{}  # why\n", trust_line(TrustedAs::Engine, ID, "lib my.so").unwrap());
        let trust = Trust::parse(&text).unwrap();
        assert_eq!(trust.find(ID, &["lib my.so"], TrustedAs::Engine), Some(3));
        assert_eq!(trust.find(ID, &["lib my.so"], TrustedAs::Code), Some(3), "an engine's own code as well");
        assert_eq!(trust.find(ID, &["other"], TrustedAs::Engine), None);
        assert_eq!(trust.find("2f8a1c0d7e5b4a3a", &["lib my.so"], TrustedAs::Engine), None);
    }

    #[test]
    fn a_name_that_would_be_a_line_of_its_own_has_none() {
        for name in ["x\njit 2f8a1c0d7e5b4a39 y", "x#y", " x", "", "x\u{1b}[2J"] {
            assert_eq!(trust_line(TrustedAs::Code, ID, name), None, "{name:?}");
        }
    }

    #[test]
    fn a_reviewed_file_is_no_engine() {
        let trust = Trust::parse(&format!("code\t {ID}   x\n")).unwrap();
        assert_eq!(trust.find(ID, &["x"], TrustedAs::Code), Some(1));
        assert_eq!(trust.find(ID, &["x"], TrustedAs::Engine), None);
    }

    #[test]
    fn what_is_no_line_is_named() {
        for (text, what) in [
            ("\nlibfoo.so\n", "line 2: must begin with"),
            ("code 2f8a1c0d7e5b4a39\n", "line 1: must be `code BUILD-ID NAME`"),
            ("jit 2f8a x\n", "line 1: the build-id must be"),
        ] {
            assert!(Trust::parse(text).unwrap_err().to_string().starts_with(what), "{text}");
        }
    }
}
