//! Facts about processes that are there.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kernel::{Bytes, Pid};
use pagefold_rules::{Action, Facts, Kind, Rules, Users, Why, facts, never_merge};

/// A process that is ended with the test.
struct Running(Child);

impl Running {
    /// Starts it and waits until the facts are as they are to be: a child is a copy of the test for a moment, and then for
    /// another one a program that has its name and not yet its words.
    fn start(command: &mut Command, is_there: impl Fn(&Facts) -> bool) -> (Self, Facts) {
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let child = loop {
            match command.spawn() {
                // A child of another test's has the copy of the program open for writing until it executes its own.
                Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
                child => break child.unwrap(),
            }
        };
        let running = Self(child);
        let found = running.until(|it| !it.command_line.is_empty() && is_there(it));
        (running, found)
    }

    fn pid(&self) -> Pid {
        Pid(self.0.id().cast_signed())
    }

    fn until(&self, is_there: impl Fn(&Facts) -> bool) -> Facts {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let found = facts(self.pid(), &Users::host()).unwrap();
            if is_there(&found) {
                return found;
            }
            assert!(Instant::now() < deadline, "{found:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The dynamic loader, as programs name it.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// A copy of `sleep` under another path.
fn copy_of_sleep(to: &Path) -> PathBuf {
    std::fs::create_dir_all(to.parent().unwrap()).unwrap();
    testing::copy_program("/usr/bin/sleep", to);
    to.canonicalize().unwrap()
}

fn rules(text: &str) -> Rules {
    Rules::parse(&format!("version = 1\n{text}")).unwrap()
}

#[test]
fn a_program_its_words_its_memory_and_its_parent() {
    let (child, found) = Running::start(Command::new("/usr/bin/sleep").args(["60", "0"]), |it| {
        // As it begins, it has hardly more than its stack.
        it.comm == "sleep" && it.rss > it.anon && it.anon > Bytes(0)
    });
    assert_eq!((found.pid, found.parent, found.kind), (child.pid().get(), Pid::this().get(), Kind::Program));
    assert_eq!(found.exe.as_deref(), Some(Path::new("/usr/bin/sleep").canonicalize().unwrap().as_path()));
    assert_eq!(found.command_line[1..], ["60", "0"]);
    assert_eq!(found.uid, rustix_uid());
    assert!(found.age < Duration::from_secs(30) && !found.setuid && !found.is_pagefold && !found.other_pid_namespace);
    assert!(found.cgroups.iter().all(|path| path.starts_with('/')) && !found.cgroups.is_empty());
    assert_eq!(found.script, None);
}

fn rustix_uid() -> u32 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").unwrap().uid()
}

#[test]
fn what_has_ended_has_no_facts_and_what_waits_for_its_parent_is_a_zombie() {
    let mut child = Command::new("true").spawn().unwrap();
    let pid = Pid(child.id().cast_signed());
    let deadline = Instant::now() + Duration::from_secs(20);
    // For a moment it is neither a program nor a zombie: it has ended, and that is all.
    while facts(pid, &Users::default()).is_none_or(|it| it.kind != Kind::Zombie) {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    let zombie = facts(pid, &Users::default()).unwrap();
    assert_eq!(Rules::default().decide(&zombie).why, Why::Zombie);
    child.wait().unwrap();
    assert_eq!(facts(pid, &Users::default()), None);
}

#[test]
fn a_thread_of_the_kernel_is_left_alone_whatever_the_rules_say() {
    let Some(found) = facts(Pid(2), &Users::host()).filter(|it| it.comm == "kthreadd") else {
        println!("skipped: threads of the kernel in this PID namespace");
        return;
    };
    let decision = rules("defaults.action = \"enable\"").decide(&found);
    assert_eq!((decision.action, decision.why), (Action::Ignore, Why::KernelThread));
}

#[test]
fn a_key_agent_that_calls_itself_otherwise_is_one_and_a_program_that_calls_itself_so_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let agent = copy_of_sleep(&folder.path().join("bin/ssh-agent"));
    // Another name in its words, and in its command name.
    let (child, _) = Running::start(Command::new(&agent).arg0("worker").arg("60"), |it| it.comm == "ssh-agent");
    std::fs::write(format!("/proc/{}/comm", child.pid()), "worker").unwrap_or(());
    let found = facts(child.pid(), &Users::host()).unwrap();
    assert_eq!(found.command_line[0], "worker");
    assert_eq!(never_merge(&found).unwrap().name, "key agents");
    let all = rules("defaults.action = \"enable\"\n[[rule]]\nmatch = { exe = \"**\" }\naction = \"enable\"");
    let decision = all.decide(&found);
    assert!(decision.action == Action::Disable && matches!(decision.why, Why::NeverMerge(_)), "{decision:?}");

    let (_child, found) = Running::start(Command::new("/usr/bin/sleep").arg0("/usr/bin/ssh-agent").arg("60"), |it| {
        it.comm == "sleep" && it.command_line.first().is_some_and(|word| word == "/usr/bin/ssh-agent")
    });
    assert_eq!(never_merge(&found), None);
}

/// The kernel shows the loader as what is executed. Seen to fail: nobody knew the program.
#[test]
fn a_program_that_the_loader_runs_is_known_by_what_is_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let (agent, worker) =
        (copy_of_sleep(&folder.path().join("ssh-agent")), copy_of_sleep(&folder.path().join("worker")));
    let loaded = |words: &[&Path]| {
        let mut command = Command::new(LOADER);
        command.arg("--argv0").arg("/usr/bin/gpg-agent").args(words).arg("60");
        Running::start(&mut command, |it| !it.loaded.is_empty())
    };
    let (_child, found) = loaded(&[&agent]);
    assert_eq!(found.exe, Path::new(LOADER).canonicalize().ok());
    assert_eq!(found.loaded.as_slice(), std::slice::from_ref(&agent));
    assert_eq!(never_merge(&found).unwrap().name, "key agents");
    let fits = |exe: &Path, found: &Facts| {
        let text = format!("[[rule]]\nmatch = {{ exe = \"{}\" }}\naction = \"disable\"", exe.display());
        rules(&text).rules[0].conditions.fit(found)
    };
    assert!(fits(&agent, &found) && fits(&Path::new(LOADER).canonicalize().unwrap(), &found) && !fits(&worker, &found));
    // Words are only words.
    let (_child, found) = loaded(&[&worker]);
    assert_eq!((found.loaded.as_slice(), never_merge(&found)), (&[worker][..], None));
    // Nor is its own name more than that. Seen to fail: nothing was taken to be loaded.
    let renamed = folder.path().join("myloader");
    testing::copy_program(LOADER, &renamed);
    let (_child, found) = Running::start(Command::new(&renamed).arg(&agent).arg("60"), |it| !it.loaded.is_empty());
    assert_eq!(found.loaded.as_slice(), std::slice::from_ref(&agent));
    assert_eq!(never_merge(&found).unwrap().name, "key agents");
}

#[test]
fn what_an_interpreter_runs_that_the_loader_runs() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("pass");
    std::fs::write(&script, "read line\n").unwrap();
    let (_child, found) = Running::start(Command::new(LOADER).arg("/bin/sh").arg(&script), |it| !it.loaded.is_empty());
    assert_eq!(found.script.as_deref(), script.to_str());
    assert_eq!(never_merge(&found).unwrap().name, "password managers in other languages");
}

