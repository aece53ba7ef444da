//! A page of the kernel's ring buffer (`events/header_page`, `events/header_event`).

use super::format::{Field, parse_field};

/// Where things are in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    timestamp: Field,
    commit: Field,
    data: Field,
}

impl PageLayout {
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let text = str::from_utf8(text).ok()?;
        let field =
            |name: &str| text.lines().filter_map(parse_field).find(|(known, _)| known == name).map(|(_, at)| at);
        Some(Self { timestamp: field("timestamp")?, commit: field("commit")?, data: field("data")? })
    }

    /// Bytes of a page.
    pub(super) const fn page_size(self) -> usize {
        self.data.offset + self.data.size
    }
}

/// The part of a page's `commit` that says how many bytes of records it has; above are marks of lost records.
const LENGTH: u64 = (1 << 27) - 1;

/// What a record's five bits of type say, beside lengths in words.
const LONG: u32 = 0;
const PADDING: u32 = 29;
const TIME_EXTEND: u32 = 30;
const TIME_STAMP: u32 = 31;

/// The records of a page, each with its time. What does not look like a record ends it.
pub(super) fn records(page: &[u8], layout: PageLayout) -> impl Iterator<Item = (u64, &[u8])> {
    let time = layout.timestamp.unsigned(page).unwrap_or(0);
    let length = (layout.commit.unsigned(page).unwrap_or(0) & LENGTH) as usize;
    let end = layout.data.offset.saturating_add(length).min(page.len());
    Records { rest: page.get(layout.data.offset..end).unwrap_or_default(), time }
}

struct Records<'a> {
    rest: &'a [u8],
    time: u64,
}

impl<'a> Records<'a> {
    fn word(&self, index: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(self.rest.get(4 * index..4 * index + 4)?.try_into().ok()?))
    }

    fn skip(&mut self, bytes: usize) -> Option<()> {
        self.rest = self.rest.get(bytes..)?;
        Some(())
    }
}

impl<'a> Iterator for Records<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let head = self.word(0)?;
            // Bit fields lie as the machine's byte order has them.
            let (kind, delta) =
                if cfg!(target_endian = "little") { (head & 31, head >> 5) } else { (head >> 27, head & 0x07ff_ffff) };
            match kind {
                // Without a time nothing follows; with one it is a record that was given up, whose time is in the next.
                PADDING if delta == 0 => return None,
                PADDING => self.skip(4 + self.word(1)? as usize)?,
                TIME_EXTEND => {
                    self.time = self.time.wrapping_add(u64::from(delta) + (u64::from(self.word(1)?) << 27));
                    self.skip(8)?;
                }
                TIME_STAMP => {
                    // 59 bits of the time itself.
                    let low = u64::from(delta) + (u64::from(self.word(1)?) << 27);
                    self.time = (self.time & !((1 << 59) - 1)) | low;
                    self.skip(8)?;
                }
                _ => {
                    self.time = self.time.wrapping_add(delta.into());
                    // The length in words, or a word of its own that counts itself.
                    let (begin, length) =
                        if kind == LONG { (8, self.word(1)? as usize + 4) } else { (4, kind as usize * 4 + 4) };
                    let record = self.rest.get(begin..length)?;
                    self.skip(length)?;
                    return Some((self.time, record));
                }
            }
        }
    }
}
