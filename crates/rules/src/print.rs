//! Rules as a file again, in one order and with one way to write each thing.

use std::fmt::{self, Display, Formatter};

use kernel::MappingWord;

use crate::amount::{size_text, time_text};
use crate::glob::Glob;
use crate::rule::{Backend, Conditions, Defaults, ProfitRules, Rule, Rules, User, VERSION};

impl Display for Rules {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "version = {VERSION}")?;
        if self.defaults != Defaults::default() {
            writeln!(f, "\n[defaults]\naction = \"{}\"", self.defaults.action.word())?;
            if !self.defaults.exclude.is_empty() {
                writeln!(f, "exclude = {}", mappings(&self.defaults.exclude))?;
            }
            writeln!(f, "backend = \"{}\"", self.defaults.backend.word())?;
        }
        if self.profit != ProfitRules::default() {
            let ProfitRules { passes, loss, retry, retry_most } = &self.profit;
            writeln!(f, "\n[profit]\npasses = {passes}\nloss = \"{}\"", size_text(*loss))?;
            writeln!(f, "retry = \"{}\"\nretry_most = \"{}\"", time_text(*retry), time_text(*retry_most))?;
        }
        self.rules.iter().try_for_each(|rule| write!(f, "\n{rule}"))
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "[[rule]]")?;
        for (key, text) in [("name", &self.name), ("reason", &self.reason)] {
            if let Some(text) = text {
                writeln!(f, "{key} = {}", quoted(text))?;
            }
        }
        writeln!(f, "match = {}\naction = \"{}\"", self.conditions, self.action.word())?;
        if !self.vma.is_empty() {
            writeln!(f, "vma = {}", mappings(&self.vma))?;
        }
        if let Some(exclude) = &self.exclude {
            writeln!(f, "exclude = {}", mappings(exclude))?;
        }
        if let Some(backend) = self.backend {
            writeln!(f, "backend = \"{}\"", Backend::word(backend))?;
        }
        if let Some(label) = &self.partition {
            writeln!(f, "partition = {}", quoted(label))?;
        }
        if self.override_never_merge {
            writeln!(f, "override_never_merge = true")?;
        }
        Ok(())
    }
}

/// As an inline table.
impl Display for Conditions {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let mut globs = |key: &str, globs: &[Glob]| {
            if !globs.is_empty() {
                parts.push(format!("{key} = {}", list(globs.iter().map(|glob| quoted(glob.text())))));
            }
        };
        globs("exe", &self.exe);
        globs("script", &self.script);
        globs("comm", &self.comm);
        globs("args", &self.args);
        globs("cgroup", &self.cgroup);
        globs("container", &self.container);
        globs("pod", &self.pod);
        globs("unit", &self.unit);
        if !self.user.is_empty() {
            parts.push(format!("user = {}", list(self.user.iter().map(user))));
        }
        let flags = [("container", self.in_container), ("setuid", self.setuid)];
        parts.extend(flags.iter().filter_map(|(key, flag)| flag.map(|flag| format!("{key} = {flag}"))));
        let times = [("min_age", self.age.min), ("max_age", self.age.max)];
        parts
            .extend(times.iter().filter_map(|(key, time)| time.map(|time| format!("{key} = \"{}\"", time_text(time)))));
        let sizes = [
            ("min_rss", self.rss.min),
            ("max_rss", self.rss.max),
            ("min_anon", self.anon.min),
            ("max_anon", self.anon.max),
        ];
        parts
            .extend(sizes.iter().filter_map(|(key, size)| size.map(|size| format!("{key} = \"{}\"", size_text(size)))));
        if let Some(other) = self.other_pid_namespace {
            parts.push(format!("pid_namespace = \"{}\"", if other { "other" } else { "host" }));
        }
        write!(f, "{{ {} }}", parts.join(", "))
    }
}

fn user(user: &User) -> String {
    match user {
        User::Name(name) => quoted(name),
        User::Id(id) => id.to_string(),
    }
}

fn mappings(words: &[MappingWord]) -> String {
    let items: Vec<String> = words.iter().map(|word| quoted(&word.to_string())).collect();
    format!("[{}]", items.join(", "))
}

/// One without brackets.
fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    if let [one] = items.as_slice() { one.clone() } else { format!("[{}]", items.join(", ")) }
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            other if other.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(other))),
            other => out.push(other),
        }
    }
    out.push('"');
    out
}
