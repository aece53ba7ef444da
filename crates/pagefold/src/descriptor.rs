//! What a partition's descriptor holds: where its broker listens, and the secret that lets in.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use broker::Token;
use kernel::{Bytes, memfd};

use crate::error::Error;

/// First bytes of a partition's descriptor.
const MAGIC: [u8; 16] = *b"pagefold-part\0\0\x01";
/// Longest abstract socket name.
const NAME_MAX: usize = 107;
/// Magic, secret, length of the name.
const HEAD: usize = 16 + 16 + 8;

/// What it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Card {
    pub(crate) name: String,
    pub(crate) token: Token,
}

impl Card {
    /// Writes it into a sealed memory file.
    pub(crate) fn write(&self) -> Result<OwnedFd, Error> {
        let mut content = MAGIC.to_vec();
        content.extend_from_slice(&self.token.0.to_le_bytes());
        content.extend_from_slice(&self.token.1.to_le_bytes());
        content.extend_from_slice(&(self.name.len() as u64).to_le_bytes());
        content.extend_from_slice(self.name.as_bytes());
        let file = memfd::create("pagefold-partition", Bytes(content.len() as u64)).map_err(Error::Descriptor)?;
        memfd::pwrite(file.as_fd(), 0, &content).map_err(Error::Descriptor)?;
        memfd::seal(file.as_fd()).map_err(Error::Descriptor)?;
        memfd::restrict_to_owner(file.as_fd()).map_err(Error::Descriptor)?;
        Ok(file)
    }

    /// Reads it from a descriptor, if it is a partition's.
    pub(crate) fn read(fd: BorrowedFd<'_>) -> Result<Self, Error> {
        // Only what nobody can change any more is believed to be what `write` made.
        if !memfd::is_sealed(fd).unwrap_or(false) {
            return Err(Error::NotAPartition);
        }
        let mut content = vec![0; HEAD + NAME_MAX + 1];
        let length = memfd::pread(fd, 0, &mut content).map_err(|_not_readable| Error::NotAPartition)?;
        let word = |at: usize| content[at..at + 8].iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        let name_length = usize::try_from(word(32)).unwrap_or(usize::MAX);
        if length < HEAD || content[..16] != MAGIC || name_length > NAME_MAX || length != HEAD + name_length {
            return Err(Error::NotAPartition);
        }
        let name = std::str::from_utf8(&content[HEAD..length]).map_err(|_no_text| Error::NotAPartition)?;
        Ok(Self { name: name.to_owned(), token: Token(word(16), word(24)) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_card_survives_its_file_and_nothing_else_is_taken_for_one() {
        let card = Card { name: "pagefold-0123".to_owned(), token: Token(1 << 60, u64::MAX) };
        assert_eq!(Card::read(card.write().unwrap().as_fd()).unwrap(), card);

        let refused = |content: &[u8], seal: bool| {
            let file = memfd::create("other", Bytes(content.len() as u64)).unwrap();
            memfd::pwrite(file.as_fd(), 0, content).unwrap();
            if seal {
                memfd::seal(file.as_fd()).unwrap();
            }
            matches!(Card::read(file.as_fd()), Err(Error::NotAPartition))
        };
        let mut good = MAGIC.to_vec();
        good.extend_from_slice(&[0; 16]);
        good.extend_from_slice(&3_u64.to_le_bytes());
        good.extend_from_slice(b"abc");
        assert!(refused(&good, false), "not sealed");
        assert!(!refused(&good, true));
        assert!(refused(&good[..good.len() - 1], true), "cut off");
        assert!(refused(b"short", true) && refused(&[0; 64], true));
        let pipe = std::io::pipe().unwrap();
        assert!(matches!(Card::read(pipe.0.as_fd()), Err(Error::NotAPartition)));
    }
}
