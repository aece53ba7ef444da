//! Messages between helper and broker: one fixed-size packet each, over a SOCK_SEQPACKET socket.
//!
//! The order at the start: helper `Hello` (with the control memfd), broker `Welcome` (with a descriptor of
//! /dev/userfaultfd where it has one), helper `Userfault` (with the new userfaultfd, on which it has not made the
//! UFFDIO_API handshake), broker `Ready` (the handshake is made). Then `Segment`s and `Run`s against `Done`s. A helper that
//! must not be says `Declined` and nothing else.

/// Bytes of a packet.
pub const PACKET: usize = 64;
const WORDS: usize = PACKET / 8;

/// A partition's secret: whoever knows it may be a member.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub u64, pub u64);

impl core::fmt::Debug for Token {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// One message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Helper: who I am. Carries the control memfd.
    Hello {
        /// Version of the control area.
        version: u32,
        /// Process id of the program.
        member: u32,
        /// Where the control area is mapped in the program.
        control: u64,
        /// Scratch area for plain pages.
        scratch: u64,
        /// Scratch area for pages of store mappings.
        diverged_scratch: u64,
        /// What proves that the helper was given this partition.
        token: Token,
    },
    /// Broker: go on. May carry a descriptor of /dev/userfaultfd.
    Welcome {
        /// 1 if a descriptor of /dev/userfaultfd comes with it.
        device: u32,
    },
    /// Helper: here is a userfaultfd of this address space, or why there is none.
    Userfault {
        /// 0, or the error number.
        errno: u32,
    },
    /// Broker: the descriptor is ready for use. May carry a BPF program that counts the references to the pages in the
    /// scratch areas (see `own_counts` in the kernel room); without it the broker is asked.
    Ready {
        /// True if MOVE can be used.
        move_pages: bool,
        /// True if pages of store mappings can be frozen (MINOR on shmem).
        minor: bool,
    },
    /// Broker: segment `index` has this descriptor and this many pages.
    Segment {
        /// Number that plans use.
        index: u32,
        /// Size in pages.
        pages: u32,
    },
    /// Broker: segment `index` is not needed any more.
    Retire {
        /// Number that plans use.
        index: u32,
    },
    /// Broker: execute the plan.
    Run,
    /// Helper: the plan is done.
    Done {
        /// Entries that were finished.
        count: u32,
    },
    /// Broker: put this memory under management, if it is still private anonymous memory that can be written. No answer:
    /// the table of ranges tells.
    Adopt {
        /// First byte.
        start: u64,
        /// Byte behind the range.
        end: u64,
    },
    /// Broker: register this memory for the tracking of writes, if all of it still is managed. No answer: the next look
    /// tells.
    Track {
        /// First byte.
        start: u64,
        /// Byte behind the range.
        end: u64,
    },
    /// Broker, instead of `Welcome`: this program is not managed, and no child of its own code will be.
    Unwanted,
    /// Broker, at its end: nothing is merged any more, but give back what the program asks for. The helper says the same
    /// once no memory is registered any more, or leaves.
    Stay,
    /// Broker: leave.
    Leave,
    /// Helper, instead of `Hello`: I do not come, since a program would notice whose child I should become.
    Declined {
        /// Process id of the program.
        member: u32,
        /// What proves that the helper was given this partition.
        token: Token,
    },
}

impl Message {
    /// The packet for this message.
    #[must_use]
    pub fn encode(self) -> [u8; PACKET] {
        let words: [u64; WORDS] = match self {
            Self::Hello { version, member, control, scratch, diverged_scratch, token } => {
                let ids = u64::from(version) << 32 | u64::from(member);
                [1, ids, control, scratch, diverged_scratch, token.0, token.1, 0]
            }
            Self::Welcome { device } => [2, device.into(), 0, 0, 0, 0, 0, 0],
            Self::Userfault { errno } => [3, errno.into(), 0, 0, 0, 0, 0, 0],
            Self::Ready { move_pages, minor } => [4, move_pages.into(), minor.into(), 0, 0, 0, 0, 0],
            Self::Segment { index, pages } => [5, index.into(), pages.into(), 0, 0, 0, 0, 0],
            Self::Retire { index } => [6, index.into(), 0, 0, 0, 0, 0, 0],
            Self::Run => [7, 0, 0, 0, 0, 0, 0, 0],
            Self::Done { count } => [8, count.into(), 0, 0, 0, 0, 0, 0],
            Self::Leave => [9, 0, 0, 0, 0, 0, 0, 0],
            Self::Declined { member, token } => [10, member.into(), token.0, token.1, 0, 0, 0, 0],
            Self::Adopt { start, end } => [11, start, end, 0, 0, 0, 0, 0],
            Self::Unwanted => [13, 0, 0, 0, 0, 0, 0, 0],
            Self::Stay => [14, 0, 0, 0, 0, 0, 0, 0],
            Self::Track { start, end } => [12, start, end, 0, 0, 0, 0, 0],
        };
        let mut packet = [0; PACKET];
        let (chunks, _) = packet.as_chunks_mut::<8>();
        for (chunk, word) in chunks.iter_mut().zip(words) {
            *chunk = word.to_le_bytes();
        }
        packet
    }

    /// The message in a packet; `None` if it is none.
    #[must_use]
    pub fn decode(packet: &[u8]) -> Option<Self> {
        let (chunks, rest) = packet.as_chunks::<8>();
        if chunks.len() != WORDS || !rest.is_empty() {
            return None;
        }
        let word = |index: usize| u64::from_le_bytes(chunks[index]);
        let short = |index: usize| word(index) as u32;
        Some(match word(0) {
            1 => Self::Hello {
                version: (word(1) >> 32) as u32,
                member: short(1),
                control: word(2),
                scratch: word(3),
                diverged_scratch: word(4),
                token: Token(word(5), word(6)),
            },
            2 => Self::Welcome { device: short(1) },
            3 => Self::Userfault { errno: short(1) },
            4 => Self::Ready { move_pages: word(1) == 1, minor: word(2) == 1 },
            5 => Self::Segment { index: short(1), pages: short(2) },
            6 => Self::Retire { index: short(1) },
            7 => Self::Run,
            8 => Self::Done { count: short(1) },
            9 => Self::Leave,
            10 => Self::Declined { member: short(1), token: Token(word(2), word(3)) },
            11 => Self::Adopt { start: word(1), end: word(2) },
            12 => Self::Track { start: word(1), end: word(2) },
            13 => Self::Unwanted,
            14 => Self::Stay,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_a_packet() {
        let all = [
            Message::Hello {
                version: 1,
                member: 2,
                control: 3 << 40,
                scratch: 4,
                diverged_scratch: 5,
                token: Token(6, 7),
            },
            Message::Welcome { device: 1 },
            Message::Userfault { errno: 13 },
            Message::Ready { move_pages: true, minor: false },
            Message::Segment { index: 7, pages: 256 },
            Message::Retire { index: 7 },
            Message::Run,
            Message::Done { count: 9 },
            Message::Adopt { start: 1 << 40, end: 1 << 41 },
            Message::Track { start: 1 << 40, end: 1 << 41 },
            Message::Unwanted,
            Message::Stay,
            Message::Leave,
            Message::Declined { member: 2, token: Token(6, 7) },
        ];
        for message in all {
            assert_eq!(Message::decode(&message.encode()), Some(message));
        }
        assert_eq!(Message::decode(&[0; PACKET]), None);
        assert_eq!(Message::decode(&[1; 8]), None);
    }
}
