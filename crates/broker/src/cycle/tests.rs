//! Which contents are copied for whom.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

/// A page of each of two members with one content, the second just seen. Returns what is left to be copied, and
/// whom the index knows then.
fn chosen(there: PageAge) -> (usize, usize, page::PageId) {
    let pages = |first| PageRange::from_count(PageNumber(first), 8);
    let mut spans = Spans::new();
    let before = spans.add(1, pages(16)).unwrap();
    let here = spans.add(2, pages(32)).unwrap();
    let mut eyes =
        Eyes { index: CandidateIndex::new(1 << 14), spans, buffer: Vec::new(), fill_buffer: FillBuffer::new() };
    let content = page::Secret::new([7; page::Secret::BYTES]).fingerprint(&[7; 4096]);
    eyes.index.observe(content, before);
    let at = |owner, page| Location { owner, page: PageNumber(page) };
    let mut findings = Findings::of_settled();
    findings.fills.push(Fill { content, here: (at(2, 32), here), there: Some((at(1, 16), before)), staged: 0 });
    findings.takers.push((at(2, 32), 0));
    choose(&mut eyes, &mut findings, &mut |location| (location.owner == 1).then_some(there));
    let known = eyes.index.peek(content).unwrap();
    (findings.fills.len(), findings.takers.len(), if known == here { here } else { before })
}

#[test]
fn a_twin_that_was_written_since_is_not_copied_for() {
    let age = |cycles| PageAge { kind: Kind::Plain, cycles, back_off: 0 };
    let (fills, takers, kept) = chosen(age(None));
    assert_eq!((fills, takers), (1, 2), "a page that sleeps has not changed");
    let (fills, takers, known) = chosen(age(Some(3)));
    assert_eq!((fills, takers), (0, 0), "the store would hold a page that nobody shares");
    assert_ne!(known, kept, "the index knows the page that has the content now");
    let (fills, ..) = chosen(PageAge { kind: Kind::Merged, cycles: Some(9), back_off: 0 });
    assert_eq!(fills, 0);
}
