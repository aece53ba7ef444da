//! Names of systemd units.

use std::fmt;
use std::str::FromStr;

/// The name of a unit that starts processes of its own, with its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnitName(String);

/// The types of units that have MemoryKSM=, each with its section.
const TYPES: [(&str, &str); 4] = [("service", "Service"), ("socket", "Socket"), ("mount", "Mount"), ("swap", "Swap")];
/// Those that have not.
const OTHERS: [&str; 7] = ["slice", "scope", "target", "timer", "path", "device", "automount"];
/// Longest name, in bytes (systemd.unit(5)).
const LONGEST: usize = 255;

impl FromStr for UnitName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let has_type = text.rsplit_once('.').map(|(_, kind)| kind);
        if let Some(other) = has_type.filter(|kind| OTHERS.contains(kind)) {
            return Err(format!("a {other} has no MemoryKSM=: name the service that starts the processes"));
        }
        let known = has_type.is_some_and(|kind| TYPES.iter().any(|(name, _)| *name == kind));
        let name = if known { text.to_owned() } else { format!("{text}.service") };
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte);
        if !name.bytes().all(fits) || name.starts_with(['.', '@']) || name.matches('@').count() > 1 {
            return Err("a unit's name has letters, digits and :-_.\\ in it, and one @ at most".to_owned());
        }
        if name.len() > LONGEST {
            return Err(format!("a unit's name has at most {LONGEST} bytes"));
        }
        Ok(Self(name))
    }
}

impl UnitName {
    /// With its type.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The section of its file that its processes' settings stand in.
    pub(crate) fn section(&self) -> &'static str {
        let kind = self.0.rsplit_once('.').map_or("", |(_, kind)| kind);
        TYPES.iter().find(|(name, _)| *name == kind).map_or("Service", |(_, section)| section)
    }

    /// A unit of which there can be many (`name@.service`): none of them is meant.
    pub(crate) fn is_template(&self) -> bool {
        self.0.contains("@.")
    }
}

impl fmt::Display for UnitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn names_get_their_type_and_are_checked() {
        let name = |text: &str| text.parse::<UnitName>();
        assert_eq!(name("redis").unwrap().as_str(), "redis.service");
        assert_eq!(name("redis-server@6379").unwrap().as_str(), "redis-server@6379.service");
        assert_eq!(name("org.example.app").unwrap().as_str(), "org.example.app.service");
        assert_eq!(name("x.socket").unwrap().section(), "Socket");
        assert!(name("getty@.service").unwrap().is_template() && !name("getty@tty1").unwrap().is_template());
        for (wrong, said) in [
            ("", "letters"),
            ("../../etc/passwd", "letters"),
            ("a b", "letters"),
            ("a\nb", "letters"),
            ("@x", "letters"),
            ("a@b@c", "one @"),
            ("user.slice", "a slice has no"),
            ("x.timer", "a timer"),
            (&"a".repeat(255), "255 bytes"),
        ] {
            let error = name(wrong).unwrap_err();
            assert!(error.contains(said), "{wrong:?}: {error}");
        }
    }
}
