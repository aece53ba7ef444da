//! What all pages held at several looks: what the model of ksmd runs on, and what a capture keeps.

use std::time::Duration;

use page::census::{Content, Findings};
use page::ksmd;

/// Contents of all pages, look by look.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    /// Since the first look.
    pub(crate) at: Vec<Duration>,
    /// By look and page, as [`ksmd::Content::to_bits`] has it.
    pub(crate) looks: Vec<Vec<u64>>,
    /// Classes at the first look, as [`Content::mark`] has them.
    pub(crate) marks: Vec<u8>,
}

impl Record {
    /// Begins a look at so many pages.
    pub(crate) fn begin(&mut self, at: Duration, pages: usize) {
        self.at.push(at);
        self.looks.push(vec![ksmd::Content::ABSENT.to_bits(); pages]);
        if self.marks.is_empty() {
            self.marks = vec![0; pages];
        }
    }

    /// Adds what a reader found to the look that was begun last.
    pub(crate) fn add(&mut self, findings: &Findings) {
        let first = self.looks.len() == 1;
        let Some(look) = self.looks.last_mut() else { return };
        for (page, content) in findings.known() {
            look[page] = bits(content);
            if first {
                self.marks[page] = content.mark();
            }
        }
    }

    /// What the model of ksmd takes: of the pages that `taken` includes, in their order.
    pub(crate) fn for_ksmd(&self, taken: &[bool]) -> Result<ksmd::Capture, ksmd::CaptureError> {
        let mut builder = ksmd::Capture::builder();
        for (at, look) in self.at.iter().zip(&self.looks) {
            let pages = look.iter().zip(taken).filter(|(_, taken)| **taken);
            builder.look(*at, pages.map(|(bits, _)| ksmd::Content::from_bits(*bits)))?;
        }
        Ok(builder.build())
    }
}

fn bits(content: Content) -> u64 {
    if content == Content::ZERO {
        ksmd::Content::ZERO.to_bits()
    } else {
        ksmd::Content::hashed(content.hash()).to_bits()
    }
}
