//! Makes the golden images of the format anew (`tests/golden/README.md`):
//!
//! ```text
//! cargo run -p stableio-array --example golden -- tests/golden
//! ```

#[path = "../tests/support/mod.rs"]
mod support;

fn main() {
    let into = std::env::args_os().nth(1).expect("the folder for the images");
    support::golden::generate(into.as_ref());
}
