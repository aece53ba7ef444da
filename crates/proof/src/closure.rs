//! A program's file and all that the loader brings in for it, before it runs.

use std::fs::File;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::error::ProofError;
use crate::judge::Verdict;
use crate::library::{Library, Loaded, Place, preloaded_everywhere};
use crate::object::Needs;
use crate::reason::{Reason, is_sanitized};
use crate::report::{Object, Progress, Prover, Report, check_libcs, name_of};

/// The most files of one program. The largest have some hundreds.
const MOST: usize = 4096;

/// A file that the loader will map.
struct Member {
    path: PathBuf,
    file: File,
    /// Device and inode: one file may be needed under several names.
    identity: (u64, u64),
}

impl Prover<'_> {
    /// Judges a program or library by its file and the files that it needs.
    ///
    /// Libraries that the program opens while it runs (dlopen: modules, plug-ins, name services) are not seen, nor is
    /// what it compiles: [`judge_process`](Self::judge_process) sees both.
    ///
    /// # Errors
    /// If the file itself cannot be read. What is wrong with it, or with what it needs, is part of the report.
    pub fn judge_file(&mut self, path: &Path) -> Result<Report, ProofError> {
        let given = std::path::absolute(path).map_err(ProofError::Read)?;
        let path = path.canonicalize().map_err(ProofError::Read)?;
        let program = name_of(&path);
        let library = Library::of_host();
        let file = open(&path).map_err(ProofError::Read)?;
        let mut missing: Vec<Object> = Vec::new();
        let mut members = vec![Member { identity: identity(&file).map_err(ProofError::Read)?, file, path: given }];
        let mut loaded = vec![Loaded { path, needs: Needs::default(), loader: None }];
        let mut runs = false;
        let mut at = 0;
        while at < members.len() {
            // A file whose headers cannot be read needs nothing that could be told; its own verdict says so.
            let needs = members.get(at).map(|member| Needs::of(&member.file)).and_then(Result::ok).unwrap_or_default();
            let mut names = needs.needed.clone();
            if at == 0 {
                runs = needs.is_program;
                names.extend(needs.interpreter.clone());
                if runs {
                    names.extend(preloaded_everywhere());
                }
                if runs && is_sanitized(&needs.needed) {
                    let reason = Reason::AddressSanitizer.to_string();
                    missing.push(Object::other("[AddressSanitizer]", Verdict::Unknown, reason));
                }
            }
            if needs.broken {
                let of = loaded.get(at).map(|loaded| loaded.path.clone()).unwrap_or_default();
                missing.push(Object::other(of, Verdict::Unknown, "needs a library whose name cannot be read"));
            }
            if let Some(loaded) = loaded.get_mut(at) {
                loaded.needs = needs;
            }
            for name in names {
                match library.find(&name, &loaded, at, &|path| fits(path)) {
                    Place::Files(paths) => {
                        for path in paths {
                            add(path, at, &mut members, &mut loaded);
                        }
                    }
                    // A library with this name is there already: the loader asks no further.
                    _ if loaded.iter().any(|it| it.needs.soname.as_deref() == Some(&name)) => {}
                    Place::Nowhere => {
                        missing.push(Object::other(&name, Verdict::Unknown, "is needed and was not found"));
                    }
                    Place::CurrentFolder => missing.push(Object::other(
                        &name,
                        Verdict::Unknown,
                        "is looked for in the folder that the program is started in",
                    )),
                }
            }
            if members.len() > MOST {
                return Err(ProofError::TooBig { what: "number of libraries" });
            }
            at += 1;
        }
        let mut objects = Vec::new();
        let mut all = Vec::new();
        let count = members.len();
        for (done, member) in members.into_iter().enumerate() {
            (self.progress)(Progress { done, all: count, path: &member.path });
            let (object, facts) = self.object(&member.file, member.path, &program);
            objects.push(object);
            all.push(facts);
        }
        objects.append(&mut missing);
        if runs {
            check_libcs(&all, &mut objects);
        }
        Ok(self.report(objects))
    }
}

/// Adds a file, unless it is there already.
fn add(path: PathBuf, by: usize, members: &mut Vec<Member>, loaded: &mut Vec<Loaded>) {
    let Ok(file) = open(&path) else { return };
    let Ok(identity) = identity(&file) else { return };
    if members.iter().all(|member| member.identity != identity) {
        loaded.push(Loaded { path: path.clone(), needs: Needs::default(), loader: Some(by) });
        members.push(Member { path, file, identity });
    }
}

/// Would the loader take this file, or look further? It passes over what is for another machine.
fn fits(path: &Path) -> bool {
    open(path).is_ok_and(|file| {
        file.metadata().is_ok_and(|about| about.is_file())
            && !matches!(Needs::of(&file), Err(ProofError::Machine { .. } | ProofError::Elf(_)))
    })
}

/// Opens a file without waiting for whoever would write into a FIFO.
fn open(path: &Path) -> std::io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    std::fs::OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)
}

fn identity(file: &File) -> std::io::Result<(u64, u64)> {
    file.metadata().map(|about| (about.dev(), about.ino()))
}
