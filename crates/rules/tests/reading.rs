//! Files of rules: what is read, what is refused, and that a printed file reads back.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use kernel::{Bytes, MappingWord};
use pagefold_rules::{
    Action, Backend, Bounds, Conditions, Defaults, Glob, GlobKind, NEVER_MERGE, ProfitRules, Rule, Rules, User,
};
use proptest::prelude::*;

/// The mistakes of a file with `version = 1` in its first line.
fn mistakes(text: &str) -> Vec<String> {
    let error = Rules::parse(&format!("version = 1\n{text}")).unwrap_err();
    error.problems.iter().map(ToString::to_string).collect()
}

/// The one mistake of a rule.
fn mistake(rule: &str) -> String {
    let found = mistakes(&format!("[[rule]]\n{rule}\n"));
    assert_eq!(found.len(), 1, "{found:?}");
    found[0].clone()
}

const EVERYTHING: &str = r#"version = 1
[defaults]
action = "ignore"
exclude = ["stack"]
backend = "store"
[profit]
passes = 20
loss = "1MiB"
retry = "5m"
retry_most = "2h"

[[rule]]
name = "all"
reason = "why"
match = { exe = ["/usr/bin/a*", "**/b"], script = "x.py", comm = "c", args = ["-x", "*.conf"], user = [1000, "www"],
    cgroup = "/a/**", container = ["docker:*", "podman"], pod = "1*", unit = "x.service", min_age = "30s",
    max_age = "1d", min_rss = "1MiB", max_rss = "1TiB", min_anon = "64KiB", max_anon = "1GiB", setuid = false,
    pid_namespace = "other" }
action = "enable"
vma = ["heap", "anon"]
exclude = "[anon:jit*]"
backend = "ksm"

[[rule]]
match.container = true
action = "enable"
exclude = []
partition = "guests"

[[rule]]
match = { exe = "/usr/bin/ssh-agent" }
action = "ignore"
override_never_merge = true
"#;

fn glob(text: &str, kind: GlobKind) -> Glob {
    Glob::new(text, kind).unwrap()
}

#[test]
fn every_key_is_read() {
    let rules = Rules::parse(EVERYTHING).unwrap();
    let stack: Vec<MappingWord> = vec!["stack".parse().unwrap()];
    assert_eq!(rules.defaults, Defaults { action: Action::Ignore, exclude: stack, backend: Backend::Store });
    assert_eq!(
        rules.profit,
        ProfitRules {
            passes: 20,
            loss: Bytes::from_mib(1),
            retry: Duration::from_secs(300),
            retry_most: Duration::from_secs(7200)
        }
    );
    let first = Rule {
        line: 12,
        name: Some("all".to_owned()),
        reason: Some("why".to_owned()),
        conditions: Conditions {
            exe: vec![glob("/usr/bin/a*", GlobKind::Path), glob("**/b", GlobKind::Path)],
            script: vec![glob("x.py", GlobKind::Path)],
            comm: vec![glob("c", GlobKind::Word)],
            args: vec![glob("-x", GlobKind::Word), glob("*.conf", GlobKind::Word)],
            user: vec![User::Id(1000), User::Name("www".to_owned())],
            cgroup: vec![glob("/a/**", GlobKind::Path)],
            in_container: None,
            container: vec![glob("docker:*", GlobKind::Word), glob("podman", GlobKind::Word)],
            pod: vec![glob("1*", GlobKind::Word)],
            unit: vec![glob("x.service", GlobKind::Word)],
            age: Bounds { min: Some(Duration::from_secs(30)), max: Some(Duration::from_secs(86_400)) },
            rss: Bounds { min: Some(Bytes::from_mib(1)), max: Some(Bytes::from_mib(1 << 20)) },
            anon: Bounds { min: Some(Bytes::from_kib(64)), max: Some(Bytes::from_mib(1024)) },
            setuid: Some(false),
            other_pid_namespace: Some(true),
        },
        action: Action::Enable,
        vma: vec![MappingWord::Heap, MappingWord::Anon],
        exclude: Some(vec![MappingWord::Name("[anon:jit*]".to_owned())]),
        backend: Some(Backend::Ksm),
        partition: None,
        override_never_merge: false,
    };
    assert_eq!(rules.rules[0], first);
    let second = &rules.rules[1];
    assert_eq!(
        (second.line, second.conditions.in_container, second.exclude.as_deref()),
        (24, Some(true), Some(&[][..]))
    );
    assert_eq!((second.partition.as_deref(), rules.rules[2].override_never_merge), (Some("guests"), true));
}

