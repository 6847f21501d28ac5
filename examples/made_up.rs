//! Writes a made-up model of a published shape: Gaussian weights in bf16, a shard for each layer, so that one layer is in memory at a
//! time. What a search, a calibration or a distillation takes on such a model can be measured on it; what it loses cannot.
//!
//! ```sh
//! cargo run --release --features checkpoint,rayon --example made_up -- DIR llama-2-7b       # 13.5 GB; llama-2-13b, llama-3.1-8b, llama-3.2-1b
//! cargo run --release --features checkpoint,rayon --example made_up -- DIR llama-2-7b 2     # two of its layers
//! ```

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::fs;
use std::path::Path;

use half::bf16;
use ndarray_rand::rand_distr::{Distribution, Normal};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, json};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// The numbers of a Llama.
#[derive(Debug, Clone, Copy)]
struct Shape {
    layers: usize,
    query_heads: usize,
    kv_heads: usize,
    mlp: usize,
    vocabulary: usize,
    head: usize,
    /// Whether the output embedding is that of the tokens.
    tied: bool,
}

const LLAMA_2_7B: Shape = Shape {
    layers: 32,
    query_heads: 32,
    kv_heads: 32,
    mlp: 11_008,
    vocabulary: 32_000,
    head: 128,
    tied: false,
};
const LLAMA_2_13B: Shape = Shape { layers: 40, query_heads: 40, kv_heads: 40, mlp: 13_824, ..LLAMA_2_7B };
const LLAMA_3_8B: Shape = Shape { kv_heads: 8, mlp: 14_336, vocabulary: 128_256, ..LLAMA_2_7B };
const LLAMA_3_1B: Shape = Shape { layers: 16, mlp: 8192, head: 64, tied: true, ..LLAMA_3_8B };
const SHAPES: [(&str, Shape); 4] = [
    ("llama-2-7b", LLAMA_2_7B),
    ("llama-2-13b", LLAMA_2_13B),
    ("llama-3.1-8b", LLAMA_3_8B),
    ("llama-3.2-1b", LLAMA_3_1B),
];

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (out, name, layers) = match &args[..] {
        [out, name] => (out, name.as_str(), None),
        [out, name, layers] => (out, name.as_str(), Some(layers.parse()?)),
        _ => {
            return Err(
                format!("usage: made_up DIR {} [LAYERS]", SHAPES.map(|(name, _)| name).join("|")).into()
            );
        }
    };
    let known = SHAPES.into_iter().find(|(known, _)| *known == name);
    let (_, shape) = known.ok_or(format!("{name}: one of {}", SHAPES.map(|(name, _)| name).join(", ")))?;
    write(Path::new(out), Shape { layers: layers.unwrap_or(shape.layers), ..shape })
}

fn write(out: &Path, shape: Shape) -> Outcome<()> {
    let Shape { layers, query_heads, kv_heads, mlp, vocabulary, head, tied } = shape;
    let d = query_heads * head;
    let layer = d * head * (2 * query_heads + 2 * kv_heads) + 3 * d * mlp + 2 * d;
    let embeddings = if tied {
        &["model.embed_tokens.weight"][..]
    } else {
        &["model.embed_tokens.weight", "lm_head.weight"]
    };
    let bytes = 2 * (layers * layer + embeddings.len() * vocabulary * d + d) as u64;
    fs::create_dir(out)?;
    let free = fs4::available_space(out)?;
    if free < bytes + (1 << 30) {
        fs::remove_dir(out)?;
        return Err(format!("{bytes} bytes and a gigabyte to spare are needed, {free} are free").into());
    }
    let mut weight_map = Map::new();
    for i in 0..=layers {
        let prefix = format!("model.layers.{i}.");
        let of =
            |name: &str, rows: usize, columns: usize| (format!("{prefix}{name}.weight"), vec![rows, columns]);
        let mut shapes = if i < layers {
            let (q, kv) = (query_heads * head, kv_heads * head);
            vec![
                of("self_attn.q_proj", q, d),
                of("self_attn.k_proj", kv, d),
                of("self_attn.v_proj", kv, d),
                of("self_attn.o_proj", d, q),
                of("mlp.gate_proj", mlp, d),
                of("mlp.up_proj", mlp, d),
                of("mlp.down_proj", d, mlp),
            ]
        } else {
            embeddings.iter().map(|name| (name.to_string(), vec![vocabulary, d])).collect()
        };
        let norms = if i < layers {
            ["input_layernorm", "post_attention_layernorm"]
                .map(|name| format!("{prefix}{name}.weight"))
                .to_vec()
        } else {
            vec!["model.norm.weight".to_string()]
        };
        shapes.extend(norms.into_iter().map(|name| (name, vec![d])));
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, layers + 1);
        let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = shapes
            .into_par_iter()
            .enumerate()
            .map(|(n, (name, shape))| (name, (shape.clone(), numbers(&shape, (i * 16 + n) as u64))))
            .collect();
        let mut views = Vec::new();
        for (name, (shape, bytes)) in &tensors {
            weight_map.insert(name.clone(), json!(file));
            views.push((name, TensorView::new(Dtype::BF16, shape.clone(), bytes)?));
        }
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), &out.join(&file))?;
        eprintln!("{file}");
    }
    let index = json!({ "metadata": { "total_size": bytes }, "weight_map": weight_map });
    fs::write(out.join("model.safetensors.index.json"), index.to_string())?;
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": d, "num_hidden_layers": layers,
        "num_attention_heads": query_heads, "num_key_value_heads": kv_heads, "head_dim": head, "intermediate_size": mlp,
        "vocab_size": vocabulary, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16",
    });
    fs::write(out.join("config.json"), config.to_string())?;
    // Of a small model, whose tokens this one has, too.
    fs::copy("tests/data/novels-1m/tokenizer.json", out.join("tokenizer.json"))?;
    Ok(())
}

/// Numbers of deviation 0.02, row by row; norms are 1.
fn numbers(shape: &[usize], seed: u64) -> Vec<u8> {
    let &[rows, columns] = shape else { return bf16::ONE.to_le_bytes().repeat(shape[0]) };
    let normal = Normal::new(0.0f32, 0.02).expect("a positive deviation");
    let mut bytes = vec![0; 2 * rows * columns];
    bytes.par_chunks_mut(2 * columns).enumerate().for_each(|(row, bytes)| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed << 32 | row as u64);
        bytes.chunks_exact_mut(2).for_each(|bytes| {
            bytes.copy_from_slice(&bf16::from_f32(normal.sample(&mut rng)).to_le_bytes());
        });
    });
    bytes
}
