use serde_json::Value;

use crate::checkpoint::{Config, Family, TensorIndex};
use crate::files::FileError;
use crate::model::{
    Architecture, AttentionSpec, Axis, Block, Forward, Linear, Mask, Mlp, Norm, Rotary, Rotation, Stored,
    StoredHeads, Unsupported,
};
use crate::partition::Partition;

/// Llama, CodeLlama, SmolLM, and what follows them: split projections, RoPE half-split over the whole head, RMS norms, gated
/// MLPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Llama;

impl Family for Llama {
    fn model_types(&self) -> &'static [&'static str] {
        &["llama"]
    }

    fn describe(&self, config: &Config, tensors: &dyn TensorIndex) -> Result<Architecture, FileError> {
        let biased = config.flag("attention_bias")?;
        let biases = Biases { queries_keys_values: biased, outputs: biased, mlp: config.flag("mlp_bias")? };
        describe(config, tensors, Defaults { kv_heads: None, positions: 2048, biases }, &|_| Mask::Causal)
    }
}

/// What a config.json of the kind need not say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    /// KV heads; `None`: as many as query heads.
    pub(super) kv_heads: Option<usize>,
    /// Tokens that the model has positions for.
    pub(super) positions: usize,
    /// Which projections have a bias.
    pub(super) biases: Biases,
}

/// Which projections may have a bias: one that is not stored is 0, one that is stored elsewhere is nobody's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Biases {
    pub(super) queries_keys_values: bool,
    pub(super) outputs: bool,
    pub(super) mlp: bool,
}

impl Biases {
    /// Of the projection with this name.
    fn has(self, module: &str) -> bool {
        match module {
            "q" | "k" | "v" => self.queries_keys_values,
            "o" => self.outputs,
            _ => self.mlp,
        }
    }

