//! Pages of other processes as the source of a fill.

use kernel::remote::{ReadOutcome, read_ranges};
use kernel::{PageCount, Pid, Range, Vaddr, page_size};
use page::PageNumber;

use crate::fill::{FillRequest, PageReads};

/// A page of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessPage {
    /// The process.
    pub pid: Pid,
    /// Which of its pages.
    pub page: PageNumber,
}

/// Reads pages of processes for [`Partition::fill`](crate::Partition::fill), with one call for all pages in a row that
/// belong to one process. Pages that are not there, and those of processes that are gone or may not be read, stay
/// unread.
pub fn read_processes(requests: &[FillRequest<ProcessPage>], reads: &mut PageReads<'_>) {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < requests.len() {
        let pid = requests[at].source.pid;
        let same = requests[at..].iter().take_while(|request| request.source.pid == pid).count();
        join_neighbours(&requests[at..at + same], &mut ranges);
        match read_ranges(pid, &ranges, reads.slots(at, same)) {
            Ok(outcome @ (ReadOutcome::Complete { .. } | ReadOutcome::Partial { .. })) => {
                let read = usize::try_from(outcome.bytes().pages().0).expect("no more than was asked for");
                reads.mark(at, read);
                // The page at which it stopped is not there; those behind it may be.
                at += (read + 1).min(same);
            }
            // One process that is gone or forbidden says nothing of the others.
            Ok(ReadOutcome::Gone) | Err(_) => at += same,
        }
    }
}

fn join_neighbours(requests: &[FillRequest<ProcessPage>], ranges: &mut Vec<Range>) {
    ranges.clear();
    for run in requests.chunk_by(|before, after| before.source.page.next() == after.source.page) {
        let start = Vaddr(run[0].source.page.address(page_size()));
        let range = Range::from_pages(start, PageCount(run.len() as u64)).expect("pages of user space");
        ranges.push(range);
    }
}
