//! What callers ask for.

use std::time::{Duration, Instant};

use abi::wire::Message;
use kernel::Pid;

use super::{Broker, pace};
use crate::wishes::{Asked, MergeReport, Wish, Wished};

/// How long a wish waits for its member's helper to introduce itself.
const MEMBER_WITHIN: Duration = Duration::from_secs(5);
/// The same in a process whose helper has just left because it was asked to: whoever looked before that counted on the
/// one that left, and none may come for him. He hands over anew when he hears so.
const AFTER_LEAVING: Duration = Duration::from_millis(500);
/// Processes that are remembered to have left.
const LEFT_MAX: usize = 256;
/// How long a helper may take to leave: as long as a plan at most.
const LEAVE_WITHIN: Duration = Duration::from_secs(2);

/// Settling times that make sense.
const SETTLING: std::ops::Range<Duration> = Duration::from_millis(50)..Duration::from_secs(24 * 3600);

impl Broker {
    /// Returns true if the broker is to end.
    pub(super) fn fulfil_wishes(&mut self) -> bool {
        let now = Instant::now();
        let mut asked: Vec<(Instant, Asked)> = std::mem::take(&mut self.waiting);
        asked.extend(std::iter::from_fn(|| self.asked.try_recv().ok()).map(|asked| (now, asked)));
        // What was asked before their helpers left, and waited behind that. No helper is going to come for it.
        let mut left = Vec::new();
        for (since, asked) in asked {
            let answer = match &asked.wish {
                Wish::Stop => {
                    let _ = asked.answer.send(Wished::Summary(Box::new(self.summary_now())));
                    return true;
                }
                Wish::Summary => Some(Wished::Summary(Box::new(self.summary_now()))),
                Wish::Quiescent { pid, uid, ranges, from } => Some(self.quiescent(*pid, *uid, ranges, *from)),
                Wish::Untrack { pid } => {
                    self.untrack(*pid);
                    Some(Wished::Report(MergeReport::default()))
                }
                Wish::Leave { pid } => {
                    self.let_go(*pid);
                    left.push(*pid);
                    Some(Wished::Report(MergeReport::default()))
                }
                Wish::Merge { pid, .. } | Wish::Unmerge { pid, .. } | Wish::Track { pid, .. } if left.contains(pid) => {
                    Some(Wished::NoMember)
                }
                Wish::Merge { pid, .. } | Wish::Unmerge { pid, .. } | Wish::Track { pid, .. } => {
                    self.fulfil_for_member(*pid, since, &asked.wish)
                }
            };
            match answer {
                Some(answer) => {
                    let _ = asked.answer.send(answer);
                }
                None => self.waiting.push((since, asked)),
            }
        }
        false
    }

    /// The member that a process is. One that has executed another program is, for a moment, also the one that it was.
    fn position_of(&self, pid: Pid) -> Option<usize> {
        let of_it = self.members.iter().enumerate().filter(|(_, member)| member.pid == pid);
        of_it.max_by_key(|(_, member)| member.index).map(|(position, _)| position)
    }

    /// What needs a helper; `None` while it may still come.
    fn fulfil_for_member(&mut self, pid: Pid, since: Instant, wish: &Wish) -> Option<Wished> {
        let Some(index) = self.position_of(pid) else {
            if let Some((kind, reason)) = self.refused.remove(&pid) {
                return Some(Wished::Refused { kind, reason });
            }
            let patience = if self.left.contains(&pid) { AFTER_LEAVING } else { MEMBER_WITHIN };
            return (since.elapsed() > patience).then_some(Wished::NoMember);
        };
        let owner = self.members[index].index;
        Some(Wished::Report(match wish {
            Wish::Merge { ranges, .. } => self.merge_now(owner, ranges),
            Wish::Unmerge { ranges, .. } => self.unmerge_now(owner, ranges),
            Wish::Track { stable, .. } => {
                self.track(pid, *stable);
                MergeReport::default()
            }
            _ => MergeReport::default(),
        }))
    }

    /// From now on what members have handed over is watched and merged when it has settled; the shortest settling time
    /// asked for counts.
    fn track(&mut self, pid: Pid, stable: Duration) {
        let always = self.settings.stable.is_some() && self.trackers.is_empty();
        if always {
            return;
        }
        *self.trackers.entry(pid).or_default() += 1;
        let stable = stable.clamp(SETTLING.start, SETTLING.end);
        if self.settings.stable.is_none_or(|now| stable < now) {
            self.settings.stable = Some(stable);
            (self.interval, self.policy) = pace(self.settings.stable);
            self.look_anew();
        }
    }

    fn untrack(&mut self, pid: Pid) {
        let Some(count) = self.trackers.get_mut(&pid) else { return };
        *count -= 1;
        if *count == 0 {
            self.trackers.remove(&pid);
        }
        self.rest_without_trackers();
    }

    /// A member is gone, with its trackers.
    pub(super) fn forget_trackers(&mut self, pid: Pid) {
        if self.trackers.remove(&pid).is_some() {
            self.rest_without_trackers();
        }
    }

    fn rest_without_trackers(&mut self) {
        if self.trackers.is_empty() {
            self.settings.stable = None;
            (self.interval, self.policy) = pace(None);
        }
    }

    /// Ages are counted in cycles, and a cycle has another length now.
    fn look_anew(&mut self) {
        for member in &mut self.members {
            member.view.clear(&mut self.eyes.spans);
            member.view.epoch = None;
        }
    }

    /// A process leaves: its helper goes, and nothing of it is remembered.
    fn let_go(&mut self, pid: Pid) {
        if self.left.len() >= LEFT_MAX {
            self.left.clear();
        }
        self.left.insert(pid);
        if let Some(mut quiet) = self.quiet.remove(&pid) {
            quiet.view.clear(&mut self.eyes.spans);
        }
        let Some(index) = self.position_of(pid) else { return };
        self.members[index].tell(Message::Leave, None);
        let deadline = Instant::now() + LEAVE_WITHIN;
        while Instant::now() < deadline && !self.members[index].helper_ended() {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.remove(index);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::settings::Settings;

    /// A thread that has looked for its helper before another one sent it away. Seen to fail: it waited for 5 s.
    #[test]
    fn whoever_counted_on_a_helper_that_left_hears_so_soon() {
        let broker = Broker::start(Settings::default()).unwrap();
        let pid = Pid::this();
        broker.ask(Wish::Leave { pid }).unwrap();
        let begun = Instant::now();
        assert!(matches!(broker.ask(Wish::Merge { pid, ranges: Vec::new() }), Ok(Wished::NoMember)));
        assert!(begun.elapsed() < MEMBER_WITHIN / 2, "{:?}", begun.elapsed());
    }
}
