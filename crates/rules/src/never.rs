//! Programs that are never merged, since they hold secrets: the list that is shipped, with its reasons.
//!
//! It is a file of rules itself, and matches by the executable, which a process cannot change without executing another
//! file, by the program that the dynamic loader runs where that is the executable, and by what an interpreter runs. It
//! never asks for the command name: a secret does not become public by another name. A program that takes a name *of* the
//! list only loses what merging would have saved.

use std::sync::OnceLock;

use crate::decide::Reason;
use crate::facts::{Facts, Kind};
use crate::rule::{Rule, Rules};

/// The list as it is shipped.
pub const LIST: &str = include_str!("never.toml");

/// The list, read.
#[must_use]
pub fn list() -> &'static Rules {
    static READ: OnceLock<Rules> = OnceLock::new();
    READ.get_or_init(|| Rules::parse(LIST).expect("the shipped list is read by a test"))
}

/// Whether a process is one that must never be merged, and why. Of a process whose program this user may not see nothing
/// is known: that is `None` too, and such a process cannot be enabled either.
#[must_use]
pub fn never_merge(facts: &Facts) -> Option<Reason> {
    entry(facts).map(reason)
}

/// The entry that fits.
pub(crate) fn entry(facts: &Facts) -> Option<&'static Rule> {
    let is_program = facts.kind == Kind::Program;
    is_program.then(|| list().rules.iter().find(|rule| rule.conditions.fit(facts))).flatten()
}

/// What an entry says.
pub(crate) fn reason(entry: &Rule) -> Reason {
    Reason { name: entry.name.clone().unwrap_or_default(), reason: entry.reason.clone().unwrap_or_default() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::rule::{Action, Conditions};
    use std::path::PathBuf;

    fn of(exe: &str) -> Facts {
        Facts { exe: Some(PathBuf::from(exe)), ..Facts::default() }
    }

    #[test]
    fn every_entry_says_why_and_asks_for_nothing_that_a_process_may_choose() {
        let list = Rules::parse(LIST).unwrap();
        assert!(list.rules.len() > 10);
        for rule in list.rules {
            let name = rule.name.clone().unwrap();
            assert!(rule.reason.clone().unwrap().len() > 8, "{name}");
            assert!(rule.action != Action::Enable, "{name}");
            let Conditions { exe, script, setuid, .. } = rule.conditions.clone();
            assert_eq!(rule.conditions, Conditions { exe, script, setuid, ..Conditions::default() }, "{name}");
        }
    }

    #[test]
    fn secrets_by_another_command_name_are_secrets() {
        let mut facts = of("/usr/bin/ssh-agent");
        facts.comm = "worker".to_owned();
        facts.command_line = vec!["worker".to_owned()];
        assert_eq!(never_merge(&facts).unwrap().name, "key agents");
        let mut facts = of("/usr/bin/worker");
        facts.comm = "ssh-agent".to_owned();
        facts.command_line = vec!["/usr/bin/ssh-agent".to_owned()];
        assert_eq!(never_merge(&facts), None, "it only calls itself so");
    }

    #[test]
    fn in_any_folder_and_by_any_kind_of_package() {
        for exe in [
            "/usr/bin/gpg-agent",
            "/home/u/.local/bin/ssh-agent",
            "/usr/lib/firefox-esr/firefox-esr",
            "/snap/firefox/5437/usr/lib/firefox/firefox",
            "/opt/google/chrome/chrome",
            "/nix/store/0c7c-keepassxc-2.7.9/bin/.keepassxc-wrapped",
            "/usr/bin/pinentry-gnome3",
            "/usr/lib/systemd/systemd",
            "/lib/systemd/systemd",
        ] {
            assert!(never_merge(&of(exe)).is_some(), "{exe}");
        }
        for exe in
            ["/usr/bin/redis-server", "/usr/bin/qemu-system-x86_64", "/usr/lib/jvm/java-17/bin/java", "/ssh-agent/x"]
        {
            assert_eq!(never_merge(&of(exe)), None, "{exe}");
        }
        assert!(never_merge(&Facts { setuid: true, ..of("/usr/local/bin/x") }).is_some());
        assert!(never_merge(&Facts { script: Some("/usr/bin/pass".to_owned()), ..of("/usr/bin/bash") }).is_some());
        assert!(never_merge(&Facts { kind: Kind::Zombie, ..of("/usr/bin/ssh-agent") }).is_none());
        assert!(never_merge(&Facts::default()).is_none());
    }
}
