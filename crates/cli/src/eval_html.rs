//! The page of `pagefold eval --html FILE`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use eval::{Additions, Report};

use crate::summary_file;

/// The file that the page goes to.
pub(crate) struct PageFile {
    name: PathBuf,
    path: PathBuf,
}

impl PageFile {
    /// Makes sure that it can be written, before the long work starts. What is there stays until the page is complete.
    pub(crate) fn open(name: &Path) -> anyhow::Result<Self> {
        let path = summary_file::regular(name).with_context(|| format!("cannot write the page {}", name.display()))?;
        Ok(Self { name: name.to_owned(), path })
    }

    /// Writes the page.
    pub(crate) fn write(&self, report: &Report) -> anyhow::Result<()> {
        let about = about();
        let page = report.html(Additions { about: Some(&about), ..Additions::default() });
        summary_file::replace(&self.path, page.as_bytes())
            .with_context(|| format!("cannot write the page {}", self.name.display()))
    }
}

/// Which machine, and what was asked.
fn about() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let command = std::iter::once("pagefold".to_owned()).chain(words).collect::<Vec<_>>().join(" ");
    match host.trim() {
        "" => command,
        host => format!("{host}: {command}"),
    }
}
