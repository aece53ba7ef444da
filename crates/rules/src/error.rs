//! What is wrong with a file of rules.

use std::fmt;

use serde::Serialize;
use thiserror::Error;

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Line, from 1 on.
    pub line: usize,
    /// Character in the line, from 1 on.
    pub column: usize,
    /// What is wrong, and how it is right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.line, self.column, self.message)
    }
}

/// All mistakes of a file, in their order: at least one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct RulesError {
    /// They.
    pub problems: Vec<Problem>,
}

impl fmt::Display for RulesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.problems.iter().map(|problem| format!("line {problem}")).collect();
        f.write_str(&lines.join("\n"))
    }
}
