//! Programs that break a rule of this crate do not compile (MEM-1, MEM-2 and
//! what the doors give); the right program does, and runs.
//!
//! `TRYBUILD=overwrite cargo test -p stableio-mem --test compile_fail` writes
//! the expected messages anew after a change of compiler. Read them then: each
//! must still be about the rule that the program breaks.

#[test]
fn wrong_programs_do_not_compile() {
    let programs = trybuild::TestCases::new();
    programs.pass("tests/compile_pass/*.rs");
    programs.compile_fail("tests/compile_fail/*.rs");
}
