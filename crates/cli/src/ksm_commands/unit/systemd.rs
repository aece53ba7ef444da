//! What systemd says of itself and of a unit.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use super::name::UnitName;

/// The first version with MemoryKSM=.
pub(crate) const FIRST: u32 = 254;

/// The version that is installed; `None` without any.
pub(crate) fn version() -> Option<u32> {
    let output = Command::new("systemctl").arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

fn parse_version(text: &str) -> Option<u32> {
    // `systemd 257 (257.8-1)`; versions of development have more behind the number, as in `258~rc1`.
    let word = text.strip_prefix("systemd ")?.split_whitespace().next()?;
    let digits: String = word.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// Properties of a unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Properties(BTreeMap<String, String>);

impl Properties {
    /// Asks the manager; the error is what it said.
    pub(crate) fn of(unit: &UnitName, user: bool) -> Result<Self, String> {
        let mut command = Command::new("systemctl");
        if user {
            command.arg("--user");
        }
        command.args(["show", "--property", ASKED, "--", unit.as_str()]).stdin(Stdio::null());
        let output = command.output().map_err(|error| format!("cannot run systemctl: {error}"))?;
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        Ok(Self::parse(&String::from_utf8_lossy(&output.stdout)))
    }

    fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        Self(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    /// One of them; a manager leaves out those that it does not know.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

/// What is asked for.
const ASKED: &str = "LoadState,ActiveState,ControlGroup,MainPID,MemoryKSM,NeedDaemonReload";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_properties() {
        assert_eq!(parse_version("systemd 257 (257.8-1)\n+PAM\n"), Some(257));
        assert_eq!(parse_version("systemd 258~rc1-2 (258)\n"), Some(258));
        assert_eq!(parse_version("elogind 252\n"), None);
        let properties = Properties::parse("ActiveState=active\nControlGroup=/system.slice/a=b.service\n");
        assert_eq!(properties.get("ControlGroup"), Some("/system.slice/a=b.service"));
        assert_eq!(properties.get("MemoryKSM"), None);
    }
}
