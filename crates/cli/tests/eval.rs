//! `pagefold eval` as a command: its document, its words, its errors.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

fn eval(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pagefold")).arg("eval").args(words).output().unwrap()
}

fn document(words: &[&str]) -> Value {
    let output = eval(words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Python workers of one program, as they come.
struct Workers(Vec<Child>);

impl Workers {
    fn start(count: usize, program: &str) -> Option<Self> {
        let mut workers = Self(Vec::new());
        for _ in 0..count {
            let mut command = Command::new("python3");
            command.args(["-c", program]).stdin(Stdio::piped()).stdout(Stdio::piped());
            let Ok(mut child) = command.spawn() else {
                println!("skipped: python3");
                return None;
            };
            let mut line = String::new();
            BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
            assert_eq!(line, "ready\n");
            workers.0.push(child);
        }
        Some(workers)
    }

    fn words(&self) -> Vec<String> {
        self.0.iter().flat_map(|child| ["--pid".to_owned(), child.id().to_string()]).collect()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

const WORKER: &str = "import sys, json, decimal\n\
    table = {'key %d' % i: [i, str(i) * 5] for i in range(60000)}\n\
    zeros = bytearray(4 << 20)\n\
    print('ready', flush=True)\n\
    sys.stdin.read()\n";

fn with<'a>(words: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    words.iter().map(String::as_str).chain(more.iter().copied()).collect()
}

#[test]
fn the_document_holds_what_it_promises() {
    let Some(workers) = Workers::start(3, WORKER) else { return };
    let words = workers.words();
    let answer = document(&with(&words, &["--json", "--watch", "0.2"]));
    let number = |name: &str| answer[name].as_u64().unwrap_or_else(|| panic!("no {name}"));
    let sum = number("zero_pages") + number("distinct_pages") + number("duplicate_pages");
    assert_eq!(number("pages_scanned"), sum);
    assert!(number("zero_pages") >= 3 * 1024, "the zeros that each worker has");
    assert!(number("unique_pages") <= number("distinct_pages"));
    for name in ["volatile_pages", "already_shared_pages", "pages_sharing_predicted"] {
        number(name);
    }
    for name in ["bytes_saved_ksm", "bytes_saved_store"] {
        assert!(answer[name].as_i64().unwrap() > 0, "{name}");
    }
    assert!(answer["elapsed_seconds"].as_f64().unwrap() > 0.0 && answer["bytes_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(answer["processes"].as_array().unwrap().len(), 3);
    let scanned = |list: &Value| -> u64 {
        list.as_array().unwrap().iter().map(|owner| owner["pages_scanned"].as_u64().unwrap()).sum()
    };
    assert_eq!(scanned(&answer["processes"]), number("pages_scanned"));
    assert_eq!(scanned(&answer["vmas"]), number("pages_scanned"));
    let start = answer["vmas"][0]["start"].as_str().unwrap();
    assert!(start.starts_with("0x"), "{start}");
    let table = eval(&with(&words, &[]));
    let text = String::from_utf8(table.stdout).unwrap();
    for word in ["kernel KSM", "page store", "duplicates", "who shares with whom", "python3"] {
        assert!(text.contains(word), "no {word:?} in\n{text}");
    }
    assert!(table.stderr.is_empty(), "no progress where nobody looks");
}

#[test]
fn samples_come_near_and_say_a_range() {
    let Some(workers) = Workers::start(4, WORKER) else { return };
    let words = workers.words();
    let all = document(&with(&words, &["--json"]));
    let truth = all["duplicate_pages"].as_f64().unwrap();
    let scanned = all["pages_scanned"].as_f64().unwrap();
    for (option, method, off) in [("--sample-hash", "hash_space", 0.02), ("--sample-pages", "pages", 0.10)] {
        let answer = document(&with(&words, &["--json", option, "0.25"]));
        let sample = &answer["sample"];
        assert_eq!(sample["method"], method);
        let [low, likely, high] = ["duplicate_pages_low", "duplicate_pages", "duplicate_pages_high"]
            .map(|name| sample[name].as_f64().unwrap());
        assert!(low <= likely && likely <= high, "{sample}");
        assert!((likely - truth).abs() < off * scanned, "{method}: {likely} instead of {truth} of {scanned}");
        let estimated = answer["pages_scanned"].as_f64().unwrap();
        assert!((estimated / scanned - 1.0).abs() < 0.05, "{estimated} instead of {scanned}");
    }
    assert_eq!(document(&with(&words, &["--json", "--sample", "0.5"]))["sample"]["method"], "hash_space");
}

#[test]
fn near_pages_have_a_cause() {
    let Some(workers) = Workers::start(3, WORKER) else { return };
    let answer = document(&with(&workers.words(), &["--json", "--near"]));
    let near = &answer["near"];
    let causes = near["causes"].as_array().unwrap();
    let layout = causes.iter().any(|cause| cause["remedy"].as_str().unwrap().contains("--layout shared"));
    assert!(layout && near["pages_compared"].as_u64().unwrap() > 1000, "{near:#}");
}

#[test]
fn a_capture_is_read_back_and_a_model_is_made_of_it() {
    let Some(workers) = Workers::start(2, WORKER) else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("workers.parquet");
    let file = file.to_str().unwrap();
    let live = document(&with(&workers.words(), &["--json", "--watch", "0.2", "--looks", "3", "--capture", file]));
    drop(workers);
    let read = document(&["--from", file, "--json", "--model", "--model-within", "120"]);
    for name in ["pages_scanned", "duplicate_pages", "zero_pages", "volatile_pages", "bytes_saved_store", "vmas"] {
        assert_eq!(live[name], read[name], "{name}");
    }
    let model = &read["model"];
    let trials = model["trials"].as_array().unwrap();
    assert!(trials.len() > 10 && trials[0]["now"] == true, "{model:#}");
    let text = String::from_utf8(eval(&["--from", file, "--model"]).stdout).unwrap();
    assert!(text.contains("pages every") && text.contains("(now)"), "{text}");
    let bytes = std::fs::read(file).unwrap();
    std::fs::write(file, &bytes[..bytes.len() - 9]).unwrap();
    let refused = eval(&["--from", file]);
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(1) && said.contains("is not a whole Parquet file"), "{said}");
}

/// Files of one name, equal for the most part, are told apart from what can be merged.
#[test]
fn files_that_lie_in_the_cache_twice_are_told() {
    const MAPPER: &str = "import mmap, sys\n\
        file = open(sys.argv[1], 'rb')\n\
        area = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)\n\
        x = sum(area[::4096])\n\
        print('ready', flush=True)\n\
        sys.stdin.read()\n";
    let folder = tempfile::tempdir().unwrap();
    let content: Vec<u8> = (0..256 * 4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut children = Workers(Vec::new());
    for place in ["one", "two"] {
        let path = folder.path().join(place);
        std::fs::create_dir(&path).unwrap();
        let mut content = content.clone();
        // One page is each one's own.
        content[..3].copy_from_slice(place.as_bytes());
        std::fs::write(path.join("liball.so"), content).unwrap();
        let mut command = Command::new("python3");
        command.args(["-c", MAPPER]).arg(path.join("liball.so")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let Ok(mut child) = command.spawn() else {
            println!("skipped: python3");
            return;
        };
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        children.0.push(child);
    }
    let answer = document(&with(&children.words(), &["--json"]));
    let names = answer["files"]["names"].as_array().unwrap();
    let found = names.iter().find(|name| name["name"] == "liball.so").unwrap_or_else(|| panic!("{}", answer["files"]));
    assert_eq!(found["duplicate_pages"], 255);
    assert_eq!(found["files"].as_array().unwrap().len(), 2);
}

#[test]
fn bad_input_has_a_clear_error() {
    let refused = |words: &[&str], status: i32, says: &str| {
        let output = eval(words);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{words:?}: {said}");
        assert!(said.contains(says), "{words:?}: {said}");
        assert!(output.stdout.is_empty(), "{words:?}");
    };
    refused(&[], 2, "--pid, --cgroup, --comm or --all");
    let error: Value = serde_json::from_slice(&eval(&["--json"]).stdout).unwrap();
    assert!(error["error"].as_str().unwrap().contains("--pid, --cgroup, --comm or --all"), "{error}");
    refused(&["--pid", "0"], 2, "--pid");
    refused(&["--all", "--sample", "0"], 2, "above 0 and at most 1");
    refused(&["--all", "--sample-hash", "1.5"], 2, "above 0 and at most 1");
    refused(&["--all", "--watch", "-1"], 2, "--watch");
    refused(&["--all", "--range", "5-x"], 2, "START-END");
    refused(&["--all", "--limit-rate", "0"], 2, "--limit-rate");
    refused(&["--cgroup", "no/such/cgroup"], 1, "is not a cgroup");
    refused(&["--cgroup", "/etc"], 1, "is not a cgroup");
    refused(&["--comm", "no such program"], 1, "no process is called");
    refused(&["--from", "/no/such/file"], 1, "cannot open /no/such/file");
    refused(&["--from", "/etc/passwd"], 1, "is not a whole Parquet file");
    let mut child = Command::new("true").spawn().unwrap();
    let gone = child.id().to_string();
    child.wait().unwrap();
    refused(&["--pid", &gone], 1, "there is no process");
    // The second process of the machine is the father of the kernel's threads, where it can be seen.
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|comm| comm == "kthreadd\n") {
        refused(&["--pid", "2"], 1, "is a thread of the kernel");
    }
    // As somebody else, our own process is not to be read.
    let own = std::process::id().to_string();
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_pagefold"), "eval", "--pid"];
    match Command::new("setpriv").args(nobody).arg(&own).output() {
        Ok(output) if output.status.code() == Some(3) => {
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("CAP_SYS_PTRACE"), "{said}");
        }
        Ok(output) => {
            // Another user cannot even start what lies below a private folder, and only root can become nobody.
            println!("skipped: root, and a binary that others may run: {output:?}");
        }
        Err(_) => println!("skipped: setpriv"),
    }
}
