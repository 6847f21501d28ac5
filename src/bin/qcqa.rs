//! The binary `qcqa`; everything is in the library's `cli` room.

use std::process::ExitCode;

fn main() -> ExitCode {
    qcqa::cli::main()
}