#[test]
fn a_mistake_is_named_with_its_place_and_remedy() {
    let ok = "match = { exe = \"/x\" }\naction = \"enable\"\n";
    for (rule, said) in [
        (
            "match = { exxe = \"/x\" }\naction = \"enable\"",
            "3:11: unknown key `exxe` in the `match` of a rule; did you mean `exe`?",
        ),
        (
            "match = { exe = \"/x\", age = \"1s\" }\naction = \"enable\"",
            "3:23: unknown key `age` in the `match` of a rule; did you mean `min_age` or `max_age`?",
        ),
        (
            "match = { exe = \"/x\" }\naction = \"enabel\"",
            "4:10: `action` must be one of \"enable\", \"disable\", \"ignore\", not \"enabel\"; did you mean `enable`?",
        ),
        ("match = { exe = \"/x\" }\naction = true", "4:10: `action` must be a text in quotes, not true or false"),
        (
            "match = { exe = 5 }\naction = \"enable\"",
            "3:17: `exe` must be a text in quotes or a list of such, not a number",
        ),
        (
            "match = { exe = [\"/x\", 5] }\naction = \"enable\"",
            "3:24: `exe` must be a list of texts in quotes, not a number",
        ),
        ("match = { exe = [] }\naction = \"enable\"", "3:17: `exe` must not be an empty list; leave it out"),
        (
            "match = { exe = \"qemu\" }\naction = \"enable\"",
            "3:17: `exe` is a whole path: \"/usr/bin/qemu\", or \"**/qemu\" in any folder",
        ),
        (
            "match = { exe = \"/x[\" }\naction = \"enable\"",
            "3:17: `exe`: a `[` is not closed by `]`; the character itself is written `[[]`",
        ),
        (
            "match = { user = -1 }\naction = \"enable\"",
            "3:18: `user` must be the name of a user in quotes or a user id, or a list of such, not a number",
        ),
        (
            "match = { min_age = \"5\" }\naction = \"enable\"",
            "3:21: `min_age`: \"5\" has no unit; a time is written as \"30s\", in ms, s, m (minutes), h or d",
        ),
        (
            "match = { min_rss = \"5MB\" }\naction = \"enable\"",
            "3:21: `min_rss`: \"MB\" is no unit here; a size is written as \"64MiB\", in B, KiB, MiB, GiB or TiB",
        ),
        (
            "match = { min_rss = \"2B\", max_rss = \"1B\" }\naction = \"enable\"",
            "3:37: `max_rss` is less than `min_rss`: nobody fits",
        ),
        (
            "match = {}\naction = \"enable\"",
            "3:9: an empty `match` would fit every process; for everybody else there is [defaults]",
        ),
        (
            "action = \"enable\"",
            "2:1: a rule needs a `match` that says whom it fits; for everybody else there is [defaults]",
        ),
        ("match = { exe = \"/x\" }", "2:1: a rule needs an `action`: \"enable\", \"disable\" or \"ignore\""),
        (
            &format!("{ok}partition = \"a\""),
            "5:13: a `partition` needs `backend = \"store\"`: the kernel's KSM knows one tree for the whole host",
        ),
        (
            &format!("{ok}exclude = \"1000-2000\""),
            "5:11: `exclude`: \"1000-2000\": addresses differ from process to process; name the mapping",
        ),
        (&format!("{ok}vma = []"), "5:7: `vma` must not be an empty list; leave it out for the whole process"),
        (
            "match = { exe = \"/x\" }\naction = \"ignore\"\nexclude = \"heap\"",
            "5:11: `exclude` means something with `action = \"enable\"` only",
        ),
        (
            "match = { exe = \"/x*\" }\naction = \"enable\"\noverride_never_merge = true",
            "5:24: `override_never_merge` needs the exact path of the program: `exe` in `match`, without patterns",
        ),
        (
            "match = { comm = \"x\" }\naction = \"enable\"\noverride_never_merge = true",
            "5:24: `override_never_merge` needs the exact path of the program: `exe` in `match`, without patterns",
        ),
        (
            "match = { exe = \"/x\" }\naction = \"disable\"\noverride_never_merge = true",
            "5:24: `override_never_merge` has no use with `action = \"disable\"`",
        ),
        (
            "match = { pid_namespace = \"mine\" }\naction = \"enable\"",
            "3:27: `pid_namespace` must be one of \"host\", \"other\", not \"mine\"",
        ),
        ("match = \"x\"\naction = \"enable\"", "3:9: `match` must be a table: [match], not a text"),
    ] {
        assert_eq!(mistake(rule), said);
    }
    for (text, said) in [
        (
            "[default]\naction = \"enable\"",
            "2:2: unknown key `default` at the top of the file; did you mean `defaults`?",
        ),
        ("[defaults]\nmin_age = \"1s\"", "3:1: unknown key `min_age` in [defaults]"),
        ("[profit]\npasses = \"x\"", "3:10: `passes` must be a whole number, not negative, not a text"),
        ("[profit]\nretry = \"2h\"\nretry_most = \"1h\"", "4:14: `retry_most` must not be less than `retry`"),
        ("[rule]\naction = \"enable\"", "2:1: `rule` must be written as [[rule]], with two brackets, not a table"),
        ("rule = [1]", "2:9: `rule` must be written as [[rule]], with two brackets, not a number"),
    ] {
        assert_eq!(mistakes(text), [said]);
    }
}

