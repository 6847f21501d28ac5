//! The main job of the README in ten lines: what `qcqa compress` does, from a program.
//!
//! `cargo run --release --features runtime --example compress -- tests/data/novels-1m tests/data/novels-1m/calibration.txt target/half`

use qcqa::budget::Budget;
use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::files::WriteOptions;
use qcqa::pipeline::{Compress, Preset};
use qcqa::targets::Stock;
use qcqa::{Error, Result, Run};

/// Halves the KV cache of `model`, calibrated on `windows` windows of `text`, and writes it to `out`.
pub fn compress(model: &str, text: &str, windows: usize, out: &str) -> Result<()> {
    let (model, run) = (Checkpoint::open(model)?, Run::new(0));
    let text = Calibration::from_text(&model, text.as_ref(), windows, run)?;
    let compress = Compress::new(Preset::LowRank).budget(Budget::Fraction(0.5)).target(&Stock);
    let compress = compress.calibration(&text);
    let compressed = compress.run(&model, run)?;
    for text in &compressed.effects {
        let (before, after) = (&text.validation.before, &text.validation.after);
        println!("{}: perplexity {:.2} → {:.2}", text.name, before.perplexity(), after.perplexity());
    }
    compressed.write(out.as_ref(), WriteOptions::default(), run)?;
    Ok(())
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, out] = &args[..] else { return Err(Error::plugin("usage: compress MODEL TEXT OUT")) };
    let windows = std::env::var("WINDOWS").ok().and_then(|n| n.parse().ok()).unwrap_or(128);
    compress(model, text, windows, out)
}
