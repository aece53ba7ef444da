//! From a page's number in the snapshot back to where it is.

use page::PageNumber;

use crate::walk::{Mapping, Span, Walk};

/// Pages that share one entry of the table, as a power of two.
const STRIDE: u32 = 6;

/// The spans of a walk, with a table that finds the span of a number in one step or a few.
pub(crate) struct Numbers<'a> {
    walk: &'a Walk,
    processes: usize,
    /// For each stride of numbers, the span that holds its first.
    table: Vec<u32>,
}

impl<'a> Numbers<'a> {
    pub(crate) fn new(walk: &'a Walk, processes: usize) -> Self {
        let strides = walk.pages.div_ceil(1 << STRIDE);
        let mut at = 0;
        let table = (0..strides)
            .map(|stride| {
                let first = stride << STRIDE;
                while u64::from(walk.spans[at].first) + u64::from(walk.spans[at].pages) <= first {
                    at += 1;
                }
                u32::try_from(at).expect("no more spans than pages")
            })
            .collect();
        Self { walk, processes, table }
    }

    pub(crate) fn pages(&self) -> u64 {
        self.walk.pages
    }

    pub(crate) fn mappings(&self) -> usize {
        self.walk.mappings.len()
    }

    pub(crate) fn processes(&self) -> usize {
        self.processes
    }

    /// The span that a page belongs to.
    pub(crate) fn span(&self, page: u32) -> &'a Span {
        let mut at = self.table[(page >> STRIDE) as usize] as usize;
        while page - self.walk.spans[at].first >= self.walk.spans[at].pages {
            at += 1;
        }
        &self.walk.spans[at]
    }

    pub(crate) fn mapping(&self, mapping: u32) -> &'a Mapping {
        &self.walk.mappings[mapping as usize]
    }

    pub(crate) fn process_of(&self, mapping: u32) -> u32 {
        self.mapping(mapping).process
    }

    /// Where a page of `span` is.
    pub(crate) fn address(&self, page: u32, span: &Span) -> PageNumber {
        span.start.offset(u64::from(page - span.first))
    }

    pub(crate) fn ksm_takes(&self, mapping: u32) -> bool {
        self.mapping(mapping).ksm_refuses.is_none()
    }

    pub(crate) fn store_takes(&self, mapping: u32) -> bool {
        self.mapping(mapping).store_refuses.is_none()
    }

    /// Bytes of the spans and this table.
    pub(crate) fn bytes(&self) -> u64 {
        (size_of_val::<[Span]>(&self.walk.spans) + size_of_val::<[u32]>(&self.table)) as u64
    }
}
