//! What an interpreter runs.

use std::path::Path;

/// A program that runs programs.
struct Interpreter {
    /// The beginning of its file's name: digits, dots and dashes may follow.
    names: &'static [&'static str],
    /// Options that take the next word with them.
    valued: &'static [&'static str],
    /// Options behind which the program stands as text, or comes from elsewhere.
    text: &'static [&'static str],
}

const INTERPRETERS: [Interpreter; 10] = [
    Interpreter { names: &["python", "pypy"], valued: &["-W", "-X", "--check-hash-based-pycs"], text: &["-c"] },
    Interpreter { names: &["perl"], valued: &["-I"], text: &["-e", "-E"] },
    Interpreter { names: &["ruby"], valued: &["-I", "-r", "-C"], text: &["-e"] },
    Interpreter { names: &["php"], valued: &["-c", "-d", "-z"], text: &["-r", "-B", "-R"] },
    Interpreter {
        names: &["node", "nodejs", "bun"],
        valued: &["-r", "--require", "--import", "--loader"],
        text: &["-e", "--eval", "-p", "--print"],
    },
    Interpreter { names: &["lua", "luajit"], valued: &["-l"], text: &["-e"] },
    Interpreter {
        names: &["bash", "dash", "sh", "zsh", "ksh"],
        valued: &["-O", "-o", "--rcfile"],
        text: &["-c", "-s"],
    },
    Interpreter { names: &["java"], valued: &["-cp", "-classpath", "--class-path", "-p", "--module-path"], text: &[] },
    Interpreter { names: &["mono", "mono-sgen"], valued: &[], text: &[] },
    Interpreter { names: &["guile"], valued: &["-L", "-C", "-l"], text: &["-c"] },
];

/// Programs that are many, and do as they are called.
const MANY_IN_ONE: [&str; 4] = ["busybox", "toybox", "dropbearmulti", "coreutils"];

/// The program that an interpreter runs: a path as it was given, the name of a module (`python -m`, `java`), or the
/// applet of busybox. `None` for what is no interpreter, has no such word, or got its program as text (`-c`).
///
/// These words are the process's own memory, which it may overwrite: it can hide what it runs from this.
#[must_use]
pub fn script(exe: &Path, command_line: &[String]) -> Option<String> {
    let name = exe.file_name()?.to_str()?;
    let (zeroth, rest) = command_line.split_first()?;
    if MANY_IN_ONE.contains(&name) {
        let called = zeroth.rsplit('/').next()?.trim_start_matches('-');
        return if called == name { rest.first().cloned() } else { Some(called.to_owned()) };
    }
    let stem = name.trim_end_matches(|it: char| it.is_ascii_digit() || matches!(it, '.' | '-'));
    let is_it = |it: &&Interpreter| it.names.iter().any(|known| *known == stem || *known == name);
    let interpreter = INTERPRETERS.iter().find(is_it)?;
    let mut words = rest.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--" | "-jar" | "-m" | "--module" | "-f" => return words.next().cloned(),
            // From standard input.
            "-" => return None,
            option if interpreter.text.contains(&option) => return None,
            option if interpreter.valued.contains(&option) => drop(words.next()),
            option if option.starts_with(['-', '+']) => {}
            program => return Some(program.to_owned()),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(exe: &str, line: &str) -> Option<String> {
        script(Path::new(exe), &line.split(' ').map(ToOwned::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_word_that_names_the_program() {
        for (exe, line, found) in [
            ("/usr/bin/python3.11", "python3 /usr/bin/electrum --daemon", Some("/usr/bin/electrum")),
            ("/usr/bin/python3.11", "python3 -u -W ignore x.py", Some("x.py")),
            ("/usr/bin/python3.11", "python3 -m http.server 80", Some("http.server")),
            ("/usr/bin/python3.11", "python3 -c pass x", None),
            ("/usr/bin/python3.11", "python3", None),
            ("/usr/bin/perl", "perl -w -I lib /x.pl", Some("/x.pl")),
            ("/usr/bin/bash", "bash -c pass x", None),
            ("/usr/bin/bash", "/bin/bash -e -o pipefail /usr/bin/pass show x", Some("/usr/bin/pass")),
            ("/usr/bin/dash", "sh -- -x", Some("-x")),
            ("/usr/lib/jvm/java-17/bin/java", "java -Xmx1g -cp a:b com.x.Main", Some("com.x.Main")),
            ("/usr/bin/java", "java -jar vault.jar", Some("vault.jar")),
            ("/usr/bin/mono-sgen", "mono /usr/lib/keepass2/KeePass.exe", Some("/usr/lib/keepass2/KeePass.exe")),
            ("/usr/bin/node", "node -r x server.js", Some("server.js")),
            ("/bin/busybox", "-passwd root", Some("passwd")),
            ("/bin/busybox", "busybox login", Some("login")),
            ("/usr/sbin/sshd", "sshd: root", None),
            ("/usr/bin/pythonista", "pythonista x", None),
        ] {
            assert_eq!(of(exe, line).as_deref(), found, "{line}");
        }
        assert_eq!(script(Path::new("/usr/bin/python3"), &[]), None);
    }
}
