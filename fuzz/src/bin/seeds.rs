//! Writes the seeds of every target below a directory, corpus/ unless another is named.

use std::fs;
use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let root = PathBuf::from(std::env::args().nth(1).unwrap_or("corpus".to_string()));
    for (name, _) in qcqa_fuzz::targets::ALL {
        let directory = root.join(name);
        fs::create_dir_all(&directory)?;
        for (i, seed) in qcqa_fuzz::seeds::of(name).into_iter().enumerate() {
            fs::write(directory.join(format!("seed-{i:02}")), seed)?;
        }
    }
    Ok(())
}
