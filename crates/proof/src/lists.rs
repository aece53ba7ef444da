//! What people have reviewed: libraries with system calls of their own, engines that compile at run time, and what the
//! operator of this machine trusts besides.

use std::sync::OnceLock;

use toml::de::{DeArray, DeTable, DeValue};

use crate::calls::number_of;
use crate::headers::Headers;
use crate::object::{Facts, hexadecimal};
use crate::report;
use crate::trust::{Trust, TrustedAs};

const KNOWN: &str = include_str!("known.toml");
const ENGINES: &str = include_str!("engines.toml");

/// What a review came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    Allow,
    Refuse,
}

/// A library that was looked at by people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) name: String,
    /// `DT_SONAME`, or the name of the file where there is none; a `*` at the end stands for anything.
    pub(crate) files: Vec<String>,
    /// If any are given, only these builds.
    pub(crate) build_ids: Vec<String>,
    /// The calls that it may make beside harmless ones.
    pub(crate) calls: Vec<u32>,
    /// Sites whose number is not told, or that may be none, were looked at too. Only for builds that are given.
    pub(crate) unresolved: bool,
    /// If any are given, only in these programs.
    pub(crate) programs: Vec<String>,
    pub(crate) effect: Effect,
    pub(crate) reason: String,
}

/// A compiler that works inside programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Engine {
    pub(crate) name: String,
    pub(crate) files: Vec<String>,
    pub(crate) build_ids: Vec<String>,
    /// If any are given, only there: a library that many programs use says nothing about who else compiles in them.
    pub(crate) programs: Vec<String>,
    pub(crate) reason: String,
}

/// What is known about libraries and engines: the lists that are shipped, and the operator's.
#[derive(Clone, Debug)]
pub struct Lists {
    pub(crate) known: Vec<Known>,
    pub(crate) engines: Vec<Engine>,
    pub(crate) trust: Trust,
    /// The name and the build-id of pagefold's own agent, which is in every member.
    own: Option<(String, String)>,
}

impl Default for Lists {
    fn default() -> Self {
        static READ: OnceLock<(Vec<Known>, Vec<Engine>)> = OnceLock::new();
        let (known, engines) = READ.get_or_init(|| {
            let read = read_known(KNOWN).zip(read_engines(ENGINES));
            read.expect("the shipped lists are read by a test")
        });
        Self { known: known.clone(), engines: engines.clone(), trust: Trust::default(), own: None }
    }
}

impl Lists {
    /// The shipped lists and what the operator trusts.
    #[must_use]
    pub fn with(trust: Trust) -> Self {
        Self { trust, ..Self::default() }
    }

    /// Adds pagefold's own agent, from its file's bytes: it changes mappings, and is the gate. Nothing if it has no build-id.
    #[must_use]
    pub fn with_agent(mut self, name: &str, image: &[u8]) -> Self {
        let build_id = Headers::read(image).ok().and_then(|headers| headers.build_id);
        self.own = build_id.map(|id| (name.to_owned(), hexadecimal(&id)));
        self
    }

    /// Is this pagefold's own agent?
    pub(crate) fn is_own(&self, facts: &Facts, file_name: &str) -> bool {
        self.own.as_ref().is_some_and(|(name, id)| name == file_name && facts.build_id.as_ref() == Some(id))
    }

    /// The entries for a file, which may differ in what they ask for.
    pub(crate) fn known<'l>(&'l self, names: &[&str]) -> impl Iterator<Item = &'l Known> {
        self.known.iter().filter(|known| any_fits(&known.files, names))
    }

    /// The engine that a file is in this program, and whether this build of it is trusted.
    pub(crate) fn engine(&self, names: &[&str], build_id: Option<&str>, program: &str) -> Option<report::Engine> {
        if let Some(line) = build_id.and_then(|id| self.trust.find(id, names, TrustedAs::Engine)) {
            let name = names.first().copied().unwrap_or_default().to_owned();
            return Some(report::Engine { name, why: Some(format!("trusted by line {line} of the trust file")) });
        }
        let fits = |engine: &&Engine| {
            any_fits(&engine.files, names) && (engine.programs.is_empty() || any_fits(&engine.programs, &[program]))
        };
        let engine = self.engines.iter().find(fits)?;
        let is_known = build_id.is_some_and(|id| engine.build_ids.iter().any(|known| known == id));
        Some(report::Engine { name: engine.name.clone(), why: is_known.then(|| engine.reason.clone()) })
    }
}

/// Does a name fit one of the patterns?
pub(crate) fn any_fits(patterns: &[String], names: &[&str]) -> bool {
    names.iter().any(|name| {
        patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => pattern == name,
        })
    })
}

