//! What can run the workers of the ksm part of `pagefold demo`, and the files that they load.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::demo_hearing::Hearing;

const PYTHON_WORKER: &str = include_str!("demo_worker.py");
const NODE_WORKER: &str = include_str!("demo_worker.js");

/// Bytes of files that each worker loads.
const CORPUS: u64 = 3_000_000;
/// Longest that an interpreter may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(20);

/// What can run the workers.
pub(crate) struct Interpreter {
    pub(crate) program: PathBuf,
    kind: Kind,
    /// Where its own library lies, in files that every installation has.
    library: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Python { numpy: bool },
    Node,
}

impl Interpreter {
    /// A Python with sqlite3, with numpy rather than without; else a Node.
    pub(crate) fn find() -> Option<Self> {
        let mut pythons: Vec<Self> =
            ["python3", "/usr/bin/python3"].into_iter().filter_map(|name| Self::python(Path::new(name))).collect();
        pythons.sort_by_key(|found| found.kind != Kind::Python { numpy: true });
        pythons.into_iter().next().or_else(Self::node)
    }

    /// Asks it where it really lies: what is in PATH may be a script of a version manager, which would be started with
    /// the shared layout in place of the interpreter.
    fn python(name: &Path) -> Option<Self> {
        const QUESTION: &str = "import sys, sqlite3, sysconfig\nprint(sys.executable)\n\
            print(sysconfig.get_paths()['stdlib'])\ntry:\n import numpy\n print('numpy')\nexcept ImportError: pass";
        let answer = ask(Command::new(name).args(["-c", QUESTION]))?;
        let mut lines = answer.lines();
        let (program, library) = (lines.next()?.into(), lines.next()?.into());
        Some(Self { program, library, kind: Kind::Python { numpy: lines.next().is_some() } })
    }

    fn node() -> Option<Self> {
        let program: PathBuf = ask(Command::new("node").args(["-p", "process.execPath"]))?.trim().into();
        Some(Self { program, library: "/usr/share".into(), kind: Kind::Node })
    }

    /// A command that runs the worker; its files are still missing.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        match self.kind {
            Kind::Python { .. } => command.args(["-c", PYTHON_WORKER]),
            // V8 places its heap and collects garbage by chance and by threads of its own; these make it repeatable.
            Kind::Node => command
                .args(["--hash-seed=1", "--random-seed=1", "--single-threaded", "--predictable"])
                .args(["-e", NODE_WORKER, "--"]),
        };
        // One seed for all: the order of dictionaries is part of what they hold.
        command.env("PYTHONHASHSEED", "0").env("PYTHONDONTWRITEBYTECODE", "1").env("OPENBLAS_NUM_THREADS", "1");
        command
    }

    pub(crate) fn data(&self) -> &'static str {
        match self.kind {
            Kind::Python { numpy: true } => {
                "a dictionary of 100,000 entries, an SQLite database, a numpy array and texts"
            }
            Kind::Python { numpy: false } => "a dictionary of 100,000 entries, an SQLite database and texts",
            Kind::Node => "a map of 100,000 entries and texts",
        }
    }

    /// Files of this machine for the workers, always in the same order.
    pub(crate) fn corpus(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut left = CORPUS;
        for root in [self.library.as_path(), Path::new("/usr/include"), Path::new("/usr/share")] {
            collect(root, &mut files, &mut left);
        }
        files
    }
}

fn ask(command: &mut Command) -> Option<String> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
    let answer = Hearing::new(child.stdout.take()?).all(PATIENCE);
    if answer.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().ok()?;
    answer.ok().filter(|_| status.success())
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>, left: &mut u64) {
    let mut entries: Vec<_> = fs::read_dir(directory).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(kind) = entry.file_type() else { continue };
        if *left == 0 {
            return;
        }
        if kind.is_dir() {
            collect(&entry.path(), files, left);
        } else if kind.is_file()
            && let Ok(found) = entry.metadata()
            && (1..=1 << 20).contains(&found.len())
            && entry
                .path()
                .extension()
                .is_some_and(|end| ["py", "h", "js", "txt", "pl", "pm", "xml"].iter().any(|&word| end == word))
        {
            *left = left.saturating_sub(found.len());
            files.push(entry.path());
        }
    }
}
