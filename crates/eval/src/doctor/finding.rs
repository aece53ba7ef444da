//! What the doctor says.

use kernel::Pid;
use serde::{Serialize, Serializer};

use super::Code;

/// How much a cause matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing can be merged while it is so.
    Blocks,
    /// Less is merged, or later.
    Hampers,
    /// Good to know.
    Note,
}

impl Severity {
    /// Its word.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Blocks => "blocks",
            Self::Hampers => "hampers",
            Self::Note => "note",
        }
    }
}

/// Whom it is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "subject", rename_all = "snake_case")]
pub enum Subject {
    /// The host, i.e. all processes.
    Host,
    /// One process.
    Process {
        /// The process.
        #[serde(serialize_with = "number")]
        pid: Pid,
    },
}

fn number<S: Serializer>(pid: &Pid, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_i32(pid.get())
}

/// One cause, in one line, with its remedy in another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name.
    pub code: Code,
    /// How much it matters.
    pub severity: Severity,
    /// Whom it is about.
    #[serde(flatten)]
    pub subject: Subject,
    /// What is so.
    pub cause: String,
    /// What helps.
    pub remedy: String,
}

/// Collects what is found about one subject.
pub(super) struct Findings<'a> {
    subject: Subject,
    out: &'a mut Vec<Finding>,
}

impl<'a> Findings<'a> {
    pub(super) const fn about(subject: Subject, out: &'a mut Vec<Finding>) -> Self {
        Self { subject, out }
    }

    pub(super) fn add(&mut self, code: Code, severity: Severity, cause: String, remedy: impl Into<String>) {
        self.out.push(Finding { code, severity, subject: self.subject.clone(), cause, remedy: remedy.into() });
    }
}