#[test]
fn all_mistakes_are_told_at_once_and_in_order() {
    let found = mistakes("[[rule]]\nmatch = { exe = \"/x\", a = 1, b = 2 }\nactoin = \"enable\"\n[nonsense]\n");
    let lines: Vec<&str> = found.iter().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(lines, ["2", "3", "3", "4", "5"], "{found:?}");
}

#[test]
fn the_version_is_asked_for() {
    let only = |text: &str| Rules::parse(text).unwrap_err().problems[0].to_string();
    assert_eq!(only(""), "1:1: `version = 1` is missing at the top of the file");
    assert_eq!(only("version = 2"), "1:11: this pagefold reads version 1 of the format only");
    assert_eq!(only("version = \"1\""), "1:11: `version` must be a whole number, not negative, not a text");
    assert_eq!(Rules::parse("version = 1").unwrap(), Rules::default());
}

#[test]
fn what_is_no_toml_is_told_with_its_line() {
    let found = mistakes("[[rule]]\nmatch = { exe = \"/x\n");
    assert_eq!(found, ["3:20: unclosed inline table, expected `}`", "3:20: invalid basic string, expected `\"`"]);
    assert!(mistakes("a = 1\na = 2").iter().any(|line| line.starts_with("3:1: ")));
}

#[test]
fn a_printed_file_reads_back() {
    for text in [EVERYTHING, NEVER_MERGE] {
        let rules = Rules::parse(text).unwrap();
        assert_eq!(without_lines(Rules::parse(&rules.to_string()).unwrap()), without_lines(rules));
    }
}

fn without_lines(mut rules: Rules) -> Rules {
    rules.rules.iter_mut().for_each(|rule| rule.line = 0);
    rules
}

fn globs(kind: GlobKind) -> impl Strategy<Value = Vec<Glob>> {
    let one = "[/*][a-z0-9*?/.\"\\\\\u{1}é-]{0,12}".prop_map(move |text| Glob::new(&text, kind).unwrap());
    prop::collection::vec(one, 0..3)
}

fn bounds<T: Ord + Copy + std::fmt::Debug>(
    value: impl Strategy<Value = T> + Clone,
) -> impl Strategy<Value = Bounds<T>> {
    (prop::option::of(value.clone()), prop::option::of(value)).prop_map(|(one, other)| match (one, other) {
        (Some(one), Some(other)) => Bounds { min: Some(one.min(other)), max: Some(one.max(other)) },
        (min, max) => Bounds { min, max },
    })
}

fn user() -> impl Strategy<Value = User> {
    prop_oneof!["[a-z_][a-z0-9_$\"-]{0,8}".prop_map(User::Name), any::<u32>().prop_map(User::Id)]
}

fn conditions() -> impl Strategy<Value = Conditions> {
    let paths = (globs(GlobKind::Path), globs(GlobKind::Path), globs(GlobKind::Path));
    let words = (globs(GlobKind::Word), globs(GlobKind::Word), globs(GlobKind::Word), globs(GlobKind::Word));
    let container = (prop::option::of(any::<bool>()), globs(GlobKind::Word));
    let bytes = || bounds((0..1_u64 << 50).prop_map(Bytes));
    let sizes = (bounds((0..1_u64 << 50).prop_map(Duration::from_millis)), bytes(), bytes());
    let flags = (prop::option::of(any::<bool>()), any::<bool>());
    (paths, words, container, sizes, flags, prop::collection::vec(user(), 0..3)).prop_map(
        |((exe, script, cgroup), (comm, args, pod, unit), (in_container, container), (age, rss, anon), flags, user)| {
            let container = if in_container.is_some() { Vec::new() } else { container };
            let (setuid, other) = (flags.0, Some(flags.1));
            Conditions {
                exe,
                script,
                comm,
                args,
                user,
                cgroup,
                in_container,
                container,
                pod,
                unit,
                age,
                rss,
                anon,
                setuid,
                other_pid_namespace: other,
            }
        },
    )
}

