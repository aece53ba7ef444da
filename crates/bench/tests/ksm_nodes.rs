//! KSM on two memory nodes, in a guest: the cases of the kernel's own tests and of LTP that a machine with one node
//! cannot try. What happens inside is `bench inside nodes` (`src/inside/nodes.rs`).
#![allow(clippy::unwrap_used, reason = "tests")]

mod kernels;

use std::path::Path;
use std::time::Duration;

use bench::guest::{GuestFile, run_inside_nodes};
use kernels::kernel;
use serde_json::Value;

const BENCH: &str = env!("CARGO_BIN_EXE_bench");

/// `ksm_tests -N -m 1` and `-m 0`; `ksm06 -n 10` and `-n 8000`: across nodes all pages become one, and else one for each
/// node.
#[test]
fn ksm_merging_across_numa_nodes_and_ksm06() {
    let Some(kernel) = kernel("6.12") else { return };
    let files = [GuestFile { path: "/bench".to_owned(), from: Path::new(BENCH).to_owned() }];
    let within = Duration::from_secs(300);
    let output = run_inside_nodes(&kernel, &[], &files, &["/bench", "inside", "nodes"], within, 2).unwrap();
    println!("{}: {:?} after {:?}\n{}", kernel.release, output.status, output.elapsed, output.text);
    assert_eq!(output.status, Some(0), "{}\n{}", output.text, output.console);
    let report: Value = serde_json::from_str(output.text.lines().rfind(|line| line.starts_with('{')).unwrap()).unwrap();
    assert_eq!(report["nodes"], 2, "{report}");
    let cases = report["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 6);
    for case in cases {
        let pages = case["pages"].as_u64().unwrap();
        let expected = match (case["merge_across_nodes"].as_bool().unwrap(), pages) {
            (true, _) => (1, 2 * pages - 1),
            // Two pages, each alone on its node.
            (false, 1) => (0, 0),
            (false, _) => (2, 2 * pages - 2),
        };
        let found = (case["pages_shared"].as_u64().unwrap(), case["pages_sharing"].as_u64().unwrap());
        assert_eq!(found, expected, "{case}");
    }
}
