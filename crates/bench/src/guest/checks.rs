//! What a checking guest prints, as numbers.

/// All that a guest has said so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checks {
    /// Seconds of guest time at which its files were complete.
    pub ready_at: Option<f64>,
    /// MiB of files that it checks.
    pub mib: u64,
    /// Rounds in which every file had its sum.
    pub rounds_ok: u64,
    /// Lines that tell of a wrong sum or a failed copy, in full.
    pub bad: Vec<String>,
    /// Files and disk blocks read and compared.
    pub files: u64,
    /// Guest time of the last round that was right, in seconds.
    pub last_ok_at: Option<f64>,
    /// Answers to `verdict` and `quit`, in order.
    pub verdicts: Vec<Verdict>,
}

/// A guest's final answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Nothing was ever wrong.
    pub ok: bool,
    /// Rounds so far.
    pub rounds: u64,
    /// Files and disk blocks read and compared.
    pub files: u64,
    /// How many of them were wrong.
    pub bad: u64,
}

impl Checks {
    /// Reads the lines of a guest; an unfinished last line is left out, and other lines mean nothing.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut checks = Self::default();
        let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
        for line in complete.lines() {
            let mut words = line.split_whitespace();
            let number = |key| field(line, key).and_then(|value| value.parse().ok());
            let time = |key| field(line, key).and_then(|value| value.parse().ok());
            match (words.next(), words.next()) {
                (Some("CHECK"), Some("ready")) => {
                    checks.ready_at = time("uptime");
                    checks.mib = number("mib").unwrap_or(0);
                }
                (Some("CHECK"), Some("ok")) => {
                    checks.rounds_ok += 1;
                    checks.files = number("files").unwrap_or(checks.files);
                    checks.last_ok_at = time("uptime");
                }
                (Some("CHECK"), Some("BAD")) => checks.bad.push(line.to_owned()),
                (Some("VERDICT"), Some(word)) => checks.verdicts.push(Verdict {
                    ok: word == "ok",
                    rounds: number("rounds").unwrap_or(0),
                    files: number("files").unwrap_or(0),
                    bad: number("bad").unwrap_or(u64::MAX),
                }),
                _ => {}
            }
        }
        checks
    }
}

fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_numbers() {
        let checks = Checks::parse(
            "noise\nCHECK ready files=21 mib=92 uptime=9.50\nCHECK ok 1 files=22 uptime=15.25\n\
             CHECK BAD round=2 file=own.1 expected=a got=b again=b\nCHECK ok 3 files=70 uptime=30.00\n\
             VERDICT BAD rounds=3 files=70 bad=1\nVERDICT ok rou",
        );
        assert_eq!(
            checks,
            Checks {
                ready_at: Some(9.5),
                mib: 92,
                rounds_ok: 2,
                bad: vec!["CHECK BAD round=2 file=own.1 expected=a got=b again=b".to_owned()],
                files: 70,
                last_ok_at: Some(30.0),
                verdicts: vec![Verdict { ok: false, rounds: 3, files: 70, bad: 1 }],
            }
        );
    }

    #[test]
    fn a_verdict_without_a_count_is_no_good_one() {
        let checks = Checks::parse("VERDICT ok\n");
        assert_eq!(checks.verdicts.first().map(|verdict| verdict.bad), Some(u64::MAX));
    }
}
