//! From the text of a file to rules.

use std::ops::Range;

use kernel::MappingWord;
use toml::de::{DeTable, DeValue};

use crate::amount;
use crate::document::{Placed, Reader};
use crate::error::RulesError;
use crate::glob::{Glob, Kind};
use crate::rule::{Action, Backend, Bounds, Conditions, Defaults, ProfitRules, Rule, Rules, User, VERSION};

/// Keys of the document itself.
const TOP: [&str; 4] = ["version", "defaults", "profit", "rule"];
const DEFAULTS: [&str; 3] = ["action", "exclude", "backend"];
const PROFIT: [&str; 4] = ["passes", "loss", "retry", "retry_most"];
const RULE: [&str; 9] =
    ["name", "reason", "match", "action", "vma", "exclude", "backend", "partition", "override_never_merge"];
const MATCH: [&str; 17] = [
    "exe",
    "script",
    "comm",
    "args",
    "user",
    "cgroup",
    "container",
    "pod",
    "unit",
    "min_age",
    "max_age",
    "min_rss",
    "max_rss",
    "min_anon",
    "max_anon",
    "setuid",
    "pid_namespace",
];

/// Every section of a file, with the keys that it may have.
pub const KEYS: [(&str, &[&str]); 5] =
    [("", &TOP), ("defaults", &DEFAULTS), ("profit", &PROFIT), ("rule", &RULE), ("match", &MATCH)];

impl Rules {
    /// Reads a file of rules.
    ///
    /// # Errors
    /// [`RulesError`] with all mistakes, each with its place and, where one can be guessed, its remedy.
    pub fn parse(text: &str) -> Result<Self, RulesError> {
        let (mut reader, document) = Reader::new(text);
        // What could be read of a broken document says nothing about what was meant.
        let rules = if reader.is_clean() { read(&mut reader, document.get_ref()) } else { Self::default() };
        let problems = reader.problems();
        if problems.is_empty() { Ok(rules) } else { Err(RulesError { problems }) }
    }
}

fn read<'t>(reader: &mut Reader<'t>, document: &DeTable<'t>) -> Rules {
    reader.only(document, &TOP, "at the top of the file");
    version(reader, document);
    let mut rules = Rules::default();
    if let Some((_, table)) = reader.table(document, "defaults") {
        rules.defaults = defaults(reader, table);
    }
    if let Some((_, table)) = reader.table(document, "profit") {
        rules.profit = profit(reader, table);
    }
    for (at, table) in reader.tables(document, "rule") {
        let rule = rule(reader, &at, table, rules.defaults.backend);
        rules.rules.push(rule);
    }
    rules
}

fn version<'t>(reader: &mut Reader<'t>, document: &DeTable<'t>) {
    let Some(value) = document.get("version") else {
        reader.problem(0..0, format!("`version = {VERSION}` is missing at the top of the file"));
        return;
    };
    let (at, number) = (value.span(), reader.number(document, "version"));
    if number.is_some_and(|number| number != u64::from(VERSION)) {
        reader.problem(at, format!("this pagefold reads version {VERSION} of the format only"));
    }
}

fn defaults<'t>(reader: &mut Reader<'t>, table: &DeTable<'t>) -> Defaults {
    reader.only(table, &DEFAULTS, "in [defaults]");
    Defaults {
        action: action(reader, table).unwrap_or_default(),
        exclude: mappings(reader, table, "exclude").unwrap_or_default(),
        backend: backend(reader, table).unwrap_or_default(),
    }
}

fn profit<'t>(reader: &mut Reader<'t>, table: &DeTable<'t>) -> ProfitRules {
    reader.only(table, &PROFIT, "in [profit]");
    let usual = ProfitRules::default();
    let most = reader.parsed(table, "retry_most", amount::time);
    let retry = reader.parsed(table, "retry", amount::time);
    if let (Some(retry), Some(most)) = (retry, most)
        && most < retry
        && let Some(value) = table.get("retry_most")
    {
        reader.problem(value.span(), "`retry_most` must not be less than `retry`");
    }
    let retry = retry.unwrap_or_else(|| usual.retry.min(most.unwrap_or(usual.retry)));
    ProfitRules {
        passes: reader.number(table, "passes").unwrap_or(usual.passes),
        loss: reader.parsed(table, "loss", amount::size).unwrap_or(usual.loss),
        retry,
        retry_most: most.unwrap_or_else(|| usual.retry_most.max(retry)),
    }
}