fn word() -> impl Strategy<Value = MappingWord> {
    "heap|stack|anon|/[a-z*]{1,8}|\\[anon:[a-z*\"]{1,5}\\]".prop_map(|text| text.parse().unwrap())
}

fn rule() -> impl Strategy<Value = Rule> {
    let texts = (prop::option::of(".{0,20}"), prop::option::of("(?s).{0,20}"));
    let how = (prop::collection::vec(word(), 0..3), prop::option::of(prop::collection::vec(word(), 0..3)));
    let store = prop::option::of("[a-z\"]{1,8}");
    (texts, conditions(), 0..3_usize, how, store).prop_map(|((name, reason), conditions, action, how, label)| {
        let action = [Action::Enable, Action::Disable, Action::Ignore][action];
        let rule = Rule { name, reason, conditions, action, ..Rule::default() };
        if action != Action::Enable {
            return rule;
        }
        let backend = label.as_ref().map(|_| Backend::Store);
        Rule { vma: how.0, exclude: how.1, backend, partition: label, ..rule }
    })
}

fn rules() -> impl Strategy<Value = Rules> {
    let profit =
        (0..1_u64 << 40, 0..1_u64 << 40, 0..1_u64 << 40, 0..1_u64 << 40).prop_map(|(passes, loss, one, other)| {
            let (retry, retry_most) = (Duration::from_millis(one.min(other)), Duration::from_millis(one.max(other)));
            ProfitRules { passes, loss: Bytes(loss), retry, retry_most }
        });
    let defaults = (0..3_usize, prop::collection::vec(word(), 0..2)).prop_map(|(action, exclude)| Defaults {
        action: [Action::Enable, Action::Disable, Action::Ignore][action],
        exclude,
        backend: Backend::Ksm,
    });
    (defaults, profit, prop::collection::vec(rule(), 0..4)).prop_map(|(defaults, profit, rules)| Rules {
        defaults,
        profit,
        rules,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    /// Whatever a rule says, it says the same when it is printed.
    #[test]
    fn printed_rules_read_back(rules in rules()) {
        let text = rules.to_string();
        let read = Rules::parse(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        prop_assert_eq!(without_lines(read), rules);
    }

    /// Nothing that is read ends the reader.
    #[test]
    fn any_text_is_rules_or_an_error(text in "(?s).{0,200}") {
        let _ = Rules::parse(&text);
    }

    /// The same with texts that are nearly rules: a piece of a good file is exchanged for something else.
    #[test]
    fn nearly_rules(from in 0..EVERYTHING.len(), length in 0..40_usize, with in "[\\[\\]{}=\".,#'\na-z0-9é ]{0,12}") {
        let mut bytes = EVERYTHING.as_bytes().to_vec();
        let to = (from + length).min(bytes.len());
        bytes.splice(from..to, with.bytes());
        let text = String::from_utf8_lossy(&bytes);
        if let Err(error) = Rules::parse(&text) {
            let lines = text.lines().count().max(1) + 1;
            prop_assert!(!error.problems.is_empty());
            prop_assert!(error.problems.iter().all(|problem| (1..=lines).contains(&problem.line) && problem.column > 0));
        }
    }
}

/// Seen to take minutes: for each rule all of the text before it was read, and all rules before it.
#[test]
fn twice_as_many_rules_take_twice_as_long() {
    let rule =
        |number: usize| format!("[[rule]]\nmatch = {{ comm = \"c{number}\", user = {number} }}\naction = \"enable\"\n");
    let text: String = std::iter::once("version = 1\n".to_owned()).chain((0..20_000).map(rule)).collect();
    let begun = std::time::Instant::now();
    let rules = Rules::parse(&text).unwrap();
    assert_eq!(rules.rules[19_999].line, 3 * 20_000 - 1);
    assert_eq!(rules.doubts(&pagefold_rules::Users::host()), []);
    assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
}