    /// Whether a tensor is a bias that the model does not have.
    fn strays(self, tensor: &str) -> bool {
        let module = tensor.strip_suffix("_proj.bias").and_then(|name| name.rsplit('.').next());
        module.is_some_and(|module| !self.has(module))
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// What config.json calls layers that look at all keys before them, and those that look at a window.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

/// Whether each layer looks at a window only, as `layer_types` has it; `None` where that is not given.
pub(super) fn sliding_layers(config: &Config) -> Result<Option<Vec<bool>>, FileError> {
    const KEY: &str = "layer_types";
    let Some(value) = config.get(KEY) else { return Ok(None) };
    let n_layers = config.required("num_hidden_layers")?;
    let slides = |kind: &Value| Some(LAYER_TYPES.iter().position(|known| kind == known)? == 1);
    let layers: Option<Vec<bool>> = value.as_array().and_then(|kinds| kinds.iter().map(slides).collect());
    layers.filter(|layers| layers.len() == n_layers).map(Some).ok_or_else(|| {
        config.wrong(KEY, format!("one of {} for each of {n_layers} layers", LAYER_TYPES.join(", ")), value)
    })
}

/// The window of layers that have one.
pub(super) fn window(config: &Config) -> Result<usize, FileError> {
    const KEY: &str = "sliding_window";
    let missing = || config.wrong(KEY, "a number of tokens where `layer_types` has sliding layers", "null");
    match config.raw().get(KEY) {
        Some(value) if value.is_null() => Err(missing()),
        _ => Ok(config.count(KEY)?.unwrap_or(4096)),
    }
}

/// A model with Llama's tensors, of which families differ in defaults and in the masks of layers.
pub(super) fn describe(
    config: &Config,
    tensors: &dyn TensorIndex,
    defaults: Defaults,
    mask: &dyn Fn(usize) -> Mask,
) -> Result<Architecture, FileError> {
    refuse(config, tensors)?;
    let (n_layers, hidden) = (config.required("num_hidden_layers")?, config.required("hidden_size")?);
    let (query_heads, kv_heads) = heads(config, defaults)?;
    let head_dim = head_dim(config, hidden, query_heads)?;
    let (theta, mut notes) = (theta(config)?, Vec::new());
    notes.extend(contradicted(config, "rope_theta"));
    let rotary = Rotary::from_theta(Rotation::HalfSplit { dims: head_dim }, theta);
    let attention = |layer: usize, present: bool| {
        let part = |module: &str, axis, heads| {
            let name = format!("model.layers.{layer}.self_attn.{module}_proj");
            let bias = match present && defaults.biases.has(module) {
                true => uniform(config, tensors, layer, format!(".self_attn.{module}_proj.bias"))?,
                false => None,
            };
            Ok::<_, FileError>(Stored::split(format!("{name}.weight"), axis, heads, head_dim).with_bias(bias))
        };
        let (query, key) = (part("q", Axis::Rows, query_heads)?, part("k", Axis::Rows, kv_heads)?);
        let (value, output) = (part("v", Axis::Rows, kv_heads)?, part("o", Axis::Columns, query_heads)?);
        let spec = AttentionSpec::new(query_heads, kv_heads, head_dim);
        let spec = spec.with_mask(mask(layer)).with_rotary(rotary.clone());
        Ok::<_, FileError>(spec.with_stored(StoredHeads::new(query, key, value, output)))
    };
    let mut layers = Vec::new();
    for layer in 0..n_layers {
        // Ends with the first missing layer, which the reader will name, however many config.json claims.
        let present = tensors.shape(&format!("model.layers.{layer}.self_attn.k_proj.weight")).is_some();
        layers.push(attention(layer, present)?);
        if !present {
            break;
        }
    }
    let mut tied = config.flag("tie_word_embeddings")?;
    if tied && tensors.shape(HEAD).is_some() && !tensors.equal(HEAD, EMBEDDING) {
        tied = false;
        notes.push(format!("`tie_word_embeddings` is true, but {HEAD} is stored and another: it is used"));
    }
    if let Some(bias) = tensors.names().find(|name| defaults.biases.strays(name)) {
        notes.push(format!(
            "{bias} is stored, but by config.json the model has no such biases: they are not used"
        ));
    }
    if let Some(name) = tensors.names().find(|name| is_beyond(name, n_layers)) {
        notes.push(format!(
            "{name} is stored, but by config.json the model has {n_layers} layers: those beyond are not used"
        ));
    }
    let model = Architecture {
        tied_embeddings: tied,
        notes,
        ..Architecture::new(config.model_type()?, hidden, layers)
    };
    let forward = forward(config, tensors, &model, defaults)?;
    Ok(model.with_forward(forward))
}

/// Whether a tensor is of a layer that the model does not have.
fn is_beyond(tensor: &str, n_layers: usize) -> bool {
    let layer = tensor.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
    layer.and_then(|layer| layer.parse::<usize>().ok()).is_some_and(|layer| layer >= n_layers)
}

/// Endings of tensors in which quantised weights are stored.
const QUANTISED: [&str; 7] =
    [".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax"];

/// What cannot be converted.
fn refuse(config: &Config, tensors: &dyn TensorIndex) -> Result<(), FileError> {
    if config.get("quantization_config").is_some() {
        return Err(config.unsupported(
            "a quantised model (`quantization_config`)",
            "dequantise it first, or take the model that it was made of",
        ));
    }
    if let Some(name) = tensors.names().find(|name| QUANTISED.iter().any(|end| name.ends_with(end))) {
        let beside = config.path().parent().unwrap_or(config.path());
        let files = ["quantize_config.json", "quant_config.json", "hf_quant_config.json"];
        let by = files.iter().find(|file| beside.join(file).is_file()).map(|file| format!(", {file}"));
        let what = format!("a quantised model (tensor {name}{})", by.unwrap_or_default());
        return Err(config.unsupported(what, "dequantise it first, or take the model that it was made of"));
    }
    for key in ["per_layer_config", "num_key_value_heads_per_layer", "block_configs"] {
        if config.get(key).is_some() {
            let what = format!("a description of layers one by one (`{key}`)");
            return Err(config.unsupported(what, "models that one set of numbers describes are"));
        }
    }
    if let Some(factor) = rope(config, "partial_rotary_factor").filter(|f| f.as_f64() != Some(1.0)) {
        let what = format!("a partial rotation (`partial_rotary_factor` {factor})");
        return Err(config.unsupported(what, "all dimensions of a head must turn"));
    }
    if let Some(name) = tensors.names().find(|name| name.contains(".q_norm.") || name.contains(".k_norm.")) {
        let what = format!("normalised queries or keys (tensor {name})");
        return Err(config.unsupported(what, "merging keys is not exact under their norm"));
    }
    // Whatever else belongs to heads would be left as it is while they move.
    let known = |rest: &str| {
        let (module, kind) = rest.rsplit_once('.').unwrap_or((rest, ""));
        let projection = ["q_proj", "k_proj", "v_proj", "o_proj"].contains(&module);
        (projection && ["weight", "bias"].contains(&kind)) || rest == "rotary_emb.inv_freq"
    };
    let other =
        tensors.names().find(|name| name.split_once(".self_attn.").is_some_and(|(_, rest)| !known(rest)));
    match other {
        None => Ok(()),
        Some(name) => {
            let hint = "its heads cannot be moved; merge adapters and dequantise before";
            Err(config.unsupported(format!("an attention with the tensor {name}"), hint))
        }
    }
}

/// Query heads and KV heads of a layer. As transformers has it: an absent key takes the family's default, an explicit null the
/// query heads.
fn heads(config: &Config, defaults: Defaults) -> Result<(usize, usize), FileError> {
    const KEY: &str = "num_key_value_heads";
    let query_heads = config.required("num_attention_heads")?;
    let kv_heads = match config.raw().get(KEY) {
        None => defaults.kv_heads.unwrap_or(query_heads),
        Some(_) => config.count(KEY)?.unwrap_or(query_heads),
    };
    if query_heads % kv_heads != 0 {
        let expected = format!("a divisor of the {query_heads} query heads (`num_attention_heads`)");
        return Err(config.wrong(KEY, expected, kv_heads));
    }
    if kv_heads > Partition::MAX_HEADS {
        return Err(config.wrong(KEY, format!("at most {}", Partition::MAX_HEADS), kv_heads));
    }
    Ok((query_heads, kv_heads))
}

fn head_dim(config: &Config, hidden: usize, query_heads: usize) -> Result<usize, FileError> {
    let head_dim = match config.count("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden % query_heads == 0 => hidden / query_heads,
        None => {
            let expected =
                format!("a multiple of the {query_heads} query heads where `head_dim` is not given");
            return Err(config.wrong("hidden_size", expected, hidden));
        }
    };
    let fits = head_dim % 2 == 0 && query_heads.checked_mul(head_dim).is_some();
    if fits { Ok(head_dim) } else { Err(config.wrong("head_dim", "an even number of dimensions", head_dim)) }
}

/// What config.json says of rotary positions in one object: `rope_scaling`, unless that is empty, else `rope_parameters`.
fn rope_object(config: &Config) -> Option<(&'static str, &serde_json::Map<String, Value>)> {
    ["rope_scaling", "rope_parameters"].into_iter().find_map(|key| {
        let object = config.get(key)?.as_object().filter(|object| !object.is_empty())?;
        Some((key, object))
    })
}

/// A value of that object, else one at top level: as transformers 5 has it.
fn rope<'a>(config: &'a Config, key: &str) -> Option<&'a Value> {
    let nested = rope_object(config).and_then(|(_, object)| object.get(key)).filter(|v| !v.is_null());
    nested.or_else(|| config.get(key))
}

