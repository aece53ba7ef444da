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
    /// Protections in a row after which many pages were written in one cycle.
    hot: u8,
    /// Cycles until the next.
    wait: u16,
    /// It was protected in the cycle before: what is written now is what one cycle brings.
    fresh: bool,
    /// Pages seen written in this cycle, or since they were protected.
    written: u64,
}

/// The chunks of one area, cut where huge pages begin.
#[derive(Debug)]
pub(crate) struct Heat {
    pages: PageRange,
    chunks: Vec<Chunk>,
}

impl Heat {
    /// Nothing is known yet.
    pub(crate) fn new(pages: PageRange) -> Self {
        let count = pages.end.0.div_ceil(CHUNK).saturating_sub(pages.start.0 / CHUNK);
        let count = usize::try_from(count).expect("chunks are fewer than pages");
        Self { pages, chunks: vec![Chunk::default(); count] }
    }

    /// The pieces of the area to be scanned in this cycle, each with whether what was written there is protected again.
    pub(crate) fn turns(&mut self) -> Vec<(PageRange, bool)> {
        let mut turns: Vec<(PageRange, bool)> = Vec::new();
        let first = self.pages.start.0 / CHUNK;
        for (number, chunk) in (first..).zip(&mut self.chunks) {
            chunk.written = 0;
            let due = chunk.wait == 0;
            let whole = PageRange::new(PageNumber(number * CHUNK), PageNumber((number + 1) * CHUNK));
            let piece = whole.intersection(self.pages);
            match turns.last_mut() {
                Some((before, protects)) if *protects == due => before.end = piece.end,
                _ => turns.push((piece, due)),
            }
        }
        turns
    }

    /// Pages of a piece were written.
    pub(crate) fn written(&mut self, pages: PageRange) {
        let inside = pages.intersection(self.pages);
        let first = self.pages.start.0 / CHUNK;
        let mut at = inside.start.0;
        while at < inside.end.0 {
            let number = at / CHUNK;
            let end = ((number + 1) * CHUNK).min(inside.end.0);
            self.chunks[(number - first) as usize].written += end - at;
            at = end;
        }
    }

    /// The cycle is over: says when each chunk is protected the next time.
    pub(crate) fn cool(&mut self) {
        for chunk in &mut self.chunks {
            let protected = chunk.wait == 0;
            if chunk.fresh {
                chunk.hot = if chunk.written > LUKEWARM { chunk.hot.saturating_add(1) } else { 0 };
            }
            chunk.wait = match (protected, chunk.fresh && chunk.hot == 0) {
                (true, _) => (1 << (2 * chunk.hot.saturating_sub(PATIENT).min(SELDOM))) - 1,
                // It has cooled.
                (false, true) => 0,
                (false, false) => chunk.wait - 1,
            };
            chunk.fresh = protected;
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
        let mut heat = Heat::new(pages(CHUNK - 100, 3 * CHUNK));
        let hot = pages(CHUNK + 7, CHUNK + 7 + 100);
        // Four in a row, then after 4, 16, 64, 256 cycles.
        assert_eq!(protections(&mut heat, CHUNK, 4 + 4 + 16 + 64 + 256, hot), 4 + 4);
        assert_eq!(protections(&mut heat, CHUNK, 2560, hot), 10);
        // Its neighbours are as before.
        assert_eq!(protections(&mut heat, CHUNK - 1, 50, hot), 50);
        assert_eq!(protections(&mut heat, 2 * CHUNK, 50, hot), 50);
    }

    #[test]
    fn what_is_left_alone_is_watched_closely_again() {
        let mut heat = Heat::new(pages(0, CHUNK));
        protections(&mut heat, 0, 50, pages(0, CHUNK));
        // All of it was written since its last turn, and nothing in the cycle after the next, which comes after 64.
        for cycle in 0..70 {
            let due = heat.turns()[0].1;
            heat.written(if due || cycle < 30 { pages(0, CHUNK) } else { pages(0, 0) });
            heat.cool();
        }
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