/// Only the rule that names exactly this file overrides the list, and only if it is the first that fits.
#[test]
fn the_list_is_overridden_by_the_exact_path_only() {
    let folder = tempfile::tempdir().unwrap();
    let agent = copy_of_sleep(&folder.path().join("ssh-agent"));
    let (_child, found) = Running::start(Command::new(&agent).arg("60"), |it| it.comm == "ssh-agent");
    let with = |exe: &Path| {
        let text = format!(
            "[[rule]]\nmatch = {{ exe = \"{}\" }}\naction = \"enable\"\noverride_never_merge = true\n\
             [[rule]]\nmatch = {{ exe = \"**\" }}\naction = \"enable\"\n",
            exe.display()
        );
        rules(&text).decide(&found).action
    };
    assert_eq!(with(&agent), Action::Enable);
    assert_eq!(with(Path::new("/usr/bin/ssh-agent")), Action::Disable);
}

#[test]
fn a_program_that_was_replaced_keeps_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let agent = copy_of_sleep(&folder.path().join("ssh-agent"));
    let (child, _) = Running::start(Command::new(&agent).arg("60"), |it| it.comm == "ssh-agent");
    std::fs::remove_file(&agent).unwrap();
    let found = facts(child.pid(), &Users::host()).unwrap();
    assert_eq!(found.exe.as_deref(), Some(agent.as_path()));
    assert!(never_merge(&found).is_some());
}

#[test]
fn a_setuid_program_is_one_whoever_runs_it() {
    let folder = tempfile::tempdir().unwrap();
    let program = copy_of_sleep(&folder.path().join("program"));
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755)).unwrap();
    let (_child, found) = Running::start(Command::new(&program).arg("60"), |it| it.comm == "program");
    assert!(found.setuid);
    assert_eq!(never_merge(&found).unwrap().name, "programs with others' rights");
    let only = rules("[[rule]]\nmatch = { setuid = true }\naction = \"ignore\"");
    assert!(only.rules[0].conditions.fit(&found));
}

