//! Builds the agent's image, so that every binary of pagefold carries its agent inside.
//!
//! The image is a shared object without std, with a profile of its own (no unwinding, always optimised, baseline
//! instructions only: its stubs save no wider registers). So it is built by a cargo call of its own, in a target folder
//! of its own, with none of the flags that the outer build was given.

use std::path::PathBuf;
use std::process::Command;

/// What the outer cargo passes on and must not reach the inner one.
const OUTER: [&str; 8] = [
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
    "CARGO_BUILD_TARGET_DIR",
    "CLIPPY_ARGS",
];

fn main() {
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("..");
    for watched in ["abi/src", "merge/src", "agent/src", "agent/image/src", "agent/image/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", root.join(watched).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    let target = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("image");
    let cargo = std::env::var_os("CARGO").expect("cargo sets it");
    let mut command = Command::new(cargo);
    command
        .args(["build", "--release", "--quiet", "--manifest-path"])
        .arg(root.join("agent/image/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target);
    for variable in OUTER {
        command.env_remove(variable);
    }
    let status = command.status().expect("cargo can be run again");
    assert!(status.success(), "the agent's image could not be built");
    let image = target.join("release/libpagefold_agent_image.so");
    assert!(image.is_file(), "{} was not built", image.display());
    println!("cargo::rustc-env=PAGEFOLD_AGENT_IMAGE={}", image.display());
}