/// What is to be said where a value stands in two places and differs.
fn contradicted(config: &Config, key: &str) -> Option<String> {
    let (top, (place, _)) = (config.get(key)?, rope_object(config)?);
    let taken = rope(config, key)?;
    (taken.as_f64() != top.as_f64())
        .then(|| format!("`{key}` is {top}, but {taken} in `{place}`: the latter is used"))
}

/// Base of the rotary frequencies.
fn theta(config: &Config) -> Result<f64, FileError> {
    let Some(theta) = rope(config, "rope_theta") else { return Ok(10_000.0) };
    let number = theta.as_f64().filter(|&number| number > 0.0 && number.is_finite());
    number.ok_or_else(|| config.wrong("rope_theta", "a number above 0", theta))
}

/// The name of a layer's bias, where layers have one: all of them, or none.
fn uniform(
    config: &Config,
    tensors: &dyn TensorIndex,
    layer: usize,
    rest: String,
) -> Result<Option<String>, FileError> {
    let [first, own] = [0, layer].map(|i| format!("model.layers.{i}{rest}"));
    let found = tensors.existing(own.clone());
    if found.is_some() != tensors.shape(&first).is_some() {
        let path = config.path().parent().unwrap_or(config.path()).to_path_buf();
        return Err(FileError::UnevenBias { path, tensor: own });
    }
    Ok(found)
}

