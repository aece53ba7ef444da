//! Rules in words.

use std::fmt::{self, Display, Formatter};

use crate::amount::{size_text, time_text};
use crate::decide::Why;
use crate::glob::Glob;
use crate::rule::{Action, Backend, Bounds, Conditions, Rule, User};

/// What a rule does with whom, in words.
pub struct Explained<'a>(pub &'a Rule);

impl Display for Explained<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let rule = self.0;
        match rule.action {
            Action::Enable if rule.backend == Some(Backend::Store) => f.write_str("for the page store")?,
            Action::Enable => f.write_str("enables")?,
            Action::Disable => f.write_str("disables")?,
            Action::Ignore => f.write_str("leaves alone")?,
        }
        write!(f, " processes {}", whom(&rule.conditions).join(", "))?;
        if !rule.vma.is_empty() {
            write!(f, "; only their {}", joined(rule.vma.iter()))?;
        }
        match rule.exclude.as_deref() {
            Some([]) => f.write_str("; all of their memory")?,
            Some(words) => write!(f, "; not their {}", joined(words.iter()))?,
            None => {}
        }
        if let Some(label) = &rule.partition {
            write!(f, "; in the partition {label:?}")?;
        }
        if rule.override_never_merge {
            f.write_str("; though they are on the never-merge list")?;
        }
        Ok(())
    }
}

/// The conditions, one by one: all must be fulfilled.
fn whom(conditions: &Conditions) -> Vec<String> {
    let mut parts = Vec::new();
    let mut some = |what: &str, globs: &[Glob]| {
        if !globs.is_empty() {
            parts.push(format!("{what} {}", joined(globs.iter())));
        }
    };
    some("that execute", &conditions.exe);
    some("that interpret", &conditions.script);
    some("that call themselves", &conditions.comm);
    some("in the cgroup", &conditions.cgroup);
    some("in the container", &conditions.container);
    some("in the pod", &conditions.pod);
    some("in the unit", &conditions.unit);
    if !conditions.args.is_empty() {
        let words: Vec<String> = conditions.args.iter().map(ToString::to_string).collect();
        parts.push(format!("with the words {}", words.join(" and ")));
    }
    if !conditions.user.is_empty() {
        parts.push(format!("of user {}", joined(conditions.user.iter())));
    }
    let choose = |flag: Option<bool>, yes: &str, no: &str| flag.map(|is| if is { yes } else { no }.to_owned());
    parts.extend(choose(conditions.in_container, "in any container", "in no container"));
    parts.extend(choose(conditions.setuid, "that are setuid", "that are not setuid"));
    let (other, own) = ("in another PID namespace", "in this PID namespace");
    parts.extend(choose(conditions.other_pid_namespace, other, own));
    parts.extend(between(conditions.age, "since their start", |time| time_text(*time)));
    parts.extend(between(conditions.rss, "resident", |size| size_text(*size)));
    parts.extend(between(conditions.anon, "of anonymous memory", |size| size_text(*size)));
    parts
}

fn between<T>(bounds: Bounds<T>, what: &str, text: impl Fn(&T) -> String) -> Option<String> {
    match (bounds.min.as_ref().map(&text), bounds.max.as_ref().map(&text)) {
        (Some(min), Some(max)) => Some(format!("with {min} to {max} {what}")),
        (Some(min), None) => Some(format!("with at least {min} {what}")),
        (None, Some(max)) => Some(format!("with at most {max} {what}")),
        (None, None) => None,
    }
}

fn joined<T: Display>(items: impl Iterator<Item = T>) -> String {
    items.map(|item| item.to_string()).collect::<Vec<_>>().join(" or ")
}

impl Display for User {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Id(id) => write!(f, "{id}"),
        }
    }
}

/// By what it was decided.
impl Display for Why {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeverMerge(reason) => write!(f, "never-merge list, {}", reason.name),
            Self::Rule { number, line, name: Some(name), .. } => write!(f, "rule {number}, {name} (line {line})"),
            Self::Rule { number, line, name: None, .. } => write!(f, "rule {number} (line {line})"),
            Self::Defaults => f.write_str("defaults"),
            Self::KernelThread => f.write_str("a thread of the kernel"),
            Self::Zombie => f.write_str("has ended"),
            Self::Undone => f.write_str("enabled by rules before"),
            Self::Pagefold => f.write_str("pagefold's own"),
            Self::NotPermitted => f.write_str("not permitted to see its program"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::rule::Rules;

    #[test]
    fn every_condition_has_words() {
        let text = "version = 1\n[[rule]]\nmatch = { exe = [\"/a\", \"/b\"], script = \"s\", comm = \"c\", args = [\"x\", \
             \"y\"], user = [5, \"www\"], cgroup = \"/g\", container = \"docker\", pod = \"1\", unit = \"u\", min_age = \
             \"2s\", max_rss = \"1MiB\", min_anon = \"1B\", max_anon = \"2B\", setuid = false, pid_namespace = \"other\" }\n\
             action = \"enable\"\nvma = \"heap\"\nexclude = [\"stack\", \"/x\"]\n\
             [[rule]]\nmatch = { exe = \"/a\", container = false }\naction = \"ignore\"\noverride_never_merge = true\n";
        let rules = Rules::parse(text).unwrap();
        assert_eq!(
            Explained(&rules.rules[0]).to_string(),
            "enables processes that execute /a or /b, that interpret s, that call themselves c, in the cgroup /g, in the \
             container docker, in the pod 1, in the unit u, with the words x and y, of user 5 or www, that are not setuid, \
             in another PID namespace, with at least 2s since their start, with at most 1MiB resident, with 1B to 2B of \
             anonymous memory; only their heap; not their stack or /x"
        );
        assert_eq!(
            Explained(&rules.rules[1]).to_string(),
            "leaves alone processes that execute /a, in no container; though they are on the never-merge list"
        );
    }
}
