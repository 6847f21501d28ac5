//! Running the binary and looking at what comes out.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share of this")]

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

pub fn qcqa(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qcqa")).args(args).output().unwrap()
}

/// Standard output of a command that must succeed, and that must be silent on standard error: this is no terminal.
#[track_caller]
pub fn done(args: &[&str]) -> String {
    let output = qcqa(args);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args:?}");
    assert_eq!(output.status.code(), Some(0), "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
pub fn json(args: &[&str]) -> Value {
    serde_json::from_str(&done(&[args, &["--json"]].concat())).unwrap()
}

/// The message of a command that must fail with this code.
#[track_caller]
pub fn fails(code: i32, args: &[&str]) -> String {
    let output = qcqa(args);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    message
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
