//! What the facts about one file mean.

use serde::Serialize;

use crate::calls::{call_name, is_dangerous};
use crate::harmless::{is_harmless_request, why_harmless};
use crate::lists::{Effect, Known, Lists, any_fits};
use crate::object::{CallSite, Facts};
use crate::scan::Entry;
use crate::trust::{TrustedAs, trust_line};

/// May a gate that is patched into libc and the loader be complete, for all that this object does? Best first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It has no way into the kernel of its own, or is a libc or loader whose every way can be patched.
    #[default]
    Clean,
    /// It has, with numbers that cannot touch mappings.
    Benign,
    /// It has, and people have looked at what it does.
    Known,
    /// It cannot be told.
    Unknown,
    /// It changes mappings, or could, behind the gate's back.
    Dangerous,
}

impl Verdict {
    /// May the gate be complete?
    #[must_use]
    pub const fn is_proven(self) -> bool {
        matches!(self, Self::Clean | Self::Benign | Self::Known)
    }

    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Clean => "clean",
            Self::Benign => "benign",
            Self::Known => "known",
            Self::Unknown => "unknown",
            Self::Dangerous => "dangerous",
        }
    }
}

/// A verdict, and what it rests on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// Why, the worst first; nothing for what is simply clean.
    pub reasons: Vec<String>,
    /// The line of a trust file that would allow the file, if there can be one.
    pub trust_line: Option<String>,
}

/// Judges one file.
///
/// `file_name` is the last part of its path, `program` that of the program it runs in.
#[must_use]
pub fn judge(facts: &Facts, file_name: &str, program: &str, lists: &Lists) -> Judgement {
    let names: Vec<&str> = facts.soname.as_deref().into_iter().chain([file_name]).collect();
    if let Some(gate) = &facts.gate {
        return match gate.as_slice() {
            [] => judgement(Verdict::Clean, vec!["takes the gate".to_owned()]),
            reasons => judgement(Verdict::Unknown, reasons.to_vec()),
        };
    }
    if lists.is_own(facts, file_name) {
        return judgement(Verdict::Known, vec!["pagefold's own agent, which is the gate".to_owned()]);
    }
    let build_id = facts.build_id.as_deref();
    let trusted = build_id.and_then(|id| lists.trust.find(id, &names, TrustedAs::Code));
    let mut judged = by_facts(facts, &names, program, lists);
    if judged.verdict.is_proven() {
        return judged;
    }
    if let Some(line) = trusted {
        return judgement(Verdict::Known, vec![format!("trusted by line {line} of the trust file")]);
    }
    // What could not be looked at has no name that the line could give it.
    if facts.code_bytes > 0 {
        judged.trust_line = build_id.zip(names.first()).and_then(|(id, name)| trust_line(TrustedAs::Code, id, name));
    }
    judged
}

fn judgement(verdict: Verdict, reasons: Vec<String>) -> Judgement {
    Judgement { verdict, reasons, trust_line: None }
}

