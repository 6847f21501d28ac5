//! Models of any family, made up of what the family says that it needs.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share of this")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use qcqa::checkpoint::{Checkpoint, Config, Family, TensorIndex};
use qcqa::families::FAMILIES;
use qcqa::heads::HeadSource;
use qcqa::model::{Architecture, FeedForward, Linear, NormOver, Part};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::models::Tensor;

/// Tokens, width and MLP of every such model.
pub const VOCABULARY: usize = 24;
pub const WIDTH: usize = 24;
pub const MLP: usize = 10;
/// Query heads, KV heads where a family shares them, and the width of a head.
pub const QUERIES: usize = 6;
pub const HEAD: usize = 4;

/// A family's model by its type, and what config.json says besides the sizes.
pub fn kinds() -> Vec<(&'static str, Value)> {
    let types = json!(["sliding_attention", "full_attention"]);
    let rope =
        |partial: f64| json!({"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": partial});
    vec![
        (
            "llama",
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8}}),
        ),
        ("mistral", json!({"sliding_window": 5})),
        ("qwen2", json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1})),
        ("qwen3", json!({"attention_bias": true})),
        ("olmo", json!({})),
        ("olmo2", json!({})),
        ("olmo3", json!({"sliding_window": 5, "layer_types": types})),
        ("smollm3", json!({"no_rope_layer_interval": 2})),
        ("phi", json!({"qk_layernorm": true, "rope_parameters": rope(0.5)})),
        (
            "phi3",
            json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]},
            "original_max_position_embeddings": 8}),
        ),
        ("gemma", json!({})),
        (
            "gemma2",
            json!({"sliding_window": 5, "query_pre_attn_scalar": 6, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0}),
        ),
        ("gemma3_text", json!({"sliding_window": 5, "layer_types": types, "query_pre_attn_scalar": 6})),
        (
            "granite",
            json!({"attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 3.0,
            "logits_scaling": 2.0}),
        ),
        ("stablelm", json!({"use_qkv_bias": true, "rope_parameters": rope(0.5)})),
        ("stablelm", json!({"use_parallel_residual": true, "rope_parameters": rope(0.5)})),
        ("stablelm", json!({"qk_layernorm": true, "rope_parameters": rope(0.5)})),
        ("gpt_neox", json!({"rotary_pct": 0.5})),
        ("starcoder2", json!({"sliding_window": 5})),
        ("nemotron", json!({"attention_bias": true, "rope_parameters": rope(0.5)})),
        ("cohere", json!({"logit_scale": 0.5})),
        ("cohere", json!({"use_qk_norm": true})),
        ("cohere2", json!({"sliding_window": 5, "layer_types": types})),
        ("glm", json!({"rope_parameters": rope(0.5)})),
        ("glm4", json!({"rope_parameters": rope(0.5)})),
        ("exaone4", json!({"sliding_window": 5, "layer_types": types})),
        ("arcee", json!({"mlp_bias": true})),
        ("seed_oss", json!({})),
        ("ernie4_5", json!({"use_bias": true})),
        ("helium", json!({})),
        ("olmoe", json!({"num_experts": 3, "num_experts_per_tok": 2})),
        ("opt", json!({})),
        ("opt", json!({"do_layer_norm_before": false})),
        ("gpt2", json!({})),
        ("gptj", json!({"rotary_dim": 2})),
        ("bloom", json!({})),
        ("falcon", json!({"alibi": true, "multi_query": false, "parallel_attn": false, "bias": true})),
        ("mpt", json!({})),
        ("mixtral", json!({"num_local_experts": 3, "num_experts_per_tok": 2})),
        ("qwen3_moe", json!({"num_experts": 3, "num_experts_per_tok": 2})),
        (
            "gpt_oss",
            json!({"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 5, "rope_scaling":
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "truncate": false}}),
        ),
    ]
}

/// Says that every tensor is there, biases where they are wanted.
struct Everything {
    biases: bool,
    shape: [usize; 2],
}

impl TensorIndex for Everything {
    fn shape(&self, name: &str) -> Option<&[usize]> {
        // A file has one root and one output embedding.
        let other = ["wte.weight", "decoder.embed_tokens.weight", "word_embeddings.weight", "lm_head.weight"]
            .contains(&name);
        let other = other || name.ends_with("gamma");
        (!other && (name.ends_with("weight") || self.biases)).then_some(&self.shape[..])
    }

    /// As many as a model with layers has, of which nobody misses one.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(std::iter::repeat_n("rotary_emb.inv_freq", 64))
    }
}

