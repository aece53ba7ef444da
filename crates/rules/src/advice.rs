//! What is allowed in a file of rules and probably not meant.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;

use crate::error::Problem;
use crate::rule::{Action, Backend, Conditions, Rule, Rules, User};
use crate::users::Users;

impl Rules {
    /// Doubts about rules, in their order. Looks at this host's users and files: a rule may be meant for another one.
    #[must_use]
    pub fn doubts(&self, users: &Users) -> Vec<Problem> {
        let mut found = Vec::new();
        if self.defaults.action == Action::Enable {
            found.push(Problem {
                line: 1,
                column: 1,
                message: "[defaults] enables every process that no rule fits, of all users".to_owned(),
            });
        }
        let mut first_of: HashMap<&Conditions, usize> = HashMap::new();
        for rule in &self.rules {
            let mut doubt = |message: String| found.push(Problem { line: rule.line, column: 1, message });
            match first_of.entry(&rule.conditions) {
                Entry::Vacant(place) => drop(place.insert(rule.line)),
                Entry::Occupied(first) => {
                    let line = first.get();
                    doubt(format!("never used: the rule of line {line} fits the same processes and comes first"));
                }
            }
            for user in &rule.conditions.user {
                if let User::Name(name) = user
                    && !users.has(name)
                {
                    doubt(format!(
                        "no user {name:?} in /etc/passwd here; one of a directory service goes by the number"
                    ));
                }
            }
            links(rule, &mut doubt);
            if rule.action == Action::Disable && rule.conditions.is_by_words_alone() {
                doubt(
                    "a process that does not want to be disabled can choose its command name and words: match `exe`"
                        .to_owned(),
                );
            }
            if rule.action == Action::Enable && rule.backend.unwrap_or(self.defaults.backend) == Backend::Store {
                doubt(
                    "the page store takes programs in when they are started (pagefold run): `apply` leaves them"
                        .to_owned(),
                );
            }
        }
        found
    }
}

/// /proc shows the file that is executed, with all links followed.
fn links(rule: &Rule, doubt: &mut impl FnMut(String)) {
    for glob in rule.conditions.exe.iter().filter(|glob| glob.is_literal()) {
        let path = Path::new(glob.text());
        match path.canonicalize() {
            Ok(real) if real != path => {
                doubt(format!(
                    "{glob} leads to {}, and no process is shown as running a link: write that",
                    real.display()
                ));
            }
            Ok(real) if real.is_dir() => doubt(format!("{glob} is a folder: \"{glob}/*\" are the programs in it")),
            Ok(_) => {}
            Err(_) => doubt(format!("there is no {glob} here")),
        }
    }
}

impl Conditions {
    /// It asks only for what a process can choose.
    fn is_by_words_alone(&self) -> bool {
        let Self { script, comm, args, .. } = self;
        let words = Self { script: script.clone(), comm: comm.clone(), args: args.clone(), ..Self::default() };
        words == *self
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn what_is_probably_not_meant() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().canonicalize().unwrap();
        let (file, link) = (folder.join("program"), folder.join("link"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let text = format!(
            "version = 1\ndefaults.action = \"enable\"\n\
             rule = [\n\
             {{ match = {{ exe = \"{link}\" }}, action = \"enable\" }},\n\
             {{ match = {{ exe = \"{file}\" }}, action = \"enable\", backend = \"store\" }},\n\
             {{ match = {{ exe = \"{folder}\" }}, action = \"enable\" }},\n\
             {{ match = {{ exe = \"{folder}/none\" }}, action = \"enable\" }},\n\
             {{ match = {{ comm = \"x\", args = \"y\" }}, action = \"disable\" }},\n\
             {{ match = {{ user = [\"root\", \"nobody at all\", 5] }}, action = \"enable\" }},\n\
             {{ match = {{ comm = \"x\", args = \"y\" }}, action = \"enable\" }},\n\
             {{ match = {{ exe = \"**/x\" }}, action = \"disable\" }},\n]\n",
            link = link.display(),
            file = file.display(),
            folder = folder.display(),
        );
        let doubts = Rules::parse(&text).unwrap().doubts(&Users::host());
        let begins: Vec<(usize, &str)> =
            doubts.iter().map(|doubt| (doubt.line, doubt.message.split(&[' ', ':'][..]).next().unwrap())).collect();
        let link = link.to_str().unwrap();
        assert_eq!(
            begins,
            [
                (1, "[defaults]"),
                (4, link),
                (5, "the"),
                (6, folder.to_str().unwrap()),
                (7, "there"),
                (8, "a"),
                (9, "no"),
                (10, "never")
            ]
        );
        assert!(doubts[1].message.contains(file.to_str().unwrap()));
        assert_eq!(Rules::parse("version = 1").unwrap().doubts(&Users::host()), []);
    }
}
