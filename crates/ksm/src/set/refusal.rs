//! Changes that the kernel refuses, and what it means.

use kernel::ksm_sysfs::{KsmSysfs, ksm_stat};
use kernel::{Pid, status};

use crate::error::KsmError;
use crate::knob::{AdvisorMode, Knob, Values};
use crate::lease::Session;
use crate::room::Short;

/// Why nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetError {
    /// Of the state files or of KSM's files.
    #[error(transparent)]
    Ksm(#[from] KsmError),
    /// This kernel has no such file.
    #[error("this kernel has no {knob}")]
    NotHere {
        /// The setting.
        knob: Knob,
    },
    /// EBUSY: the trees would have to be built anew.
    #[error(
        "{knob} cannot be changed while pages are merged (EBUSY): {pages_shared} merged pages with {pages_sharing} further \
         users{}. The way out: unmerge them (`pagefold disable` on these processes, their end, or `pagefold ksm set run=2 \
         --unmerge-host` for the whole host), set it, then `run=1` again",
        by(users)
    )]
    Shared {
        /// The setting.
        knob: Knob,
        /// The host's counter.
        pages_shared: u64,
        /// The host's counter.
        pages_sharing: u64,
        /// Who has merged pages, the largest first: process, name, pages.
        users: Vec<(i32, String, u64)>,
    },
    /// EINVAL: the advisor sets it.
    #[error(
        "pages_to_scan cannot be set while advisor_mode is scan-time (EINVAL), as the kernel's advisor sets it after each \
         pass: set advisor_mode=none with it, or the advisor's own advisor_target_scan_time and advisor_max_cpu"
    )]
    UnderAdvisor,
    /// Runs hold the settings and want ksmd to run.
    #[error("the host cannot be unmerged while {} holds KSM's settings: end it first", holders.join(", "))]
    Held {
        /// Who.
        holders: Vec<String>,
    },
    /// Unmerging would take more memory than there is.
    #[error(
        "there is too little memory{whose}: {short}. Free some, or unmerge process by process (`pagefold unmerge --pid`)"
    )]
    TooLittle {
        /// What limits, and by how much.
        short: Short,
        /// Whose copies do not fit; empty for all of them.
        whose: String,
    },
    /// The kernel gave up half-way.
    #[error("the kernel gave up unmerging and stopped ksmd (run is {run} now); what it had unmerged stays so")]
    Unmerge {
        /// `run` afterwards.
        run: u64,
        /// What it said.
        source: kernel::ksm_sysfs::KsmError,
    },
}

/// How many users are named.
const NAMED: usize = 5;

/// Whose pages are merged, for people: a part of a sentence.
pub(crate) fn by(users: &[(i32, String, u64)]) -> String {
    if users.is_empty() {
        return ", none of them seen: of processes that have ended and that ksmd, standing still, has not dropped, or that \
                may not be read"
            .to_owned();
    }
    let named: Vec<_> = users
        .iter()
        .take(NAMED)
        .map(|(pid, comm, pages)| format!("{} ({pid}) {pages} pages", comm.escape_debug()))
        .collect();
    let more = users.len().saturating_sub(NAMED);
    format!(", of {}{}", named.join(", "), if more > 0 { format!(" and {more} more") } else { String::new() })
}

/// Processes with merged pages, the largest first.
pub(crate) fn users() -> Vec<(i32, String, u64)> {
    let of = |pid: Pid| {
        let pages = ksm_stat(pid).ok()?.ksm_merging_pages.filter(|pages| *pages > 0)?;
        let name = status::read(pid).ok()?.name.to_string_lossy().into_owned();
        Some((pid.get(), name, pages))
    };
    let mut users: Vec<_> = status::processes().unwrap_or_default().into_iter().filter_map(of).collect();
    users.sort_by_key(|(_, _, pages)| std::cmp::Reverse(*pages));
    users
}

/// Refuses what the kernel would refuse, before anything is written.
pub(super) fn foresee(sysfs: &KsmSysfs, session: &Session<'_>, wish: &Values) -> Result<(), SetError> {
    let administrator = &session.state.administrator;
    for (knob, _) in wish.iter() {
        if !session.current.contains(knob) {
            return Err(SetError::NotHere { knob });
        }
    }
    let mode = wish.get(Knob::AdvisorMode).or(administrator.get(Knob::AdvisorMode));
    if wish.contains(Knob::PagesToScan) && mode == Some(AdvisorMode::ScanTime.into()) {
        return Err(SetError::UnderAdvisor);
    }
    let counters = sysfs.counters().map_err(KsmError::from)?;
    let shared = counters.pages_shared.unwrap_or(0);
    for knob in [Knob::MaxPageSharing, Knob::MergeAcrossNodes] {
        let differs = wish.get(knob).is_some_and(|value| session.current.get(knob) != Some(value));
        // Under a holder's own wish nothing is written now.
        let held = session.state.written.contains(knob);
        if differs && !held && shared > 0 {
            let pages_sharing = counters.pages_sharing.unwrap_or(0);
            return Err(SetError::Shared { knob, pages_shared: shared, pages_sharing, users: users() });
        }
    }
    Ok(())
}
