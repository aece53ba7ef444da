//! Names of users, from /etc/passwd.
//!
//! Without the C library's name services: what would ask a directory server over the net has no place in a loop over all
//! processes. A user who is known there only goes by the number.

use std::collections::HashMap;
use std::path::Path;

/// User ids and their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    names: HashMap<u32, String>,
}

impl Users {
    /// Those of this host; none if the file cannot be read.
    #[must_use]
    pub fn host() -> Self {
        Self::read(Path::new("/etc/passwd"))
    }

    fn read(path: &Path) -> Self {
        std::fs::read(path).map(|bytes| Self::parse(&String::from_utf8_lossy(&bytes))).unwrap_or_default()
    }

    fn parse(text: &str) -> Self {
        let mut names = HashMap::new();
        for line in text.lines() {
            let mut fields = line.split(':');
            let (name, uid) = (fields.next(), fields.nth(1).and_then(|uid| uid.parse().ok()));
            if let (Some(name), Some(uid)) = (name, uid) {
                // As getpwuid(3): the first line with the number counts.
                names.entry(uid).or_insert_with(|| name.to_owned());
            }
        }
        Self { names }
    }

    /// The name of a user.
    #[must_use]
    pub fn name(&self, uid: u32) -> Option<&str> {
        self.names.get(&uid).map(String::as_str)
    }

    /// True if there is a user of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.names.values().any(|known| known == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_file() {
        let users = Users::parse("root:x:0:0:root:/root:/bin/sh\ntoor:x:0:0::/:/bin/sh\n#x\nbad:x:y:\na:x:7:7\n");
        assert_eq!((users.name(0), users.name(7), users.name(1)), (Some("root"), Some("a"), None));
        assert!(users.has("a") && !users.has("bad") && !users.has("b"));
        assert_eq!(Users::read(Path::new("/nowhere")), Users::default());
        assert_eq!(Users::host().name(0), Some("root"));
    }
}
