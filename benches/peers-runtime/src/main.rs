//! Tokens a second of qcqa's forward pass and of candle-transformers' Llama, on the same windows.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama::{Cache, Config, Llama};
use ndarray::Array2;
use qcqa::HeadSource;
use qcqa::checkpoint::Checkpoint;
use qcqa::runtime::Model;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let path = args.next().ok_or("usage: peers-runtime MODEL [WINDOWS]")?;
    let windows: usize = args.next().map_or(Ok(4), |n| n.parse())?;
    let checkpoint = Checkpoint::open(&path)?;
    let ours = Model::load(&checkpoint)?;
    let (config, device) = (config(&checkpoint)?, Device::Cpu);
    let files = files(Path::new(&path))?;
    // SAFETY: nobody rewrites the files while this runs.
    let weights = unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &device)? };
    let theirs = Llama::load(weights, &config)?;

    let (length, vocabulary) = (ours.window(), ours.vocabulary());
    let tokens = Array2::from_shape_fn((windows, length), |(w, t)| ((w * 31 + t * t * 7 + t) % vocabulary) as u32);
    let ids = Tensor::from_vec(tokens.iter().copied().collect::<Vec<u32>>(), (windows, length), &device)?;
    let mut cache = Cache::new(false, DType::F32, &config, &device)?;
    let last: Vec<Vec<f32>> = theirs.forward(&ids, 0, &mut cache)?.to_vec2()?;
    let all = ours.logits(tokens.view())?;
    let worst = last.iter().enumerate().flat_map(|(w, row)| {
        let all = &all;
        row.iter().enumerate().map(move |(v, l)| (l - all[[w, length - 1, v]]).abs())
    });
    println!("{windows} windows of {length}; last logits differ by at most {:.1e}", worst.fold(0.0, f32::max));

    let count = (windows * length) as f64;
    let (mut best_ours, mut best_theirs) = (f64::MAX, f64::MAX);
    for _ in 0..5 {
        let start = Instant::now();
        ours.logits(tokens.view())?;
        best_ours = best_ours.min(start.elapsed().as_secs_f64());
        let start = Instant::now();
        theirs.forward(&ids, 0, &mut cache)?;
        best_theirs = best_theirs.min(start.elapsed().as_secs_f64());
    }
    let (ours, theirs) = (count / best_ours, count / best_theirs);
    println!("qcqa {ours:.0} tokens/s, candle-transformers {theirs:.0} tokens/s, ratio {:.2}", ours / theirs);
    Ok(())
}

fn config(checkpoint: &Checkpoint) -> Result<Config, Box<dyn Error>> {
    let (c, model) = (checkpoint.config().raw(), checkpoint.architecture());
    let number = |key: &str| c.get(key).and_then(|v| v.as_u64()).ok_or(format!("{key} is missing"));
    let float = |key: &str| c.get(key).or_else(|| c.get("rope_parameters")?.get(key)).and_then(|v| v.as_f64());
    let layer = &model.layers[0];
    Ok(Config {
        hidden_size: model.hidden,
        intermediate_size: number("intermediate_size")? as usize,
        vocab_size: number("vocab_size")? as usize,
        num_hidden_layers: model.n_layers(),
        num_attention_heads: layer.query_heads,
        num_key_value_heads: layer.kv_heads,
        use_flash_attn: false,
        rms_norm_eps: float("rms_norm_eps").unwrap_or(1e-6),
        rope_theta: float("rope_theta").unwrap_or(10_000.0) as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: number("max_position_embeddings")? as usize,
        tie_word_embeddings: model.tied_embeddings,
    })
}

fn files(model: &Path) -> Result<Vec<std::path::PathBuf>, Box<dyn Error>> {
    let entries = model.read_dir()?.map(|entry| entry.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?;
    Ok(entries.into_iter().filter(|p| p.extension().is_some_and(|e| e == "safetensors")).collect())
}
