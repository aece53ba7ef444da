//! The programs, how their workers are started, and who speaks with them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde::Serialize;

use super::interrupt;
use super::postgres::{self, Backend};
use super::redis::Redis;
use super::wire::{Launcher, Wire};
use super::worker::{Lines, Worker};

const PYTHON: &str = include_str!("worker.py");
const NODE: &str = include_str!("worker.js");
const JAVA: &str = include_str!("Worker.java");

/// A program whose workers serve requests. Beside what all workers of a program hold, each holds a fortieth as much that
/// no other holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// CPython: a dictionary of 100,000 entries, texts, and an SQLite database.
    Python,
    /// Node.js: a map of 100,000 entries, and texts.
    Node,
    /// A JVM with the serial collector: a hash map of 100,000 entries, and a block.
    JvmSerial,
    /// The same with the G1 collector.
    JvmG1,
    /// redis servers of 10,000 keys.
    Redis,
    /// Backends of one PostgreSQL server, each with a cursor of 40,000 rows.
    Postgres,
}

/// A program that was found, with its folder.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) kind: Kind,
    /// Its files; the workers' own lie in folders inside it.
    pub(super) folder: PathBuf,
    /// Whom it runs as, if not as this user: PostgreSQL refuses to be root.
    pub(super) user: Option<&'static str>,
    /// What starts a worker.
    words: Vec<String>,
}

impl Kind {
    /// The name in options and reports.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Python => "python",
            Self::Node => "node",
            Self::JvmSerial => "jvm-serial",
            Self::JvmG1 => "jvm-g1",
            Self::Redis => "redis",
            Self::Postgres => "postgres",
        }
    }

    /// Looks for it and prepares what its workers need, in an empty folder. `Err` inside says what is missing here.
    pub(super) fn find(self, folder: &Path) -> Result<Result<Program, String>> {
        let missing = |what: &str| Ok(Err(format!("{what} is not installed")));
        let mut program = Program { kind: self, folder: folder.to_owned(), user: None, words: Vec::new() };
        let path = |name: &str| folder.join(name).display().to_string();
        program.words = match self {
            Self::Python => {
                // The first of PATH may be a script of a version manager.
                let system = Path::new("/usr/bin/python3");
                let ask = ["python3", "-c", "import sys, sqlite3; print(sys.executable)"];
                let found = if system.exists() { Some(system.display().to_string()) } else { answer(&ask) };
                let found = found.filter(|python| answer(&[python, "-c", "import sqlite3; print(1)"]).is_some());
                let Some(python) = found else { return missing("a python3 with sqlite3") };
                fs::write(folder.join("worker.py"), PYTHON)?;
                vec![python, path("worker.py")]
            }
            Self::Node => {
                let Some(node) = answer(&["node", "-p", "process.execPath"]) else { return missing("node") };
                fs::write(folder.join("worker.js"), NODE)?;
                vec![node, path("worker.js")]
            }
            Self::JvmSerial | Self::JvmG1 => {
                let Some(java) = in_path("java") else { return missing("java") };
                let collector = if self == Self::JvmG1 { "-XX:+UseG1GC" } else { "-XX:+UseSerialGC" };
                fs::write(folder.join("Worker.java"), JAVA)?;
                let mut words = vec![java.display().to_string(), collector.to_owned()];
                words.extend(["-Xms64m", "-Xmx192m"].map(str::to_owned));
                if let Some(javac) = in_path("javac") {
                    run(Command::new(javac).arg("-d").arg(folder).arg(folder.join("Worker.java")))?;
                    words.extend(["-cp".to_owned(), folder.display().to_string(), "Worker".to_owned()]);
                } else {
                    words.push(path("Worker.java"));
                }
                words
            }
            Self::Redis => {
                let Some(redis) = in_path("redis-server") else { return missing("redis-server") };
                let options = ["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"];
                std::iter::once(redis.display().to_string()).chain(options.map(str::to_owned)).collect()
            }
            Self::Postgres => {
                let Some(folder_of_postgres) = newest_postgres() else { return missing("PostgreSQL") };
                if rustix::process::geteuid().is_root() {
                    if answer(&["id", "-u", "postgres"]).is_none() || in_path("setpriv").is_none() {
                        return missing("the user postgres, or setpriv,");
                    }
                    program.user = Some("postgres");
                }
                program.give(folder)?;
                let mut command = program.as_user();
                command.push(folder_of_postgres.join("initdb").display().to_string());
                command.extend(["-D", &path("data"), "-A", "trust", "-U", postgres::USER, "-N"].map(str::to_owned));
                let (first, rest) = command.split_first().context("a command has a program")?;
                run(Command::new(first).args(rest).current_dir(folder))?;
                let server = folder_of_postgres.join("postgres").display().to_string();
                let data = path("data");
                let options = ["-D", &data, "-c", "listen_addresses=", "-c", "shared_buffers=32MB", "-c", "fsync=off"];
                let mut words = vec![server];
                words.extend(options.map(str::to_owned));
                words.push("-k".to_owned());
                words
            }
        };
        Ok(Ok(program))
    }
}

