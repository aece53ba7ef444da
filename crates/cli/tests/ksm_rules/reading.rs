//! Files are read, explained and tried out, and nothing is changed.

use crate::stand::{Stand, document, lock, rules, said};

#[test]
fn mistakes_are_told_with_file_line_and_column() {
    let stand = Stand::new();
    let file = stand.write("[[rule]]\nmatch = { exxe = \"/x\" }\naction = \"enabel\"\n");
    let output = rules(&["check", &file]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    assert_eq!(
        said(&output),
        format!(
            "{file}:3:11: unknown key `exxe` in the `match` of a rule; did you mean `exe`?\n\
             {file}:4:10: `action` must be one of \"enable\", \"disable\", \"ignore\", not \"enabel\"; did you mean `enable`?\n"
        )
    );
    let document = document(&["check", &file, "--json"]);
    assert_eq!((document["valid"].as_bool(), document["problems"][1]["line"].as_u64()), (Some(false), Some(4)));
    for command in ["dry-run", "apply"] {
        let output = rules(&[command, &file]);
        assert_eq!(output.status.code(), Some(1), "{command}");
        assert!(said(&output).contains(":3:11: unknown key"), "{command}");
        let error = crate::stand::document(&[command, &file, "--json"]);
        assert!(error["error"].as_str().unwrap().contains(":3:11: unknown key"), "{command}: {error}");
    }
}

#[test]
fn a_file_that_is_not_there_and_words_that_are_wrong() {
    let output = rules(&["check", "/no/such/file"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(said(&output).contains("cannot read /no/such/file: No such file"), "{}", said(&output));
    let error = document(&["check", "/no/such/file", "--json"]);
    assert!(error["error"].as_str().unwrap().starts_with("cannot read /no/such/file: No such file"), "{error}");
    for words in [&["check"][..], &["apply", "x", "--watch", "soon"], &["apply", "x", "--undo"], &["sing"], &[]] {
        assert_eq!(rules(words).status.code(), Some(2), "{words:?}");
    }
}

/// Seen to hang, and to take all memory.
#[test]
fn what_has_no_end_is_not_read() {
    let stand = Stand::new();
    let (pipe, large) = (stand.folder().join("pipe"), stand.folder().join("large"));
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    std::fs::write(&large, "# 89012345\n".repeat(100_000)).unwrap();
    let files = [pipe.to_str().unwrap(), large.to_str().unwrap(), "/dev/zero", "/dev"];
    for (file, why) in
        files.into_iter().zip(["a regular file", "more than 1048576 bytes", "a regular file", "a regular file"])
    {
        for command in ["check", "dry-run", "apply"] {
            let output = rules(&[command, file]);
            assert_eq!(output.status.code(), Some(1), "{command} {file}");
            assert!(said(&output).contains(why), "{command} {file}: {}", said(&output));
        }
    }
    // As large as can be.
    std::fs::write(&large, format!("version = 1\n{}", "#".repeat((1 << 20) - 12))).unwrap();
    assert!(rules(&["check", large.to_str().unwrap()]).status.success());
}

#[test]
fn a_good_file_is_explained() {
    let stand = Stand::new();
    let file = stand
        .write("[[rule]]\nname = \"workers\"\nmatch = { exe = \"DIR/none\", user = \"root\" }\naction = \"enable\"\n");
    let output = rules(&["check", &file]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success());
    assert!(
        text.contains("workers: enables processes that execute") && text.contains("of user root (line 2)"),
        "{text}"
    );
    assert!(text.contains(":2: doubtful: there is no "), "{text}");
    let document = document(&["check", &file, "--json"]);
    assert_eq!(document["valid"], true);
    assert_eq!(document["rules"][0]["name"], "workers");
    assert_eq!(document["doubts"].as_array().unwrap().len(), 1);
}

#[test]
fn the_list_is_printed_as_a_file_of_rules() {
    let output = rules(&["never-merge"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let list = rules::Rules::parse(&text).unwrap();
    let document = document(&["never-merge", "--json"]);
    assert_eq!(document["never_merge"].as_array().unwrap().len(), list.rules.len());
    assert!(document["never_merge"][0]["exe"].as_array().unwrap().iter().any(|exe| exe == "**/ssh-agent"));
}

#[test]
fn a_dry_run_says_whom_and_why_and_changes_nothing() {
    let Some(_lock) = lock() else { return };
    let stand = Stand::new();
    let (worker, agent) = (stand.sleeper("worker"), stand.sleeper("ssh-agent"));
    let marked = stand.sleeper("marked");
    marked.set(true);
    let file = stand.write(
        "[[rule]]\nmatch = { exe = \"DIR/marked\" }\naction = \"disable\"\n\
         [[rule]]\nname = \"all\"\nmatch = { exe = \"DIR/*\" }\naction = \"enable\"\n",
    );
    let before = std::fs::read("/run/pagefold/ksm-rules.json").ok();
    let document = document(&["dry-run", &file, "--json"]);
    let of = |pid: kernel::Pid| {
        let all = document["processes"].as_array().unwrap();
        all.iter().find(|row| row["pid"] == pid.get()).unwrap().clone()
    };
    let (row, secret, off) = (of(worker.pid()), of(agent.pid()), of(marked.pid()));
    assert_eq!((&row["step"], &row["why"]["name"], &row["why"]["line"]), (&"enable".into(), &"all".into(), &5.into()));
    assert_eq!((&row["mergeable"], &row["comm"]), (&false.into(), &"worker".into()));
    assert_eq!((&secret["step"], &secret["why"]["by"]), (&"nothing".into(), &"never_merge".into()));
    assert_eq!((&off["step"], &off["why"]["line"]), (&"disable".into(), &2.into()));
    let table = rules(&["dry-run", &file]);
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(text.contains("worker") && text.contains("rule 2, all (line 5)"), "{text}");
    assert!(!text.contains("ssh-agent"), "there is nothing to do to it");
    let all = rules(&["dry-run", &file, "--all"]);
    assert!(String::from_utf8_lossy(&all.stdout).contains("never-merge list, key agents"));
    assert!(!worker.is_mergeable() && !agent.is_mergeable() && marked.is_mergeable());
    assert_eq!(std::fs::read("/run/pagefold/ksm-rules.json").ok(), before);
}
