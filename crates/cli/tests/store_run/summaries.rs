//! Where the summary goes, and what it has.

use super::*;

#[test]
fn an_unwritable_summary_starts_nothing() {
    let temp = Temp::new("unwritable");
    let fifo = temp.join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for name in ["/nonexistent/summary", "/dev/full", "/", "/dev/fd/0", &fifo] {
        let ran = temp.join("ran");
        let run = run_with(&["--summary", name], &["touch", &ran]).stdin(Stdio::null()).output().unwrap();
        assert_eq!(run.status.code(), Some(125), "{name}: {}", said(&run));
        assert!(said(&run).contains(&format!("cannot write the summary {name}")), "{}", said(&run));
        assert!(!Path::new(&ran).exists(), "{name}: the command was started");
    }
    // Nor does a command that cannot be started change what is there.
    let kept = temp.join("kept");
    fs::write(&kept, "kept").unwrap();
    assert_eq!(output(&["--quiet", "--summary", &kept], &["/nonexistent"]).status.code(), Some(127));
    assert_eq!(fs::read_to_string(&kept).unwrap(), "kept");
    assert_eq!(output(&["--quiet", "--summary", &temp.join("new")], &["/nonexistent"]).status.code(), Some(127));
    assert_eq!(fs::read_dir(&temp.0).unwrap().count(), 2, "nothing else is left");
}

#[test]
fn a_log_keeps_what_the_command_writes_and_devices_stay() {
    let temp = Temp::new("log");
    let log = temp.join("log");
    for backend in ["store", "ksm"] {
        // Without KSM's settings, which are the whole host's.
        let sys = if backend == "ksm" { "mount -t tmpfs none /sys || exit 1;" } else { "" };
        if backend == "ksm" && !is_root() {
            return;
        }
        for name in ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", &log] {
            let script = format!(
                "{sys} exec \"$0\" run --quiet --backend {backend} --summary \"$1\" -- sh -c 'echo one; sleep 0.1; echo two' > \"$2\""
            );
            let mut run = if sys.is_empty() { Command::new("sh") } else { Command::new("unshare") };
            if !sys.is_empty() {
                run.args(["--mount", "sh"]);
            }
            assert!(run.args(["-c", &script, PAGEFOLD, name, &log]).status().unwrap().success());
            let written = fs::read_to_string(&log).unwrap();
            assert!(written.contains("one\n") && written.contains("two\n"), "{backend} {name}: {written}");
            let documents =
                written.lines().filter(|line| *line != "one" && *line != "two").collect::<Vec<_>>().join("\n");
            let documents: Vec<Value> =
                serde_json::Deserializer::from_str(&documents).into_iter().collect::<Result<_, _>>().unwrap();
            assert_eq!(documents.len(), 2, "one at the start and one at the end: {written}");
            assert_eq!(documents[1]["backend"], backend);
        }
    }
    for device in ["/dev/stdout", "/dev/stderr", "/dev/fd"] {
        assert!(fs::symlink_metadata(device).is_ok_and(|found| found.is_symlink()), "{device} was replaced");
    }
}

#[test]
fn a_pipe_whose_reader_has_left_ends_nothing() {
    let temp = Temp::new("reader");
    let fifo = temp.join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let reader = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    let mut talk = Talk::start(&["--summary", &fifo], &["sh", "-c", "echo here; read line; exit 7"]);
    assert_eq!(talk.answer(), "here");
    drop(reader);
    let (status, _, said) = talk.end();
    assert_eq!(status.code(), Some(7));
    assert!(said.contains("cannot write the summary"), "{said}");
}

/// The fields that the document promises: the first column of the table below the heading.
fn promised() -> Vec<String> {
    let document = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/run.md")).unwrap();
    let section =
        document.split("## The summary, store backend").nth(1).unwrap().split("\n#").next().unwrap().to_owned();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.flat_map(|row| row.split('|').nth(1).unwrap().split(',').map(|name| name.trim().trim_matches('`').to_owned()))
        .collect()
}

#[test]
fn the_summary_has_what_the_document_promises() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("promise");
    let summary = temp.join("summary.json");
    let mut talk = Talk::member(&["--partition", "web", "--summary", &summary]);
    talk.ask("merged()");
    talk.ask("right()");
    talk.ask("time.sleep(0.5)");
    let (status, _, said) = talk.end();
    assert!(status.success(), "{said}");
    let found: Value = serde_json::from_slice(&fs::read(&summary).unwrap()).unwrap();
    let fields = promised();
    assert!(fields.len() > 20, "{fields:?}");
    for field in &fields {
        assert!(found.get(field).is_some(), "{field} is promised and not there: {found:#}");
    }
    for field in found.as_object().unwrap().keys() {
        assert!(fields.contains(field), "{field} is there and not promised");
    }
    assert_eq!((found["partition"].as_str(), found["backend"].as_str()), (Some("web"), Some("store")));
    assert_eq!(found["processes_ever"], 1);
    for field in ["merges", "batches", "pages_managed", "pages_sharing", "bytes_saved_peak", "store_pages"] {
        assert!(found[field].as_u64().unwrap() > 0, "{field}: {found:#}");
    }
    for field in ["cpu_seconds", "elapsed_seconds", "helpers_busy_seconds"] {
        assert!(found[field].as_f64().unwrap() > 0.0, "{field}: {found:#}");
    }
    for quantile in ["p50", "p99", "p999", "max"] {
        assert!(found["frozen_seconds"][quantile].is_f64(), "{quantile}: {found:#}");
    }
    assert_eq!(found["helper_refused"], serde_json::json!([]));
    assert_eq!(fs::read_dir(&temp.0).unwrap().count(), 1, "nothing but the summary is left");
}