impl Program {
    /// Makes the workers' conversations, before they are started, and a script that starts them in `folder`, speaks
    /// when they end in `folder/log`, and ends them with its own standard input.
    pub(super) fn workers(
        &self,
        folder: &Path,
        count: usize,
        launcher: &Launcher,
    ) -> Result<(Vec<Box<dyn Worker>>, String)> {
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        let mut script = format!("cd {}\npids=\n", quote(&folder.display().to_string()));
        let mut start = |words: &[String], streams: &str| {
            let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
            script.push_str(&format!("{} {streams} 2>>log &\npids=\"$pids $!\"\n", words.join(" ")));
        };
        for number in 0..count {
            match self.kind {
                Kind::Python | Kind::Node | Kind::JvmSerial | Kind::JvmG1 => {
                    workers.push(Box::new(Lines::new(Wire::pipes(folder, number, launcher)?)));
                    let mut words = self.words.clone();
                    words.push(number.to_string());
                    start(&words, &format!("<{number}.in >{number}.out"));
                }
                Kind::Redis => {
                    let socket = folder.join(format!("{number}.sock"));
                    let mut words = self.words.clone();
                    words.push(socket.display().to_string());
                    workers.push(Box::new(Redis::new(socket, number, launcher)));
                    start(&words, "</dev/null >>log");
                }
                Kind::Postgres => {
                    workers.push(Box::new(Backend::new(folder.join(".s.PGSQL.5432"), number, launcher)));
                    if number == 0 {
                        let mut words = self.words.clone();
                        words.push(folder.display().to_string());
                        start(&words, "</dev/null >>log");
                    }
                }
            }
        }
        script.push_str("read -r end\nkill $pids 2>/dev/null\nwait\n");
        Ok((workers, script))
    }

    /// Words in front of a command that is to run as the program's user.
    pub(super) fn as_user(&self) -> Vec<String> {
        let Some(user) = self.user else { return Vec::new() };
        ["setpriv", "--reuid", user, "--regid", user, "--clear-groups", "--"].map(str::to_owned).to_vec()
    }

    /// Gives a folder to the program's user.
    pub(super) fn give(&self, folder: &Path) -> Result<()> {
        let Some(user) = self.user else { return Ok(()) };
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
        run(Command::new("chown").arg(user).arg(folder))
    }
}

/// One word for the shell.
fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A program along PATH.
fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Debian has them beside each other, others along PATH.
fn newest_postgres() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let number = |folder: &PathBuf| folder.file_name()?.to_str()?.parse::<u32>().ok();
    let newest = versions.map(|entry| entry.path()).filter(|folder| number(folder).is_some()).max_by_key(number);
    let beside = newest.map(|folder| folder.join("bin"));
    let found = beside.or_else(|| in_path("postgres")?.parent().map(Path::to_owned))?;
    (found.join("postgres").exists() && found.join("initdb").exists()).then_some(found)
}

/// The first line that a command says; `None` if it cannot be run or fails.
fn answer(words: &[&str]) -> Option<String> {
    let (program, arguments) = words.split_first()?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    interrupt::let_through(&mut command);
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}

/// Runs a command that has to succeed.
fn run(command: &mut Command) -> Result<()> {
    interrupt::let_through(command);
    let name = command.get_program().display().to_string();
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {name}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{name} ended with {}: {said}", output.status);
    Ok(())
}