fn read_known(text: &str) -> Option<Vec<Known>> {
    entries(text, "known", |entry| {
        let calls = strings(entry, "calls")?;
        let calls = calls.iter().map(|name| number_of(name)).collect::<Option<Vec<u32>>>()?;
        let known = Known {
            name: string(entry, "name")?,
            files: strings(entry, "files")?,
            build_ids: strings(entry, "build_ids")?,
            calls,
            unresolved: matches!(entry.get("unresolved").map(|value| value.get_ref()), Some(DeValue::Boolean(true))),
            programs: strings(entry, "programs")?,
            effect: match string(entry, "effect")?.as_str() {
                "allow" => Effect::Allow,
                "refuse" => Effect::Refuse,
                _ => return None,
            },
            reason: string(entry, "reason")?,
        };
        // By name alone nobody may vouch for what nobody has seen.
        (!known.unresolved || !known.build_ids.is_empty()).then_some(known)
    })
}

fn read_engines(text: &str) -> Option<Vec<Engine>> {
    entries(text, "engine", |entry| {
        Some(Engine {
            name: string(entry, "name")?,
            files: strings(entry, "files")?,
            build_ids: strings(entry, "build_ids")?,
            programs: strings(entry, "programs")?,
            reason: string(entry, "reason")?,
        })
    })
}

/// Every table of an array of tables; `None` if one of them is not as it should be.
fn entries<T>(text: &str, name: &str, read: impl Fn(&DeTable<'_>) -> Option<T>) -> Option<Vec<T>> {
    let table = DeTable::parse(text).ok()?;
    let DeValue::Array(list) = table.get_ref().get(name)?.get_ref() else { return None };
    let read_one = |value: &toml::Spanned<DeValue<'_>>| match value.get_ref() {
        DeValue::Table(entry) => read(entry),
        _ => None,
    };
    list.iter().map(read_one).collect()
}

fn string(entry: &DeTable<'_>, key: &str) -> Option<String> {
    entry.get(key)?.get_ref().as_str().map(str::to_owned)
}

/// A list of texts, empty if the key is missing.
fn strings(entry: &DeTable<'_>, key: &str) -> Option<Vec<String>> {
    let none = DeArray::default();
    let list = match entry.get(key).map(|value| value.get_ref()) {
        None => &none,
        Some(DeValue::Array(list)) => list,
        Some(_) => return None,
    };
    list.iter().map(|value| value.get_ref().as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Bytes that are built into a program begin anywhere. Seen to fail at all addresses but multiples of eight.
    #[test]
    fn the_agent_is_known_wherever_its_bytes_lie() {
        let libc = kernel::maps::read(kernel::Pid::this()).unwrap();
        let libc = libc.iter().find(|vma| vma.name.to_string_lossy().contains("/libc.so")).unwrap();
        let image = std::fs::read(&libc.name).unwrap();
        for offset in 0..8 {
            let moved = [&vec![0; offset][..], &image].concat();
            assert!(Lists::default().with_agent("agent.so", &moved[offset..]).own.is_some(), "{offset}");
        }
    }

    #[test]
    fn every_entry_says_whom_it_is_about_and_why() {
        for known in read_known(KNOWN).unwrap() {
            assert!(!known.files.is_empty() && known.reason.len() > 20, "{known:?}");
        }
        for engine in read_engines(ENGINES).unwrap() {
            assert!(!engine.files.is_empty() && engine.reason.len() > 20, "{engine:?}");
            assert!(engine.build_ids.iter().all(|id| id.len() >= 16 && id == &id.to_lowercase()), "{engine:?}");
        }
    }

    #[test]
    fn a_library_vouches_in_its_programs_alone() {
        let lists = Lists::default();
        let of =
            |file: &str, id: &str, program: &str| lists.engine(&[file], Some(id), program).map(|it| it.why.is_some());
        let pcre = "80008c19cf49e3f09f312e74d164938e91d9337d";
        assert_eq!(of("libpcre2-8.so.0", pcre, "nginx"), Some(true));
        assert_eq!(of("libpcre2-8.so.0", &pcre.replace('8', "9"), "nginx"), Some(false));
        assert_eq!(of("libpcre2-8.so.0", pcre, "firefox"), None);
        assert_eq!(of("libnode.so.999", pcre, "node"), Some(false));
    }

    #[test]
    fn a_name_alone_vouches_for_nothing_that_was_not_seen() {
        let entry = "[[known]]\nname='x'\nfiles=['x']\neffect='allow'\nreason='y'\nunresolved=true\n";
        assert_eq!(read_known(entry), None);
        assert!(read_known(&format!("{entry}build_ids=['00']\n")).is_some());
        assert_eq!(read_known("[[known]]\nname='x'\nfiles=['x']\neffect='allow'\nreason='y'\ncalls=['nmap']\n"), None);
    }
}
