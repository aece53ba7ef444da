//! How often memory is protected again so that its next write is noticed.
//!
//! Each page that is written after that costs its program a fault. What is written all the time, as the reference counts of
//! interpreters are, would pay for it in every cycle, and nothing is ever merged there. So such memory is protected less and
//! less often. What was written since the last time is known all the same, without a fault, and counts as written in each
//! cycle until then; pages beside it that nobody writes settle as they do elsewhere.

use page::{PageNumber, PageRange};

/// Pages that are protected together.
const CHUNK: u64 = 512;
/// Of a chunk so many pages may be written in every cycle: they cost next to nothing.
const LUKEWARM: u64 = CHUNK / 16;
/// Times in a row that more is written before it counts as hot: data is loaded once, and then stays.
const PATIENT: u8 = 2;
/// From then on each time comes after four times as many cycles as the one before, up to 4 to the power of this.
const SELDOM: u8 = 4;

#[derive(Clone, Copy, Debug, Default)]
struct Chunk {
    /// Protections in a row after which many pages had been written when it came to the next.
    hot: u8,
    /// Cycles until the next.
    wait: u16,
    /// Pages seen written in this cycle.
    written: u64,
}

/// The chunks of one area.
#[derive(Debug)]
pub(crate) struct Heat {
    pages: PageRange,
    chunks: Vec<Chunk>,
}

impl Heat {
    /// Nothing is known yet.
    pub(crate) fn new(pages: PageRange) -> Self {
        let chunks = usize::try_from(pages.pages().div_ceil(CHUNK)).expect("chunks are fewer than pages");
        Self { pages, chunks: vec![Chunk::default(); chunks] }
    }

    /// The pieces of the area to be scanned in this cycle, each with whether what was written there is protected again.
    pub(crate) fn turns(&mut self) -> Vec<(PageRange, bool)> {
        let mut turns: Vec<(PageRange, bool)> = Vec::new();
        let pages = self.pages;
        for (index, chunk) in self.chunks.iter_mut().enumerate() {
            chunk.written = 0;
            let due = chunk.wait == 0;
            let start = pages.start.offset(index as u64 * CHUNK);
            let end = PageNumber((start.0 + CHUNK).min(pages.end.0));
            match turns.last_mut() {
                Some((before, protects)) if *protects == due => before.end = end,
                _ => turns.push((PageRange::new(start, end), due)),
            }
        }
        turns
    }

    /// Pages of a piece were written.
    pub(crate) fn written(&mut self, pages: PageRange) {
        let inside = pages.intersection(self.pages);
        let mut at = inside.start;
        while at < inside.end {
            let index = (at.0 - self.pages.start.0) / CHUNK;
            let end = PageNumber((self.pages.start.0 + (index + 1) * CHUNK).min(inside.end.0));
            self.chunks[index as usize].written += end.0 - at.0;
            at = end;
        }
    }

    /// The cycle is over: says when each chunk is protected the next time.
    pub(crate) fn cool(&mut self) {
        for chunk in &mut self.chunks {
            if chunk.wait > 0 {
                chunk.wait -= 1;
                continue;
            }
            chunk.hot = if chunk.written > LUKEWARM { chunk.hot.saturating_add(1) } else { 0 };
            let times = chunk.hot.saturating_sub(PATIENT).min(SELDOM);
            chunk.wait = (1 << (2 * times)) - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(start: u64, end: u64) -> PageRange {
        PageRange::new(PageNumber(start), PageNumber(end))
    }

    /// Cycles in which the piece with a page is protected, of so many in which `written` is.
    fn protections(heat: &mut Heat, page: u64, cycles: u32, written: PageRange) -> u32 {
        let mut count = 0;
        for _ in 0..cycles {
            let turns = heat.turns();
            assert_eq!(turns.iter().map(|(piece, _)| piece.pages()).sum::<u64>(), heat.pages.pages());
            count += u32::from(turns.iter().any(|(piece, protects)| *protects && piece.contains(PageNumber(page))));
            heat.written(written);
            heat.cool();
        }
        count
    }

    #[test]
    fn what_is_hot_is_protected_seldom() {
        let mut heat = Heat::new(pages(100, 100 + 3 * CHUNK));
        let hot = pages(100 + CHUNK + 7, 100 + CHUNK + 7 + 100);
        // Three in a row, then after 4, 16, 64, 256 cycles.
        assert_eq!(protections(&mut heat, 100 + CHUNK, 3 + 340, hot), 3 + 4);
        assert_eq!(protections(&mut heat, 100 + CHUNK, 2560, hot), 10);
        // Its neighbours are as before.
        assert_eq!(protections(&mut heat, 100, 50, hot), 50);
        assert_eq!(protections(&mut heat, 100 + 2 * CHUNK, 50, hot), 50);
    }

    #[test]
    fn what_is_left_alone_is_watched_closely_again() {
        let mut heat = Heat::new(pages(0, CHUNK));
        protections(&mut heat, 0, 50, pages(0, CHUNK));
        // At the next turn, which comes after 64 cycles at most, it is seen to have cooled.
        protections(&mut heat, 0, 64, pages(0, 0));
        assert_eq!(protections(&mut heat, 0, 20, pages(0, 0)), 20);
    }

    #[test]
    fn some_pages_in_a_chunk_change_nothing() {
        let mut heat = Heat::new(pages(0, 2 * CHUNK));
        assert_eq!(protections(&mut heat, 0, 100, pages(CHUNK - LUKEWARM, CHUNK + LUKEWARM)), 100);
    }

    #[test]
    fn what_is_loaded_once_is_not_hot() {
        let mut heat = Heat::new(pages(0, CHUNK));
        for _ in 0..20 {
            protections(&mut heat, 0, 2, pages(0, CHUNK));
            assert_eq!(protections(&mut heat, 0, 1, pages(0, 0)), 1);
        }
    }
}
