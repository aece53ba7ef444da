//! Programs in which merging has ended for good by what they did: said once for each, so that nobody wonders why nothing is
//! merged in a process that was taken in.

use std::sync::atomic::Ordering::SeqCst;

use abi::control::stop;

use super::Broker;
use crate::member::Member;
use crate::roll::program_of;

/// Different texts that are kept.
const KEPT: usize = 256;

/// What a program did, for each bit that ends merging in it. That its owner asked to leave is no surprise to anybody.
const CAUSES: [(u32, &str); 7] = [
    (stop::UNKNOWN_CODE, "code came into it that nobody vouches for"),
    (stop::IO_URING, "it uses io_uring"),
    (stop::USERFAULTFD, "it uses userfaultfd itself"),
    (stop::PI_FUTEX, "it uses mutexes with priority inheritance"),
    (stop::MLOCKALL, "it has locked all its memory"),
    (stop::FILTERED, "it forbids itself (seccomp) system calls that merging takes"),
    (stop::BROKEN, "a change of its mappings went wrong half-way"),
];

/// Texts, each with how often.
#[derive(Debug, Default)]
pub(crate) struct Stopped(Vec<(String, u64)>);

impl Stopped {
    /// Looks whether a member has been stopped since the last look.
    fn look(&mut self, member: &mut Member) {
        let bits = member.control().stop.load(SeqCst);
        let new = bits & !member.stops_seen;
        member.stops_seen |= bits;
        for (bit, cause) in CAUSES.iter().filter(|(bit, _)| new & bit != 0) {
            let code = (*bit == stop::UNKNOWN_CODE).then(|| {
                let refused = member.refused_code();
                refused.unwrap_or_else(|| "`pagefold doctor --proof PID` names it while it runs".to_owned())
            });
            let text = match code {
                Some(code) => format!("{}: {cause}: {code}", program_of(member.pid)),
                None => format!("{}: {cause}", program_of(member.pid)),
            };
            match self.0.iter().position(|(known, _)| *known == text) {
                Some(index) => self.0[index].1 += 1,
                None if self.0.len() < KEPT => self.0.push((text, 1)),
                None => {}
            }
        }
    }

    /// A line each.
    pub(crate) fn texts(&self) -> Vec<String> {
        let often = |times: u64| if times > 1 { format!(", {times} times") } else { String::new() };
        self.0.iter().map(|(text, times)| format!("{text}{}", often(*times))).collect()
    }
}

impl Broker {
    /// Looks who has been stopped.
    pub(super) fn note_stopped(&mut self) {
        for member in &mut self.members {
            self.stopped.look(member);
        }
    }

    /// The same of one that goes.
    pub(super) fn note_last(&mut self, member: &mut Member) {
        self.stopped.look(member);
    }
}