#[test]
fn what_an_interpreter_runs() {
    let folder = tempfile::tempdir().unwrap();
    let script = folder.path().join("pass");
    testing::write_program(&script, "#!/bin/sh\nread line\n");
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (_child, found) = Running::start(&mut Command::new(&script), |it| it.script.is_some());
    assert_eq!(found.script.as_deref(), script.to_str());
    assert_eq!(never_merge(&found).unwrap().name, "password managers in other languages");
}

#[test]
fn other_users_go_by_name_and_number() {
    if rustix_uid() != 0 {
        println!("skipped: root");
        return;
    }
    let (_child, found) = Running::start(Command::new("sleep").arg("60").uid(65534).gid(65534), |it| {
        it.comm == "sleep" && it.uid == 65534
    });
    let fits = |user: &str| {
        rules(&format!("[[rule]]\nmatch = {{ user = {user} }}\naction = \"enable\"")).rules[0].conditions.fit(&found)
    };
    assert!(fits("65534") && fits("\"65534\"") && fits("[1, 65534]") && !fits("\"root\"") && !fits("0"));
    if let Some(name) = Users::host().name(65534) {
        assert!(fits(&format!("{name:?}")));
    }
}

#[test]
fn another_pid_namespace() {
    let (_child, found) = match Command::new("unshare").args(["--pid", "--fork", "true"]).status() {
        Ok(status) if status.success() => {
            let mut command = Command::new("unshare");
            command.args(["--pid", "--fork", "--kill-child", "sleep", "60"]);
            Running::start(&mut command, |it| it.comm == "unshare")
        }
        _ => {
            println!("skipped: unshare --pid");
            return;
        }
    };
    assert!(!found.other_pid_namespace, "unshare itself stays");
    let deadline = Instant::now() + Duration::from_secs(20);
    let inner = loop {
        let all = kernel::status::processes().unwrap();
        let mut all = all.into_iter().filter_map(|pid| facts(pid, &Users::default()));
        if let Some(inner) = all.find(|it| it.parent == found.pid && it.comm == "sleep") {
            break inner;
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(inner.other_pid_namespace);
    assert!(
        rules("[[rule]]\nmatch = { pid_namespace = \"other\" }\naction = \"enable\"").rules[0].conditions.fit(&inner)
    );
}

/// A cgroup of its own, of either kind, removed with the test.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Option<Self> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/memory"];
        let make = |root: &str| {
            let folder = Path::new(root).join(name);
            std::fs::create_dir_all(&folder).ok()?;
            folder.join("cgroup.procs").exists().then_some(Self(folder))
        };
        roots.into_iter().find_map(make)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let mut at = self.0.as_path();
        while at
            .file_name()
            .is_some_and(|name| name != "cgroup" && name != "unified" && name != "pids" && name != "memory")
        {
            let _ = std::fs::remove_dir(at);
            at = at.parent().unwrap();
        }
    }
}

#[test]
fn a_container_and_a_unit_are_seen_by_the_cgroup_of_a_process() {
    let id = "4f1c0a9b7e2d4f1c0a9b7e2d4f1c0a9b7e2d4f1c0a9b7e2d4f1c0a9b7e2d4f1c";
    let name = format!("pagefold-test-{}.slice/docker-{id}.scope", std::process::id());
    let Some(cgroup) = Cgroup::new(&name) else {
        println!("skipped: cgroups of its own");
        return;
    };
    let (child, _) = Running::start(Command::new("sleep").arg("60"), |it| it.comm == "sleep");
    std::fs::write(cgroup.0.join("cgroup.procs"), child.pid().to_string()).unwrap();
    let found = facts(child.pid(), &Users::host()).unwrap();
    drop(child);
    assert!(found.cgroups.contains(&format!("/{name}")), "{:?}", found.cgroups);
    assert_eq!(
        (found.containers.len(), found.containers[0].runtime, found.containers[0].id.as_str()),
        (1, "docker", id)
    );
    assert!(found.units.contains(&format!("docker-{id}.scope")));
    let fits = |text: &str| {
        rules(&format!("[[rule]]\nmatch = {{ {text} }}\naction = \"enable\"")).rules[0].conditions.fit(&found)
    };
    assert!(fits("container = true") && fits("container = \"docker\"") && fits("container = \"docker:4f1c*\""));
    assert!(!fits("container = \"podman\"") && !fits("container = false") && !fits("pod = \"*\""));
    assert!(fits("cgroup = \"/pagefold-test-*/**\"") && !fits("cgroup = \"/pagefold-test-*\""));
    assert!(fits("unit = \"pagefold-test-*.slice\"") && fits("exe = \"/usr/bin/sleep\", container = true"));
}