fn rule<'t>(reader: &mut Reader<'t>, at: &Range<usize>, table: &DeTable<'t>, usual: Backend) -> Rule {
    reader.only(table, &RULE, "in a rule");
    let owned = |(_, text): Placed<'_>| text.to_owned();
    let rule = Rule {
        line: reader.line(at.start),
        name: reader.text(table, "name").map(owned),
        reason: reader.text(table, "reason").map(owned),
        conditions: match reader.table(table, "match") {
            Some((at, inner)) => conditions(reader, &at, inner),
            None => Conditions::default(),
        },
        action: action(reader, table).unwrap_or_default(),
        vma: mappings(reader, table, "vma").unwrap_or_default(),
        // An empty list is meant: nothing is left out, whatever the defaults say.
        exclude: mappings(reader, table, "exclude"),
        backend: backend(reader, table),
        partition: reader.text(table, "partition").map(owned),
        override_never_merge: reader.flag(table, "override_never_merge").unwrap_or_default(),
    };
    if !table.contains_key("match") {
        reader.problem(
            at.clone(),
            "a rule needs a `match` that says whom it fits; for everybody else there is [defaults]",
        );
    }
    if !table.contains_key("action") {
        reader.problem(at.clone(), "a rule needs an `action`: \"enable\", \"disable\" or \"ignore\"");
    }
    let mut wrong = |key: &str, message: &str| {
        if let Some(value) = table.get(key) {
            reader.problem(value.span(), message);
        }
    };
    if rule.partition.is_some() && rule.backend.unwrap_or(usual) == Backend::Ksm {
        wrong(
            "partition",
            "a `partition` needs `backend = \"store\"`: the kernel's KSM knows one tree for the whole host",
        );
    }
    if table.get("vma").is_some_and(|value| value.get_ref().as_array().is_some_and(|list| list.is_empty())) {
        wrong("vma", "`vma` must not be an empty list; leave it out for the whole process");
    }
    if rule.partition.as_deref() == Some("") {
        wrong("partition", "`partition` must not be empty");
    }
    if rule.action != Action::Enable {
        for key in ["vma", "exclude", "partition", "backend"] {
            wrong(key, &format!("`{key}` means something with `action = \"enable\"` only"));
        }
    }
    if rule.override_never_merge {
        let exe = &rule.conditions.exe;
        if exe.is_empty() || !exe.iter().all(|glob| glob.is_literal() && glob.text().starts_with('/')) {
            wrong(
                "override_never_merge",
                "`override_never_merge` needs the exact path of the program: `exe` in `match`, without patterns",
            );
        }
        if rule.action == Action::Disable {
            wrong("override_never_merge", "`override_never_merge` has no use with `action = \"disable\"`");
        }
    }
    rule
}

fn conditions<'t>(reader: &mut Reader<'t>, at: &Range<usize>, table: &DeTable<'t>) -> Conditions {
    reader.only(table, &MATCH, "in the `match` of a rule");
    if table.is_empty() {
        reader.problem(at.clone(), "an empty `match` would fit every process; for everybody else there is [defaults]");
    }
    let (in_container, container) = match table.get("container").map(|value| value.get_ref()) {
        Some(DeValue::Boolean(any)) => (Some(*any), Vec::new()),
        _ => (None, globs(reader, table, "container", Kind::Word)),
    };
    let exe = globs(reader, table, "exe", Kind::Path);
    if let Some(value) = table.get("exe") {
        for glob in exe.iter().filter(|glob| !glob.text().starts_with(['/', '*', '?', '['])) {
            let message = format!("`exe` is a whole path: \"/usr/bin/{glob}\", or \"**/{glob}\" in any folder");
            reader.problem(value.span(), message);
        }
    }
    Conditions {
        exe,
        script: globs(reader, table, "script", Kind::Path),
        comm: globs(reader, table, "comm", Kind::Word),
        args: globs(reader, table, "args", Kind::Word),
        user: users(reader, table),
        cgroup: globs(reader, table, "cgroup", Kind::Path),
        in_container,
        container,
        pod: globs(reader, table, "pod", Kind::Word),
        unit: globs(reader, table, "unit", Kind::Word),
        age: bounds(reader, table, ["min_age", "max_age"], amount::time),
        rss: bounds(reader, table, ["min_rss", "max_rss"], amount::size),
        anon: bounds(reader, table, ["min_anon", "max_anon"], amount::size),
        setuid: reader.flag(table, "setuid"),
        other_pid_namespace: reader.word(table, "pid_namespace", &[("host", false), ("other", true)]),
    }
}

