//! The verdict on a whole program: the worst of all that it runs.

use std::fs::File;
use std::path::{Path, PathBuf};

use kernel::Range;
use serde::Serialize;

use crate::cache::Cache;
use crate::judge::{Judgement, Verdict, judge};
use crate::lists::Lists;
use crate::object::Facts;
use crate::trust::{TrustedAs, trust_line};
use crate::verdict::LIBC;

/// One file or stretch of memory that a program runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Object {
    /// Path of the file, or a name in brackets.
    pub path: PathBuf,
    /// The linker's build-id note, in hexadecimal.
    pub build_id: Option<String>,
    /// Bytes of code.
    pub code_bytes: u64,
    /// Verdict and reasons.
    #[serde(flatten)]
    pub judgement: Judgement,
    /// It compiles while the program runs: whose engine it is, and whether that is trusted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine: Option<Engine>,
}

/// A file that compiles code while the program runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Engine {
    /// What it is called.
    pub name: String,
    /// Why executable memory is taken to be its own; nothing if this build is on no list.
    pub why: Option<String>,
}

/// The verdict on a program, and on each part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst of all objects.
    pub verdict: Verdict,
    /// What the program runs, the worst first.
    pub objects: Vec<Object>,
    /// Bytes of code of all objects.
    pub code_bytes: u64,
    /// Objects that were decoded; the others were known from before.
    pub decoded: usize,
}

/// How far a long look has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'p> {
    /// Objects that were judged.
    pub done: usize,
    /// Objects that are known of; for a file the number grows as they name others.
    pub all: usize,
    /// The one that is looked at.
    pub path: &'p Path,
}

/// Judges programs: with lists, a cache if there is one, and somebody who is told how far it is.
pub struct Prover<'p> {
    pub(crate) lists: &'p Lists,
    pub(crate) cache: Option<&'p Cache>,
    pub(crate) progress: &'p mut dyn FnMut(Progress<'_>),
    /// Where the agent's code lies in the process that is judged, if that is known.
    pub(crate) own_code: Option<&'p [Range]>,
    pub(crate) decoded: usize,
}

impl std::fmt::Debug for Prover<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prover").field("cache", &self.cache).field("decoded", &self.decoded).finish_non_exhaustive()
    }
}

impl<'p> Prover<'p> {
    /// Without a cache everything is decoded anew.
    pub fn new(lists: &'p Lists, cache: Option<&'p Cache>, progress: &'p mut dyn FnMut(Progress<'_>)) -> Self {
        Self { lists, cache, progress, own_code: None, decoded: 0 }
    }

    /// Leaves out the agent's own code in the process that is judged: its image, and the pieces that its patched sites lead
    /// to. Where that is not known, small pieces of memory that nobody can write to are taken for these.
    #[must_use]
    pub fn without(mut self, own_code: &'p [Range]) -> Self {
        self.own_code = Some(own_code);
        self
    }

    /// Judges one file that comes into a program which runs already. It has its C library and its loader, where the gate
    /// is: another one makes its calls past it.
    pub fn judge_what_comes(&mut self, file: &File, path: &Path, program: &Path) -> Object {
        let (object, facts) = self.object(file, path.to_owned(), &name_of(program));
        match facts.gate {
            Some(_) => {
                Object::other(path, Verdict::Unknown, "the gate is in the C library and loader that are there already")
            }
            None => object,
        }
    }

    /// Judges an open file.
    pub(crate) fn object(&mut self, file: &File, path: PathBuf, program: &str) -> (Object, Facts) {
        let kept = self.cache.and_then(|cache| cache.get(file));
        let facts = kept.unwrap_or_else(|| {
            self.decoded += 1;
            match self.cache {
                Some(cache) => cache.decode(file),
                None => Facts::of(file),
            }
        });
        (self.of_facts(&facts, path, program), facts)
    }

    pub(crate) fn of_facts(&self, facts: &Facts, path: PathBuf, program: &str) -> Object {
        let file_name = name_of(&path);
        let judgement = judge(facts, &file_name, program, self.lists);
        let names: Vec<&str> = facts.soname.as_deref().into_iter().chain([file_name.as_str()]).collect();
        let engine = self.lists.engine(&names, facts.build_id.as_deref(), program);
        Object { path, build_id: facts.build_id.clone(), code_bytes: facts.code_bytes, judgement, engine }
    }

    pub(crate) fn report(&self, mut objects: Vec<Object>) -> Report {
        objects.sort_by(|one, other| {
            other.judgement.verdict.cmp(&one.judgement.verdict).then_with(|| one.path.cmp(&other.path))
        });
        Report {
            verdict: objects.iter().map(|object| object.judgement.verdict).max().unwrap_or(Verdict::Unknown),
            code_bytes: objects.iter().map(|object| object.code_bytes).sum(),
            decoded: self.decoded,
            objects,
        }
    }
}

impl Object {
    /// Something that is no file that could be looked at.
    pub(crate) fn other(path: impl Into<PathBuf>, verdict: Verdict, reason: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            build_id: None,
            code_bytes: 0,
            judgement: Judgement { verdict, reasons: vec![reason.into()], trust_line: None },
            engine: None,
        }
    }

    /// The line that makes this file's executable memory trusted.
    #[must_use]
    pub fn engine_line(&self) -> Option<String> {
        self.build_id.as_deref().and_then(|id| trust_line(TrustedAs::Engine, id, &name_of(&self.path)))
    }
}

/// Says of a program without exactly one C library that the gate has nowhere to go.
pub(crate) fn check_libcs(all: &[Facts], objects: &mut Vec<Object>) {
    let libcs = all.iter().filter(|facts| facts.gate.is_some() && facts.soname.as_deref() == Some(LIBC)).count();
    match libcs {
        1 => {}
        0 => {
            objects.push(Object::other(
                "[C library]",
                Verdict::Unknown,
                "no glibc that the gate could be patched into",
            ));
        }
        _ => objects.push(Object::other(
            "[C library]",
            Verdict::Unknown,
            "more than one, and the gate is in one of them",
        )),
    }
}

/// The last part of a path.
pub(crate) fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}
