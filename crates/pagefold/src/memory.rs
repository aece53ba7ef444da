//! This process's memory: its whole pages, what may be handed over, and what of it is the store's.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize};
use std::time::Duration;

use kernel::{Category, Pagemap, Pid, Range, ScanRequest, Vaddr, Vma};
use store::mappings::is_segment;

use crate::error::Error;

/// Byte behind the last address that a range can have.
pub const ADDRESS_END: u64 = 1 << 47;

/// How often the mappings are read until a range counts as refused, and how far apart: while other threads change theirs,
/// or pages are being exchanged, one may be missing from a list.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);

/// Integers and atomics: types whose every byte has a value.
pub trait Plain: sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

macro_rules! plain {
    ($($kind:ty)*) => { $(impl sealed::Sealed for $kind {} impl Plain for $kind {})* };
}

plain! { u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize f32 f64 AtomicU8 AtomicU16 AtomicU32 AtomicU64 AtomicUsize }

/// The whole pages inside a piece of memory; `None` if there are none.
#[must_use]
pub fn whole_pages<T>(memory: &[T]) -> Option<Range> {
    whole_pages_at(memory.as_ptr().addr() as u64, size_of_val(memory) as u64)
}

/// The whole pages inside `size` bytes from an address on, whatever lies there; `None` if there are none, or the address
/// space ends before.
#[must_use]
pub fn whole_pages_at(start: u64, size: u64) -> Option<Range> {
    let end = Vaddr(start.checked_add(size)?).page_start();
    let start = start.checked_next_multiple_of(kernel::page_size())?;
    Range::new(Vaddr(start), end).ok().filter(|range| !range.is_empty())
}

/// Refuses ranges that are not throughout memory of a kind that can be merged. Looks at mappings and never at pages: a
/// wrong length may be that of half the address space.
pub(crate) fn check(ranges: &[Range]) -> Result<(), Error> {
    let mut looks = 1;
    loop {
        let mut maps = kernel::maps::read(Pid::this()).map_err(Error::Mappings)?;
        maps.sort_by_key(|vma| vma.range.start());
        let refused = ranges.iter().find_map(|range| {
            let (address, what) = obstacle(*range, &maps)?;
            Some(Error::NotMergeable { range: *range, address, what })
        });
        match refused {
            None => return Ok(()),
            Some(error) if looks == LOOKS => return Err(error),
            Some(_) => looks += 1,
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
}

/// Where a range is not what can be merged, and what is there.
fn obstacle(range: Range, maps: &[Vma]) -> Option<(Vaddr, &'static str)> {
    let mut at = range.start();
    for vma in maps {
        let Some(part) = vma.range.intersect(&range) else { continue };
        if at < part.start() {
            break;
        }
        let what = match vma {
            vma if vma.shared => Some("a shared mapping"),
            vma if vma.is_special() => Some("a page of the kernel's"),
            vma if vma.inode != 0 && !is_segment(vma) => Some("a mapping of a file"),
            _ => None,
        };
        if let Some(what) = what {
            return Some((part.start(), what));
        }
        at = at.max(part.end());
    }
    let end = Vaddr(ADDRESS_END);
    if at < range.end().min(end) {
        Some((at, "nothing mapped"))
    } else {
        (range.end() > end).then_some((end, "no memory of a program's"))
    }
}

/// The parts of a range that show the store.
pub(crate) fn store_mappings(range: Range) -> Vec<Range> {
    let maps = kernel::maps::read(Pid::this()).unwrap_or_default();
    let ours = maps.iter().filter(|vma| is_segment(vma));
    ours.filter_map(|vma| vma.range.intersect(&range)).filter(|part| !part.is_empty()).collect()
}

/// Pages of a range that are the store's and not this process's own.
pub(crate) fn store_pages(range: Range) -> u64 {
    let Ok(pagemap) = Pagemap::open(Pid::this()) else { return 0 };
    let own = ScanRequest {
        inverted: Category::FILE,
        mask: Category::PRESENT | Category::FILE,
        ret: Category::PRESENT,
        ..ScanRequest::default()
    };
    let mut regions = Vec::new();
    let shared = |part: Range| match pagemap.scan_all(part, &own, &mut regions) {
        Ok(()) => part.pages().get() - regions.iter().map(|region| region.range.pages().get()).sum::<u64>(),
        Err(_) => 0,
    };
    store_mappings(range).into_iter().map(shared).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Rounding up without a look wraps around to the whole address space, and panics where overflow is checked.
    #[test]
    fn whole_pages_end_with_the_address_space() {
        let size = kernel::page_size();
        assert_eq!(whole_pages_at(0xffff_ffff_ffff_f001, 100), None);
        assert_eq!(whole_pages_at(u64::MAX, 1), None);
        assert_eq!(whole_pages_at(size, size - 1), None);
        assert_eq!(whole_pages_at(size - 1, size + 1), Range::new(Vaddr(size), Vaddr(2 * size)).ok());
    }

    #[test]
    fn what_cannot_be_merged_is_found() {
        let size = kernel::page_size();
        let range = |start: u64, end: u64| Range::new(Vaddr(start * size), Vaddr(end * size)).unwrap();
        let vma = |start, end| Vma { range: range(start, end), ..Vma::default() };
        let file = |name: &str| Vma { inode: 7, name: name.into(), ..vma(20, 30) };
        let at = |page: u64, what| Some((Vaddr(page * size), what));
        let maps = [vma(1, 10), vma(10, 20), file("/memfd:pagefold-x (deleted)"), vma(31, 40)];
        assert_eq!(obstacle(range(5, 30), &maps), None);
        assert_eq!(obstacle(range(0, 30), &maps), at(0, "nothing mapped"));
        assert_eq!(obstacle(range(12, 35), &maps), at(30, "nothing mapped"));
        assert_eq!(obstacle(range(32, 41), &maps), at(40, "nothing mapped"));
        assert_eq!(obstacle(range(12, 25), &[vma(10, 20), file("/lib")]), at(20, "a mapping of a file"));
        let shared = Vma { shared: true, ..vma(8, 20) };
        assert_eq!(obstacle(range(12, 13), &[shared]), at(12, "a shared mapping"));
        let end = ADDRESS_END / size;
        assert_eq!(obstacle(range(end - 2, end + 2), &[vma(end - 3, end)]), at(end, "no memory of a program's"));
    }
}
