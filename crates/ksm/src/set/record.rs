//! What was there before the administrator's first change.

use std::io;

use serde::{Deserialize, Serialize};

use crate::error::KsmError;
use crate::knob::{AdvisorMode, Knob, Values};
use crate::state::{Locked, StatePath, boot_id, replace};

const NAME: &str = "ksm-set.json";

/// The way back. Kept for one boot: the kernel begins each with its own values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Record {
    boot_id: String,
    /// The administrator's values before his first change, of the settings that he changed.
    pub(super) before: Values,
    /// What he set them to, to tell it from what somebody else wrote.
    pub(super) set: Values,
    /// What he had set them to before the change that is under way: if that one is killed, this is what is found.
    earlier: Values,
}

impl Record {
    pub(super) fn load(locked: &Locked) -> Result<Self, KsmError> {
        let file = locked.beside(NAME);
        let fresh = || Self { boot_id: boot_id(), ..Self::default() };
        let text = match std::fs::read(&file) {
            Ok(text) => text,
            Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(fresh()),
            Err(source) => return Err(KsmError::State { path: file, source }),
        };
        let record: Self = serde_json::from_slice(&text).map_err(|source| KsmError::Damaged { path: file, source })?;
        Ok(if record.boot_id == boot_id() { record } else { fresh() })
    }

    pub(super) fn store(&self, locked: &Locked) -> Result<(), KsmError> {
        let file = locked.beside(NAME);
        let done = if self.before.is_empty() {
            std::fs::remove_file(&file).or_else(|error| match error.kind() {
                io::ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            })
        } else {
            let text = serde_json::to_vec_pretty(self).expect("numbers and strings always serialise");
            replace(&file, &text)
        };
        done.map_err(|source| KsmError::State { path: file, source })
    }

    /// Notes a change of the administrator's values.
    pub(super) fn note(&mut self, administrator: &Values, wish: &Values) {
        let mut first = |knob: Knob| {
            if !self.before.contains(knob)
                && let Some(value) = administrator.get(knob)
            {
                self.before.set(knob, value);
            }
        };
        wish.iter().for_each(|(knob, _)| first(knob));
        if wish.contains(Knob::AdvisorMode) && administrator.get(Knob::AdvisorMode) == Some(AdvisorMode::None.into()) {
            // The kernel resets this one with each change of the mode, and the advisor then writes it at every pass.
            first(Knob::PagesToScan);
        }
        for (knob, value) in wish.iter() {
            let found = administrator.get(knob);
            if found != self.earlier.get(knob) || found.is_none() {
                self.earlier.remove(knob);
                if let Some(set) = self.set.get(knob) {
                    self.earlier.set(knob, set);
                }
            }
            self.set.set(knob, value);
        }
        if wish.get(Knob::AdvisorMode) == Some(AdvisorMode::ScanTime.into()) {
            self.set.remove(Knob::PagesToScan);
        }
    }

    /// Whether a value that is found is one of the administrator's own; `None` if it is not compared.
    pub(super) fn is_own(&self, knob: Knob, found: u64) -> Option<bool> {
        let set = self.set.get(knob)?;
        if knob == Knob::Run && set == 2 && found == 0 {
            // The next lease leaves a ksmd that stands still, and does not unmerge again.
            return Some(true);
        }
        Some(found == set || self.earlier.get(knob) == Some(found))
    }

    /// The change is through.
    pub(super) fn is_done(&mut self) {
        self.earlier = Values::default();
    }

    /// Forgets a change that the kernel did not take.
    pub(super) fn take_back(&mut self, old: &Self, knob: Knob) {
        for (values, old) in [(&mut self.before, &old.before), (&mut self.set, &old.set)] {
            match old.get(knob) {
                Some(value) => values.set(knob, value),
                None => {
                    values.remove(knob);
                }
            }
        }
    }

    /// Drops what was put back.
    pub(super) fn keep(&mut self, left: impl Fn(&Knob) -> bool) {
        for knob in Knob::ALL.into_iter().filter(|knob| !left(knob)) {
            self.before.remove(knob);
            self.set.remove(knob);
        }
    }
}

/// The values that [`restore_at`](super::restore_at) would put back; empty if nothing was changed.
///
/// # Errors
/// Those of the record.
pub fn before_at(path: &StatePath) -> Result<Values, KsmError> {
    // A mere look makes no folder.
    if !path.as_path().with_file_name(NAME).exists() {
        return Ok(Values::default());
    }
    Ok(Record::load(&Locked::new(path)?)?.before)
}
