//! Builds the preload library and hands it to the launcher, so that the command is one file.
//!
//! The library is a `cdylib` whose functions have the names of the C library's. Cargo can not link
//! such a thing into a program, nor (on a stable compiler) hand its path to one, so a cargo of its
//! own builds it here, into a directory of its own: the outer cargo holds the lock of the usual
//! one.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const LIBRARY: &str = "libstableio_preload.so";

/// Names a library that was built before, to be taken as it is: with other flags, by a packager, or
/// by somebody who works on it.
const READY_MADE: &str = "STABLEIO_PRELOAD_LIBRARY";

/// What the library is made of, from this crate's directory.
const SOURCES: [&str; 8] = [
    "preload/Cargo.toml",
    "preload/src",
    "session/Cargo.toml",
    "session/src",
    "../onepass/Cargo.toml",
    "../onepass/src",
    "../../Cargo.toml",
    "../../Cargo.lock",
];

/// What the outer build says about itself and must not reach the inner one: flags (coverage, a
/// sanitizer) whose runtime a foreign program does not have, the linter in the compiler's place,
/// and directories. `CARGO_MAKEFLAGS` stays: both share one job server.
const UNSET: [&str; 9] = [
    "RUSTFLAGS",
    "CARGO_ENCODED_RUSTFLAGS",
    "CARGO_BUILD_RUSTFLAGS",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "CARGO_PRIMARY_PACKAGE",
    "__CARGO_DEFAULT_LIB_METADATA",
];

fn main() {
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    for source in SOURCES {
        println!("cargo::rerun-if-changed={}", here.join(source).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={READY_MADE}");
    let library = PathBuf::from(variable("OUT_DIR")).join(LIBRARY);
    let target = variable("TARGET");
    if target.starts_with("x86_64-") && target.contains("-linux-") && target.ends_with("-gnu") {
        match env::var_os(READY_MADE) {
            Some(built) => copy(Path::new(&built), &library),
            None => build(&here, &target, &library),
        }
    } else {
        fs::write(&library, []).expect("the build's own directory can be written");
    }
}

fn build(here: &Path, target: &str, library: &Path) {
    let out = PathBuf::from(variable("OUT_DIR")).join("preload");
    let mut cargo = Command::new(variable("CARGO"));
    cargo.arg("build").arg("--manifest-path").arg(here.join("preload/Cargo.toml"));
    cargo.args(["--package", "stableio-preload", "--release", "--locked", "--quiet"]);
    cargo.args(["--target", target]).arg("--target-dir").arg(&out);
    for name in UNSET {
        cargo.env_remove(name);
    }
    // A panic must not unwind into a program that is not Rust, and every session writes the
    // library to its directory, so it is to be small.
    cargo.env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    cargo.env("CARGO_PROFILE_RELEASE_LTO", "fat");
    cargo.env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1");
    cargo.env("CARGO_PROFILE_RELEASE_DEBUG", "none");
    cargo.env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    let status = cargo.status().expect("cargo runs: it runs this");
    assert!(status.success(), "the preload library does not build: {cargo:?}: {status}");
    copy(&out.join(target).join("release").join(LIBRARY), library);
}

fn copy(built: &Path, library: &Path) {
    fs::copy(built, library).unwrap_or_else(|error| panic!("{}: {error}", built.display()));
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("{name}: {error}"))
}
