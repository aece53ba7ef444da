//! Where the loader looks for a library that a file needs, by the rules of ld.so(8).
//!
//! Of what depends on the environment of a process nothing is known here: `LD_LIBRARY_PATH` and `LD_PRELOAD` are taken to
//! be empty. Which variant for single processors the loader takes is not decided either: all that are there are meant.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::ld_cache::LdCache;
use crate::object::Needs;

/// Below each folder, the loader looks into these first, if the processor is one.
const VARIANTS: [&str; 11] = [
    "glibc-hwcaps/x86-64-v4",
    "glibc-hwcaps/x86-64-v3",
    "glibc-hwcaps/x86-64-v2",
    "tls/haswell/x86_64",
    "tls/haswell",
    "tls/x86_64",
    "tls",
    "haswell/x86_64",
    "haswell",
    "x86_64",
    "",
];
/// Built into the loader: of Debian, and of the others.
const DEFAULT: [&str; 6] =
    ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];

/// A file that brought others in.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Its path, for `$ORIGIN`.
    pub(crate) path: PathBuf,
    pub(crate) needs: Needs,
    /// Who brought it in: the index in the list of all.
    pub(crate) loader: Option<usize>,
}

/// What the loader would find.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// These files: more than one if there are variants.
    Files(Vec<PathBuf>),
    /// Nothing.
    Nowhere,
    /// It depends on the folder that a process is started in.
    CurrentFolder,
}

/// The loader's knowledge of this machine.
#[derive(Debug)]
pub(crate) struct Library {
    cache: LdCache,
    /// What `$LIB` stands for.
    lib: &'static str,
}

impl Library {
    pub(crate) fn of_host() -> Self {
        let multiarch = Path::new("/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2").exists();
        Self {
            cache: LdCache::read(Path::new("/etc/ld.so.cache")),
            lib: if multiarch { "lib/x86_64-linux-gnu" } else { "lib64" },
        }
    }

    /// Finds a name that the file `by` needs. `fits` tells whether a file that is there is one for this machine.
    pub(crate) fn find(&self, name: &str, all: &[Loaded], by: usize, fits: &dyn Fn(&Path) -> bool) -> Place {
        let Some(file) = all.get(by) else { return Place::Nowhere };
        if name.contains('/') {
            let path = PathBuf::from(self.expand(name, &file.path));
            return match path {
                path if !path.is_absolute() => Place::CurrentFolder,
                path if fits(&path) => Place::Files(vec![path]),
                _ => Place::Nowhere,
            };
        }
        let mut folders: Vec<(String, &Path)> = Vec::new();
        if file.needs.runpath.is_none() {
            let mut next = Some(by);
            // The program's own counts even where the chain does not lead to it.
            let mut chain = Vec::new();
            while let Some(loaded) = next.and_then(|index| all.get(index)).filter(|_| chain.len() <= all.len()) {
                chain.push(loaded);
                next = loaded.loader;
            }
            for loaded in chain.into_iter().chain(all.first()).filter(|loaded| loaded.needs.runpath.is_none()) {
                folders.extend(split(loaded.needs.rpath.as_deref()).map(|folder| (folder, loaded.path.as_path())));
            }
        }
        folders.extend(split(file.needs.runpath.as_deref()).map(|folder| (folder, file.path.as_path())));
        let mut found = Vec::new();
        for (folder, of) in folders {
            let folder = PathBuf::from(self.expand(&folder, of));
            if !folder.is_absolute() {
                return Place::CurrentFolder;
            }
            if in_folder(&folder, name, fits, &mut found) {
                return Place::Files(found);
            }
        }
        let is_default = |path: &Path| DEFAULT.iter().any(|folder| path.starts_with(folder));
        let cached = self.cache.find(name).iter().filter(|path| !file.needs.no_default || !is_default(path));
        let before = found.len();
        found.extend(cached.filter(|path| fits(path)).cloned());
        if found.len() > before {
            return Place::Files(found);
        }
        for folder in DEFAULT.iter().filter(|_| !file.needs.no_default) {
            if in_folder(Path::new(folder), name, fits, &mut found) {
                return Place::Files(found);
            }
        }
        if found.is_empty() { Place::Nowhere } else { Place::Files(found) }
    }

    /// Puts in what `$ORIGIN`, `$LIB` and `$PLATFORM` stand for.
    fn expand(&self, text: &str, of: &Path) -> OsString {
        let origin = of.parent().unwrap_or(Path::new("/")).as_os_str();
        let mut expanded = OsString::new();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            let (before, token) = rest.split_at(at);
            expanded.push(before);
            let known = [("ORIGIN", origin), ("LIB", self.lib.as_ref()), ("PLATFORM", "x86_64".as_ref())];
            let hit = known.iter().find_map(|(name, value)| {
                let plain = token.strip_prefix('$').and_then(|token| token.strip_prefix(name));
                let braced = || token.strip_prefix("${").and_then(|token| token.strip_prefix(name)?.strip_prefix('}'));
                let goes_on = |rest: &&str| !rest.starts_with(|next: char| next.is_ascii_alphanumeric() || next == '_');
                plain.filter(goes_on).or_else(braced).map(|rest| (*value, rest))
            });
            match hit {
                Some((value, after)) => {
                    expanded.push(value);
                    rest = after;
                }
                None => {
                    expanded.push("$");
                    rest = &token[1..];
                }
            }
        }
        expanded.push(rest);
        expanded
    }
}

fn split(list: Option<&str>) -> impl Iterator<Item = String> {
    list.map(str::to_owned).into_iter().flat_map(|list| list.split(':').map(str::to_owned).collect::<Vec<_>>())
}

/// Adds what a folder has of a name; true if the loader surely goes no further.
fn in_folder(folder: &Path, name: &str, fits: &dyn Fn(&Path) -> bool, found: &mut Vec<PathBuf>) -> bool {
    if !folder.is_dir() {
        return false;
    }
    let mut plain = false;
    for variant in VARIANTS {
        let path = folder.join(variant).join(name);
        if !found.contains(&path) && fits(&path) {
            plain |= variant.is_empty();
            found.push(path);
        }
    }
    plain
}

/// What `/etc/ld.so.preload` brings into every program.
pub(crate) fn preloaded_everywhere() -> Vec<String> {
    let text = std::fs::read("/etc/ld.so.preload").unwrap_or_default();
    let words = text.split(|byte| byte.is_ascii_whitespace() || *byte == b':').filter(|word| !word.is_empty());
    words.map(|word| std::ffi::OsStr::from_bytes(word).to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
#[path = "library/tests.rs"]
mod tests;
