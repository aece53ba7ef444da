//! What a scan would say, from the pagemap's words: for kernels before PAGEMAP_SCAN.

use super::{Category, Pagemap, PagemapEntry, PagemapError, Region, ScanRequest};
use crate::units::{PageCount, Range, Vaddr};

/// Words read in one call.
const AT_ONCE: usize = 512;

/// What words tell.
const TOLD: Category = Category::PRESENT.union(Category::SWAPPED).union(Category::FILE);
/// What they do not tell, and whoever asks for it can do without: a zero page is seen to be one when it is read, and
/// whether a page belongs to a huge one decides only how gladly it is split.
const TAKEN_FOR_NOT_SO: Category = Category::PFNZERO.union(Category::HUGE);

impl ScanRequest {
    /// True if words can answer: nothing is to be protected, and nobody asks what was written.
    pub(super) fn is_in_words(&self) -> bool {
        let asked = self.mask | self.anyof | self.ret;
        !self.wp_matching
            && !self.check_wpasync
            && self.max_pages == PageCount(0)
            && TOLD.union(TAKEN_FOR_NOT_SO).contains(asked)
    }

    /// What is to be reported of a page, or `None` if it does not match (fs/proc/task_mmu.c, `pagemap_scan_output`).
    fn reports(&self, categories: Category) -> Option<Category> {
        let seen = categories ^ self.inverted;
        let any = self.anyof.is_empty() || seen.intersects(self.anyof);
        (seen.contains(self.mask) && any).then_some(categories & self.ret)
    }
}

fn categories(entry: PagemapEntry) -> Category {
    let mut categories = Category::empty();
    categories.set(Category::PRESENT, entry.present());
    categories.set(Category::SWAPPED, entry.swapped());
    categories.set(Category::FILE, entry.file_or_shared());
    categories
}

impl Pagemap {
    /// Reads the words of a range and adds the runs that match. The range must not be larger than what may be walked at
    /// once.
    pub(super) fn scan_words(
        &self,
        range: Range,
        request: &ScanRequest,
        out: &mut Vec<Region>,
    ) -> Result<(), PagemapError> {
        let mut words = [PagemapEntry(0); AT_ONCE];
        let mut at = range.start();
        while at < range.end() {
            let wanted = Range::new(at, range.end()).map_or(0, |rest| rest.pages().get());
            let wanted = usize::try_from(wanted).unwrap_or(AT_ONCE).min(AT_ONCE);
            let read = self.entries(at, &mut words[..wanted])?;
            if read == 0 {
                return Err(PagemapError::Ended);
            }
            for word in &words[..read] {
                if let Some(reported) = request.reports(categories(*word)) {
                    add(out, at, reported);
                }
                at = at + PageCount(1);
            }
        }
        Ok(())
    }
}

/// Adds a page to the last run, or begins another one.
fn add(out: &mut Vec<Region>, at: Vaddr, categories: Category) {
    if let Some(last) = out.last_mut()
        && last.range.end() == at
        && last.categories == categories
        && let Ok(range) = Range::new(last.range.start(), at + PageCount(1))
    {
        last.range = range;
        return;
    }
    if let Ok(range) = Range::from_pages(at, PageCount(1)) {
        out.push(Region { range, categories });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::Anonymous;
    use crate::units::{Pid, page_size};

    #[test]
    fn words_say_what_a_scan_says() {
        let pages = AT_ONCE as u64 + 90;
        let memory = Anonymous::new(PageCount(pages));
        memory.advise(rustix::mm::Advice::LinuxNoHugepage);
        for page in (0..pages).filter(|page| page % 7 < 4) {
            memory.write(page * page_size(), 1);
        }
        let pagemap = Pagemap::open(Pid::this()).unwrap();
        let anonymous = ScanRequest {
            inverted: Category::FILE | Category::PFNZERO | Category::SWAPPED,
            mask: Category::PRESENT | Category::FILE | Category::PFNZERO | Category::SWAPPED,
            ret: Category::HUGE,
            ..ScanRequest::default()
        };
        let missing = ScanRequest {
            inverted: Category::PRESENT,
            mask: Category::PRESENT,
            anyof: Category::PRESENT | Category::FILE,
            ret: Category::PRESENT | Category::FILE,
            ..ScanRequest::default()
        };
        for request in [anonymous, missing] {
            let (mut words, mut scanned) = (Vec::new(), Vec::new());
            pagemap.scan_words(memory.range(), &request, &mut words).unwrap();
            assert!(words.len() > 80, "{words:?}");
            match pagemap.scan_all(memory.range(), &request, &mut scanned) {
                // Where nothing was ever mapped the kernel skips what a word calls "not there".
                Ok(()) if request == missing => {
                    assert!(scanned.iter().all(|region| words.contains(region)), "{scanned:?}");
                }
                other => {
                    other.unwrap();
                    assert_eq!(words, scanned);
                }
            }
        }
    }

    #[test]
    fn what_words_cannot_tell_is_not_made_up() {
        assert!(!ScanRequest::collect_written().is_in_words());
        let written = ScanRequest { mask: Category::WRITTEN, ..ScanRequest::default() };
        assert!(!written.is_in_words());
        let present = ScanRequest { mask: Category::PRESENT, ret: Category::HUGE, ..ScanRequest::default() };
        assert!(present.is_in_words());
        assert!(!ScanRequest { max_pages: PageCount(1), ..present }.is_in_words());
        assert!(!ScanRequest { ret: Category::all(), ..present }.is_in_words());
    }
}
