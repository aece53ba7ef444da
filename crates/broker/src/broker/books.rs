//! The books: what is mapped, what can be given back.

use std::time::{Duration, Instant};

use abi::wire::Message;
use page::SegmentId;

use super::Broker;
use crate::account::{Books, Summary};
use crate::sample::{Sample, sample};
use crate::settings::CheckChoice;

/// For how long a segment must have been without use before it is given back.
const GRACE: Duration = Duration::from_secs(10);

impl Broker {
    pub(super) fn take_sample(&mut self) {
        self.last_sample = sample(&mut self.members, &mut self.quiet, &self.inodes);
        self.sampled = Instant::now();
        self.merges_sampled = self.totals.merges;
        for member in &mut self.members {
            member.look_whether_fit();
            if member.view.left_out {
                member.view.epoch = None;
            }
        }
        self.choose();
        let now = Instant::now();
        let segments: Vec<SegmentId> = self.inode_of.keys().copied().collect();
        for segment in segments {
            let used = self.last_sample.used.get(&segment).copied().unwrap_or(0);
            self.partition.report_use(segment, used, now);
        }
        if self.partition.reclaim(now, GRACE).segments > 0 {
            let gone: Vec<SegmentId> = self
                .inode_of
                .keys()
                .copied()
                .filter(|segment| self.partition.fingerprints(*segment).is_none())
                .collect();
            for segment in gone {
                if let Some(inode) = self.inode_of.remove(&segment) {
                    self.inodes.remove(&inode);
                }
                for member in &mut self.members {
                    if let Some(number) = member.segments.remove(&segment) {
                        member.tell(Message::Retire { index: number }, None);
                        member.free_numbers.push(number);
                    }
                }
            }
        }
        self.move_survivors();
        let summary = self.summary(&self.last_sample);
        self.peak = self.peak.max(summary.bytes_saved);
    }

    pub(super) fn summary_now(&mut self) -> Summary {
        if !(self.members.is_empty() && self.quiet.is_empty()) {
            self.take_sample();
        }
        let mut summary = self.summary(&self.last_sample);
        self.note_stopped();
        summary.stopped = self.stopped.texts();
        summary.managed = self.roll.list();
        for (reason, times) in &self.reasons {
            *summary.refused.0.entry("helper_refused").or_default() += times;
            let often = if *times > 1 { format!(", {times} times") } else { String::new() };
            summary.helper_refused.push(format!("{reason}{often}"));
        }
        summary
    }

    fn summary(&self, sample: &Sample) -> Summary {
        let check = match self.settings.check {
            CheckChoice::Vouch => "vouch",
            CheckChoice::Collapse => "collapse",
            CheckChoice::Auto | CheckChoice::Bpf if self.check.is_some() => "bpf",
            CheckChoice::Bpf => "none",
            CheckChoice::Auto => "collapse",
        };
        let books = Books {
            label: self.settings.label.clone(),
            check,
            totals: &self.totals,
            members: &self.members,
            busy: self.queues.values().map(|queue| queue.busy).sum(),
            members_ever: self.members_ever,
            partition: &self.partition,
            index_entries: self.eyes.index.counts().entries,
            started: self.started,
            peak: self.peak,
        };
        books.summary(sample)
    }
}
