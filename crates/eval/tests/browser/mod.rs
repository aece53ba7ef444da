//! A real browser without a window.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// What it is called, on Debian and elsewhere.
const NAMES: [&str; 3] = ["chromium-headless-shell", "chromium", "google-chrome"];

/// A browser, with a folder of its own that goes with it.
pub(crate) struct Browser {
    program: &'static str,
    folder: PathBuf,
}

/// What it made of a page.
pub(crate) struct Shown {
    /// The document, as the browser has it in the end.
    pub(crate) dom: String,
    /// What it said on the console: errors, and refusals of the page's policy.
    pub(crate) console: String,
}

impl Browser {
    /// The one that is installed.
    pub(crate) fn find() -> Option<Self> {
        let there =
            |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
        let Some(program) = NAMES.into_iter().find(there) else {
            println!("skipped: chromium");
            return None;
        };
        let folder = std::env::temp_dir().join(format!("pagefold-browser-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        Some(Self { program, folder })
    }

    /// Loads a page from a file. With PAGEFOLD_SCREENSHOTS=FOLDER, pictures of it in light and dark go there.
    pub(crate) fn show(&self, name: &str, page: &str) -> Shown {
        let file = self.folder.join(format!("{name}.html"));
        fs::write(&file, page).unwrap();
        let url = format!("file://{}", file.display());
        if let Some(pictures) = std::env::var_os("PAGEFOLD_SCREENSHOTS").map(PathBuf::from) {
            fs::copy(&file, pictures.join(format!("{name}.html"))).unwrap();
            for (scheme, number) in [("dark", 0), ("light", 1)] {
                let picture = pictures.join(format!("{name}-{scheme}.png"));
                let words = [
                    format!("--screenshot={}", picture.display()),
                    format!("--blink-settings=preferredColorScheme={number}"),
                    "--window-size=1200,4200".to_owned(),
                ];
                assert!(self.command().args(words).arg(&url).status().unwrap().success());
            }
        }
        let output = self.command().args(["--enable-logging=stderr", "--dump-dom"]).arg(&url).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        let console: Vec<&str> = said.lines().filter(|line| line.contains("CONSOLE")).collect();
        Shown { dom: String::from_utf8(output.stdout).unwrap(), console: console.join("\n") }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(self.program);
        command
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"])
            // A page that waits for an answer would be waited for.
            .arg("--timeout=10000")
            .arg(format!("--user-data-dir={}", self.folder.join("profile").display()))
            .env("HOME", &self.folder);
        command
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// How often a word stands in a text.
pub(crate) fn count(text: &str, word: &str) -> usize {
    text.matches(word).count()
}