/// What the rest of the model does, or why it cannot be run.
fn forward(
    config: &Config,
    tensors: &dyn TensorIndex,
    model: &Architecture,
    defaults: Defaults,
) -> Result<Result<Forward, Unsupported>, FileError> {
    if let Some(unsupported) = unsupported(config) {
        return Ok(Err(unsupported));
    }
    let epsilon = match config.get("rms_norm_eps") {
        None => 1e-6,
        Some(value) => match value.as_f64().filter(|&e| e > 0.0 && e < 1.0) {
            // As the norm computes: in f32.
            Some(epsilon) => f64::from(epsilon as f32),
            None => return Err(config.wrong("rms_norm_eps", "between 0 and 1", value)),
        },
    };
    let block = |layer: usize| {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let linear = |part: &str| {
            let bias = tensors.existing(name(&format!("mlp.{part}_proj.bias")));
            let weight = name(&format!("mlp.{part}_proj.weight"));
            Linear::new(weight, bias.filter(|_| defaults.biases.mlp))
        };
        let norm = |part: &str| Norm::new(name(&format!("{part}.weight")), epsilon);
        let mlp = Mlp::new(linear("gate"), linear("up"), linear("down"));
        Block::new(norm("input_layernorm"), norm("post_attention_layernorm"), mlp)
    };
    let rows = tensors.shape(EMBEDDING).and_then(|shape| shape.first().copied());
    let vocabulary = config.count("vocab_size")?.or(rows).unwrap_or(0);
    let gate = tensors.shape("model.layers.0.mlp.gate_proj.weight").and_then(|shape| shape.first());
    if let (Some(given), Some(&stored)) = (config.count("intermediate_size")?, gate) {
        if given != stored {
            let expected = format!("the {stored} rows of model.layers.0.mlp.gate_proj.weight");
            return Err(config.wrong("intermediate_size", expected, given));
        }
    }
    let positions = config.count("max_position_embeddings")?.unwrap_or(defaults.positions);
    let (blocks, norm) =
        ((0..model.n_layers()).map(block).collect(), Norm::new("model.norm.weight", epsilon));
    let head = if model.tied_embeddings { EMBEDDING } else { HEAD };
    let forward = Forward::new(vocabulary, positions, EMBEDDING, blocks, norm, head);
    // Frequencies follow from the configuration; a tied output embedding may be stored twice.
    let harmless = |name: &str| {
        let computed = name.ends_with("rotary_emb.inv_freq");
        computed || name == HEAD || defaults.biases.strays(name) || is_beyond(name, model.n_layers())
    };
    let read: std::collections::BTreeSet<&str> = forward
        .tensors()
        .chain(model.layers.iter().flat_map(|layer| layer.stored.iter().flat_map(StoredHeads::tensors)))
        .collect();
    let left = tensors.names().find(|name| !read.contains(name) && !harmless(name));
    if let Some(name) = left {
        let what = if name.contains("norm") { "the norm" } else { "the tensor" };
        let hint = "the forward pass of the Llama family has no place for it; remove it where the model works without";
        return Ok(Err(Unsupported::new(format!("{what} {name}"), hint)));
    }
    Ok(Ok(forward))
}

/// What the forward pass does not compute.
fn unsupported(config: &Config) -> Option<Unsupported> {
    let activation = config.get("hidden_act").map_or("silu", |v| v.as_str().unwrap_or("?"));
    if !["silu", "swish"].contains(&activation) {
        return Some(Unsupported::new(format!("the activation {activation:?} (`hidden_act`)"), "silu is"));
    }
    // An explicit null is no yes.
    if config.raw().get("is_causal").is_some_and(|causal| causal.as_bool() != Some(true)) {
        return Some(Unsupported::new("an attention to what follows (`is_causal` is not true)", "causal is"));
    }
    for key in ["layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"] {
        if config.get(key).is_some() && config.get("rms_norm_eps").is_none() {
            return Some(Unsupported::new(
                format!("a layer norm (`{key}`)"),
                "RMS norms (`rms_norm_eps`) are",
            ));
        }
    }
    // Both name a type.
    if let Some((key, rope)) = rope_object(config) {
        let kind = rope.get("rope_type").or(rope.get("type"));
        // As transformers has it: no type is the default one, and null is none.
        let scaled =
            kind.map_or(key == "rope_scaling" && rope.contains_key("factor"), |kind| kind != "default");
        if scaled {
            let kind = kind.map_or("of no type".to_string(), Value::to_string);
            let what = format!("rope scaling {kind} (`{key}`)");
            return Some(Unsupported::new(what, "models without it are"));
        }
    }
    None
}
