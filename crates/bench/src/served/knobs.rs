//! KSM's settings in force while ksmd merged.

use anyhow::Result;
use ksm::KsmSysfs;
use serde::Serialize;
use serde_json::{Map, Value};

/// By the kernel's names; what this kernel lacks is missing. A way asks for some of them, and the others are the
/// administrator's: savings and CPU time of ksmd mean little without them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Knobs {
    /// When the workers began to serve.
    start: Map<String, Value>,
    /// When they had served: the kernel's advisor has changed some, and so may anybody else.
    end: Map<String, Value>,
}

impl Knobs {
    /// The settings now, for the start and for the end.
    ///
    /// # Errors
    /// Those of KSM's files.
    pub(super) fn look(sysfs: &KsmSysfs) -> Result<Self> {
        let start = now(sysfs)?;
        Ok(Self { end: start.clone(), start })
    }

    /// Looks again, at the end.
    ///
    /// # Errors
    /// Those of KSM's files.
    pub(super) fn look_again(&mut self, sysfs: &KsmSysfs) -> Result<()> {
        self.end = now(sysfs)?;
        Ok(())
    }
}

fn now(sysfs: &KsmSysfs) -> Result<Map<String, Value>> {
    let value = |text: String| text.parse::<u64>().map_or_else(|_| Value::from(text), Value::from);
    Ok(sysfs.knobs()?.into_iter().map(|(name, text)| (name.to_owned(), value(text))).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use serde_json::json;

    #[test]
    fn settings_are_those_of_the_start_and_of_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("pages_to_scan", "100\n");
        write("advisor_mode", "none [scan-time]\n");
        write("pages_sharing", "7\n");
        let sysfs = KsmSysfs::at(folder.path());
        let mut knobs = Knobs::look(&sysfs).unwrap();
        write("pages_to_scan", "500\n");
        knobs.look_again(&sysfs).unwrap();
        let expected = json!({
            "start": { "pages_to_scan": 100, "advisor_mode": "scan-time" },
            "end": { "pages_to_scan": 500, "advisor_mode": "scan-time" },
        });
        assert_eq!(serde_json::to_value(&knobs).unwrap(), expected);
    }
}