fn globs<'t>(reader: &mut Reader<'t>, table: &DeTable<'t>, key: &str, kind: Kind) -> Vec<Glob> {
    let Some(texts) = texts(reader, table, key) else { return Vec::new() };
    let mut found = Vec::new();
    for (at, text) in texts {
        match Glob::new(text, kind) {
            Ok(glob) => found.push(glob),
            Err(why) => reader.problem(at, format!("`{key}`: {why}")),
        }
    }
    found
}

/// A text or a list of some, not of none: that would be a condition that nobody fulfils, or everybody.
fn texts<'a, 't>(reader: &mut Reader<'t>, table: &'a DeTable<'t>, key: &str) -> Option<Vec<Placed<'a>>> {
    if let Some(value) = table.get(key)
        && value.get_ref().as_array().is_some_and(|list| list.is_empty())
    {
        reader.problem(value.span(), format!("`{key}` must not be an empty list; leave it out"));
    }
    reader.texts(table, key)
}

/// Names in quotes, numbers without or with.
fn users<'t>(reader: &mut Reader<'t>, table: &DeTable<'t>) -> Vec<User> {
    let Some(value) = table.get("user") else { return Vec::new() };
    let single = std::slice::from_ref(value);
    let items = value.get_ref().as_array().map_or(single, |list| list.as_ref());
    if items.is_empty() {
        reader.problem(value.span(), "`user` must not be an empty list; leave it out");
    }
    let mut found = Vec::new();
    for item in items {
        let id = |text: &str, radix| u32::from_str_radix(text, radix).ok().map(User::Id);
        let user = match item.get_ref() {
            DeValue::String(text) if text.is_empty() => None,
            DeValue::String(text) => Some(id(text, 10).unwrap_or_else(|| User::Name(text.to_string()))),
            DeValue::Integer(number) => id(number.as_str(), number.radix()),
            _ => None,
        };
        match user {
            Some(user) => found.push(user),
            None => reader.wrong_type(item, "user", "the name of a user in quotes or a user id, or a list of such"),
        }
    }
    found
}

fn bounds<'t, T: PartialOrd>(
    reader: &mut Reader<'t>,
    table: &DeTable<'t>,
    keys: [&str; 2],
    read: fn(&str) -> Result<T, String>,
) -> Bounds<T> {
    let (min, max) = (reader.parsed(table, keys[0], read), reader.parsed(table, keys[1], read));
    if min.is_some() && max.is_some() && min > max {
        let at = table.get(keys[1]).map(toml::Spanned::span).unwrap_or_default();
        reader.problem(at, format!("`{}` is less than `{}`: nobody fits", keys[1], keys[0]));
    }
    Bounds { min, max }
}

fn action<'t>(reader: &mut Reader<'t>, table: &DeTable<'t>) -> Option<Action> {
    reader.word(table, "action", &Action::ALL.map(|action| (action.word(), action)))
}

fn backend<'t>(reader: &mut Reader<'t>, table: &DeTable<'t>) -> Option<Backend> {
    reader.word(table, "backend", &Backend::ALL.map(|backend| (backend.word(), backend)))
}

/// Mappings by words, as `pagefold enable` takes them.
fn mappings<'t>(reader: &mut Reader<'t>, table: &DeTable<'t>, key: &str) -> Option<Vec<MappingWord>> {
    let mut found = Vec::new();
    for (at, text) in reader.texts(table, key)? {
        match text.parse() {
            Ok(MappingWord::Addresses(_)) => {
                let why = format!("`{key}`: {text:?}: addresses differ from process to process; name the mapping");
                reader.problem(at, why);
            }
            Ok(word) => found.push(word),
            Err(why) => reader.problem(at, format!("`{key}`: {why}")),
        }
    }
    Some(found)
}