fn by_facts(facts: &Facts, names: &[&str], program: &str, lists: &Lists) -> Judgement {
    let mut sums: Vec<Sum> = facts.sites.iter().map(of_site).collect();
    sums.sort_by_key(|sum| (std::cmp::Reverse(sum.verdict), sum.address));
    let mut worst = sums.first().map_or(Verdict::Clean, |sum| sum.verdict);
    let mut reasons: Vec<String> =
        sums.iter().filter(|sum| !sum.verdict.is_proven()).map(|sum| sum.text.clone()).collect();
    if facts.more_sites > 0 {
        worst = worst.max(Verdict::Unknown);
        reasons.push(format!("{} more ways into the kernel", facts.more_sites));
    }
    if !facts.spoilt.is_empty() {
        worst = worst.max(Verdict::Unknown);
        reasons.splice(0..0, facts.spoilt.iter().cloned());
    }
    let mut build = facts.build_id.as_deref().into_iter();
    let applies =
        |known: &&Known| known.build_ids.is_empty() || build.any(|id| known.build_ids.iter().any(|it| it == id));
    for known in lists.known(names).filter(applies) {
        if known.effect == Effect::Refuse {
            reasons.insert(0, format!("{}: {}", known.name, known.reason));
            return judgement(Verdict::Dangerous, reasons);
        }
        if worst.is_proven() || !facts.spoilt.is_empty() || facts.more_sites > 0 {
            continue;
        }
        if let Some(site) = facts.sites.iter().find(|site| !is_reviewed(site, known)) {
            reasons.insert(0, format!("{} is known, but not with what it has at {:#x}", known.name, site.address));
        } else if !known.programs.is_empty() && !any_fits(&known.programs, &[program]) {
            reasons.insert(
                0,
                format!("{} is allowed in {} alone: {}", known.name, known.programs.join(", "), known.reason),
            );
        } else {
            return judgement(Verdict::Known, vec![format!("{}: {}", known.name, known.reason)]);
        }
    }
    if worst == Verdict::Benign {
        let mut names: Vec<String> =
            facts.sites.iter().flat_map(|site| &site.numbers).map(|number| call_name(*number)).collect();
        names.sort_unstable();
        names.dedup();
        reasons.push(format!("makes only harmless calls by itself: {}", names.join(", ")));
    }
    judgement(worst, reasons)
}

/// One site, in words.
struct Sum {
    verdict: Verdict,
    address: u64,
    text: String,
}

fn of_site(site: &CallSite) -> Sum {
    let (verdict, what) = if site.ambiguous {
        let hint = site.numbers.first().map(|number| format!(", perhaps {}", call_name(*number)));
        (Verdict::Unknown, format!("may be a system call or data{}", hint.unwrap_or_default()))
    } else if site.entry == Entry::Sysenter {
        (Verdict::Unknown, "sysenter, with the numbers of another table".to_owned())
    } else if site.entry == Entry::Int80 {
        (Verdict::Unknown, "int 0x80, with the numbers of another table".to_owned())
    } else if site.numbers.is_empty() {
        (Verdict::Unknown, "a system call with a number that decoding does not tell".to_owned())
    } else {
        of_numbers(site)
    };
    let text = format!("{what}, at offset {:#x} in {}", site.offset, site.place);
    Sum { verdict, address: site.address, text }
}

fn of_numbers(site: &CallSite) -> (Verdict, String) {
    let bad = |number: &&u32| !is_harmless(**number, site);
    if let Some(number) = site.numbers.iter().filter(bad).find(|number| is_dangerous(**number)) {
        let name = call_name(*number);
        // Most of what these are asked for is harmless; that is not the same as being dangerous.
        return match site.requests.iter().find(|request| !is_harmless_request(*number, &[**request])) {
            Some(request) => (Verdict::Unknown, format!("{name} with {request:#x}, which nobody has looked at")),
            None if *number == crate::numbers::IOCTL || *number == crate::numbers::PRCTL => {
                (Verdict::Unknown, format!("{name} with what decoding does not tell"))
            }
            None => (Verdict::Dangerous, format!("{name}, which the gate does not see")),
        };
    }
    match site.numbers.iter().find(bad) {
        Some(number) => {
            (Verdict::Unknown, format!("{}, which is not on the list of harmless calls", call_name(*number)))
        }
        None => (Verdict::Benign, String::new()),
    }
}

fn is_harmless(number: u32, site: &CallSite) -> bool {
    why_harmless(number).is_some() || is_harmless_request(number, &site.requests)
}

/// Is a site one that the review was about?
fn is_reviewed(site: &CallSite, known: &Known) -> bool {
    if site.entry != Entry::Syscall || site.ambiguous || site.numbers.is_empty() {
        return known.unresolved;
    }
    site.numbers.iter().all(|number| known.calls.contains(number) || is_harmless(*number, site))
}

#[cfg(test)]
#[path = "judge/tests.rs"]
mod tests;