/// The shapes of all tensors that a model reads.
fn shapes(model: &Architecture) -> BTreeMap<String, Vec<usize>> {
    let forward = model.forward.as_ref().unwrap();
    let mut shapes = BTreeMap::new();
    let mut add = |name: &str, shape: &[usize]| shapes.insert(name.to_string(), shape.to_vec());
    let d = WIDTH;
    add(&forward.embedding, &[VOCABULARY, d]);
    forward.head.iter().for_each(|head| drop(add(head, &[VOCABULARY, d])));
    forward.token_types.iter().for_each(|types| drop(add(types, &[2, d])));
    forward.head_bias.iter().for_each(|bias| drop(add(bias, &[VOCABULARY])));
    forward.learned.iter().for_each(|l| drop(add(&l.tensor, &[l.first + forward.positions, d])));
    let outer = forward.embedding_norm.iter().chain(&forward.norm);
    for norm in outer.chain(forward.blocks.iter().flat_map(|block| block.norms())) {
        norm.tensors().for_each(|name| drop(add(name, &[d])));
    }
    for block in &forward.blocks {
        let mut linear = |linear: &Linear, out: usize, inputs: usize| {
            let [weight, bias] = linear.shapes(out, inputs);
            add(&linear.weight, &weight);
            linear.bias.iter().for_each(|name| drop(add(name, &bias)));
        };
        for mlp in block.mlp.mlps() {
            mlp.gate.iter().for_each(|gate| linear(gate, MLP, d));
            linear(&mlp.up, MLP, d);
            linear(&mlp.down, d, MLP);
        }
        if let FeedForward::Experts(experts) = &block.mlp {
            add(&experts.router, &[experts.experts.len(), d]);
            experts.router_bias.iter().for_each(|bias| drop(add(bias, &[experts.experts.len()])));
        }
    }
    for spec in &model.layers {
        spec.sinks.iter().for_each(|name| drop(add(name, &[spec.query_heads])));
        let stored = spec.stored.as_ref().unwrap();
        for part in Part::ALL {
            let of = stored.part(part);
            add(&of.tensor, &of.shape(d));
            let size = if part == Part::Output { d } else { of.extent };
            of.bias.iter().for_each(|bias| drop(add(bias, &[size])));
        }
        for (norm, part) in spec.norms.iter().zip([Part::Query, Part::Key]) {
            let Some(norm) = norm else { continue };
            let (heads, h) = (spec.heads(part), spec.head_dim);
            let shape = match norm.over {
                NormOver::Width => vec![heads * h],
                NormOver::OwnHead if norm.heads.is_empty() => vec![heads, h],
                _ => vec![h],
            };
            norm.tensors().for_each(|name| drop(add(name, &shape)));
        }
    }
    shapes
}

/// A model of a family, whose every tensor matters, with so many KV heads where the family shares them.
pub fn made(kind: &str, differs: &Value, kv_heads: usize) -> Checkpoint {
    let (text, weights) = files(kind, differs, kv_heads);
    let checkpoint = Checkpoint::from_bytes(text.as_bytes(), weights, FAMILIES).unwrap();
    assert!(checkpoint.architecture().forward.is_ok(), "{kind}: {:?}", checkpoint.architecture().forward);
    checkpoint
}

/// The same in a directory.
pub fn made_in(directory: &Path, kind: &str, differs: &Value, kv_heads: usize) -> Checkpoint {
    let (text, weights) = files(kind, differs, kv_heads);
    fs::create_dir_all(directory).unwrap();
    fs::write(directory.join("config.json"), text).unwrap();
    fs::write(directory.join("model.safetensors"), weights).unwrap();
    Checkpoint::open(directory).unwrap()
}

/// config.json and the weights.
fn files(kind: &str, differs: &Value, kv_heads: usize) -> (String, Vec<u8>) {
    let mut config = json!({
        "model_type": kind, "vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_embd": WIDTH, "num_hidden_layers": 2,
        "n_layer": 2, "num_attention_heads": QUERIES, "n_head": QUERIES, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 32, "n_positions": 32, "d_model": WIDTH, "n_heads": QUERIES, "n_layers": 2, "max_seq_len": 32, "tie_word_embeddings": false, "head_dim": HEAD,
    });
    let all = config.as_object_mut().unwrap();
    all.extend(differs.as_object().unwrap().clone());
    let text = config.to_string();
    let parsed = Config::parse("config.json", text.as_bytes()).unwrap();
    let family: &&dyn Family = FAMILIES.iter().find(|family| family.model_types().contains(&kind)).unwrap();
    let index = Everything { biases: true, shape: [VOCABULARY, WIDTH] };
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    let mut tensor = |name: &str, shape: &[usize]| {
        // Weights of norms lie around 1, whatever is stored of them.
        let norm = (shape.len() == 1 || name.contains("_norm.")) && name.ends_with("weight");
        let scale = if norm { 0.4 } else { 1.5 / (shape[shape.len() - 1] as f32).sqrt() };
        let mut made = Tensor::random(Dtype::F32, shape, scale, rng);
        if norm && !["gemma", "gemma2", "gemma3_text", "nemotron"].contains(&kind) {
            let numbers = made.bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]) + 1.0);
            made.bytes = crate::models::encode(Dtype::F32, &numbers.collect::<Vec<_>>());
        }
        made
    };
    let described = family.describe(&parsed, &index).unwrap();
    let tensors: BTreeMap<String, Tensor> =
        shapes(&described).into_iter().map(|(name, shape)| (name.clone(), tensor(&name, &shape))).collect();
    let views =
        tensors.iter().map(|(n, t)| (n, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    (text, safetensors::serialize(views, None).unwrap())
}
