//! Who is merged, and who never: the policy file, and the facts about a process that it asks for.
//!
//! * [`Rules::parse`] reads a file of rules, and names every mistake with its line.
//! * [`facts`] looks at a process. It is the only part that does any input.
//! * [`Rules::decide`] says what is to be done with it, and by which rule.
//! * [`never_merge`] is the list of programs with secrets, which holds before all rules.
//!
//! ```
//! use pagefold_rules::{Action, Rules, Users, facts};
//!
//! let rules = Rules::parse(r#"
//!     version = 1
//!     [[rule]]
//!     name = "workers"
//!     match = { exe = "/usr/bin/python3*", user = "app", min_anon = "64MiB" }
//!     action = "enable"
//! "#)?;
//! let own = facts(kernel::Pid::this(), &Users::host()).expect("it runs");
//! assert_eq!(rules.decide(&own).action, Action::Ignore, "pagefold's own programs are left alone");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod advice;
mod amount;
mod belonging;
mod decide;
mod document;
mod elf;
mod error;
mod explain;
mod facts;
mod glob;
mod loader;
mod never;
mod parse;
mod print;
mod profit;
mod rule;
mod script;
mod users;

pub use belonging::{Container, units};
pub use decide::{Decision, Reason, Why};
pub use error::{Problem, RulesError};
pub use explain::Explained;
pub use facts::{Facts, Kind, facts};
pub use glob::{Glob, Kind as GlobKind};
pub use never::{LIST as NEVER_MERGE, list as never_merge_list, never_merge};
pub use parse::KEYS;
pub use profit::{Meter, Verdict};
pub use rule::{Action, Backend, Bounds, Conditions, Defaults, ProfitRules, Rule, Rules, User, VERSION};
pub use script::script;
pub use users::Users;
