//! What config.json says where a model has other numbers of heads than it was made with.

use serde_json::{Map, Value, json};

use super::decoder::Decoder;
use crate::error::{Error, Result};
use crate::files::FileError;
use crate::model::{Architecture, AttentionSpec, Stretch};
use crate::partition::Partition;

type Object = Map<String, Value>;

/// The key under which layers are described one by one: query heads and KV heads of each.
pub(super) const BY_LAYER: &str = "qcqa_heads";

/// The key under which layers that read the one below are described: for each layer nothing, or the heads of the layer below that its KV
/// heads are.
pub(super) const BELOW: &str = "qcqa_below";

/// Which numbers of query heads a type of models takes, where `head_dim` is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// Any.
    Any,
    /// Those that divide the width of the model.
    Divisors,
    /// Those that divide it; others as a Mistral, which computes the same where there are no biases.
    DivisorsElseMistral,
    /// Any in a layer, that of the model alone in the whole: config.json is held to the latter.
    Layers,
    /// That of the model alone, as the width of a head is that of the model over it.
    Own,
}

/// Types of models that take other numbers of query heads, with the class of transformers that runs them. Each was held against
/// transformers (`tests/interop`).
const TYPES: &[(&str, &str, Takes)] = &[
    ("llama", "LlamaForCausalLM", Takes::DivisorsElseMistral),
    ("mistral", "MistralForCausalLM", Takes::Any),
    ("qwen2", "Qwen2ForCausalLM", Takes::Any),
    ("qwen3", "Qwen3ForCausalLM", Takes::Any),
    ("qwen3_moe", "Qwen3MoeForCausalLM", Takes::Any),
    ("mixtral", "MixtralForCausalLM", Takes::Any),
    ("smollm3", "SmolLM3ForCausalLM", Takes::Any),
    ("olmo2", "Olmo2ForCausalLM", Takes::Any),
    ("olmo3", "Olmo3ForCausalLM", Takes::Any),
    ("gemma", "GemmaForCausalLM", Takes::Any),
    ("gemma2", "Gemma2ForCausalLM", Takes::Divisors),
    ("gemma3_text", "Gemma3ForCausalLM", Takes::Divisors),
    ("granite", "GraniteForCausalLM", Takes::Any),
    ("starcoder2", "Starcoder2ForCausalLM", Takes::Any),
    ("nemotron", "NemotronForCausalLM", Takes::Any),
    ("cohere", "CohereForCausalLM", Takes::Any),
    ("cohere2", "Cohere2ForCausalLM", Takes::Any),
    ("glm", "GlmForCausalLM", Takes::Any),
    ("glm4", "Glm4ForCausalLM", Takes::Any),
    ("exaone4", "Exaone4ForCausalLM", Takes::Any),
    ("arcee", "ArceeForCausalLM", Takes::Divisors),
    ("seed_oss", "SeedOssForCausalLM", Takes::Any),
    ("ernie4_5", "Ernie4_5ForCausalLM", Takes::Any),
    ("phi", "PhiForCausalLM", Takes::Any),
    ("phi3", "Phi3ForCausalLM", Takes::Any),
    ("stablelm", "StableLmForCausalLM", Takes::Own),
];

/// Models of these types that take less: of which layers that is so.
type Differs = fn(&AttentionSpec) -> bool;
const LESS: &[(&str, Differs, Takes)] = &[
    // The width of its norms of queries and keys is that of the model over the query heads.
    ("phi", |layer| layer.norms[0].is_some(), Takes::Own),
    // The factors of LongRoPE must be half as many as that, turned in part.
    (
        "phi3",
        |layer| layer.rotary.as_ref().is_some_and(|rotary| rotary.stretch != Stretch::Fixed),
        Takes::Layers,
    ),
];

/// Whether a model may be written with other numbers of query heads than its own, all layers with one number.
pub fn takes_queries(model: &Architecture) -> bool {
    takes(model).is_some_and(|(_, takes)| !matches!(takes, Takes::Layers | Takes::Own))
}

/// Whether the layers of a model may be written with other numbers of query heads than its own, each with its number.
pub fn takes_queries_by_layer(model: &Architecture) -> bool {
    takes(model).is_some_and(|(_, takes)| takes != Takes::Own)
}

/// config.json of a model of which all layers have so many query heads and KV heads.
///
/// # Errors
/// [`Error::NoGroupedForm`]; [`Error::NoForm`] for another number of query heads where the type does not take it.
pub fn with_heads(
    model: &Architecture,
    config: &Object,
    query_heads: usize,
    kv_heads: usize,
) -> Result<Object> {
    let place = grouped(model)?;
    let own =
        config.get(BY_LAYER).is_none() && model.layers.iter().all(|layer| layer.query_heads == query_heads);
    let mut config = config.clone();
    let (objects, key) = place.rsplit_once('/').unwrap_or_default();
    let object = objects
        .split('/')
        .skip(1)
        .try_fold(&mut config, |object, key| object.get_mut(key).and_then(Value::as_object_mut));
    if let Some(object) = object {
        object.insert(key.to_string(), kv_heads.into());
    }
    if own {
        return Ok(config);
    }
    let (class, takes) = known(model, place)?;
    let as_made = config.get("num_attention_heads").is_some_and(|made| *made == query_heads);
    if matches!(takes, Takes::Layers | Takes::Own) && !as_made {
        return Err(not_taken(model, query_heads));
    }
    set(&mut config, "num_attention_heads", query_heads.into());
    set(&mut config, "head_dim", width(model).into());
    if config.shift_remove(BY_LAYER).is_some() {
        config.shift_remove("auto_map");
    }
    set(&mut config, "architectures", json!([class]));
    if takes == Takes::Any || model.hidden % query_heads == 0 {
        return Ok(config);
    }
    if takes == Takes::Divisors {
        let reason = format!(
            "their query heads must divide the width of {}, and {query_heads} do not; other groups or another target may",
            model.hidden
        );
        return Err(Error::NoForm { model: model.model_type.clone(), reason });
    }
    as_mistral(model, config)
}

/// config.json of a model of which the layers have these query heads and KV heads, those of the layer below where there are any in
/// `below`, and the name of the class that runs layers of its type where all are alike.
///
/// # Errors
/// [`Error::NoGroupedForm`]; [`Error::NoForm`] for a type that is not known, or other numbers of query heads where it does not take them.
pub fn by_layer(
    model: &Architecture,
    config: &Object,
    heads: &[[usize; 2]],
    below: &[Option<&[usize]>],
) -> Result<(Object, &'static str)> {
    let (class, takes) = known(model, grouped(model)?)?;
    let changed = heads.iter().zip(&model.layers).find(|([queries, _], layer)| *queries != layer.query_heads);
    if let Some(([queries, _], _)) = changed.filter(|_| takes == Takes::Own) {
        return Err(not_taken(model, *queries));
    }
    let mut config = config.clone();
    set(&mut config, "head_dim", width(model).into());
    set(&mut config, BY_LAYER, json!(heads));
    if below.iter().any(Option::is_some) {
        set(&mut config, BELOW, json!(below));
    }
    Ok((config, class))
}

/// Where config.json has the number of KV heads.
fn grouped(model: &Architecture) -> Result<&str> {
    let none = || Error::NoGroupedForm { model: model.model_type.clone() };
    model.kv_heads_at.as_deref().ok_or_else(none)
}

/// The class of a model, and what numbers of query heads it takes; `None` where that is not known.
fn takes(model: &Architecture) -> Option<(&'static str, Takes)> {
    let own = |model_type: &str| model_type == model.model_type;
    let (_, class, takes) = *TYPES.iter().find(|(model_type, ..)| own(model_type))?;
    let less =
        LESS.iter().find(|(model_type, differs, _)| own(model_type) && model.layers.iter().any(differs));
    Some((class, less.map_or(takes, |(.., less)| *less)))
}

/// As [`takes`], of models whose number of KV heads config.json has in this place.
fn known(model: &Architecture, place: &str) -> Result<(&'static str, Takes)> {
    match takes(model).filter(|_| place == "/num_key_value_heads") {
        Some(known) => Ok(known),
        None => {
            let known: Vec<_> = TYPES.iter().map(|(model_type, ..)| *model_type).collect();
            let reason = format!("other numbers of query heads are known to fit {}", known.join(", "));
            Err(Error::NoForm { model: model.model_type.clone(), reason })
        }
    }
}

/// That a model keeps its own number of query heads.
fn not_taken(model: &Architecture, query_heads: usize) -> Error {
    let reason = format!(
        "the width of their heads, or what must fit it, is read from their number of query heads, so that this cannot become \
         {query_heads}; groups of one size ask for no other"
    );
    Error::NoForm { model: model.model_type.clone(), reason }
}

/// Dimensions of a head.
fn width(model: &Architecture) -> usize {
    model.layers.first().map_or(0, |layer| layer.head_dim)
}

fn set(config: &mut Object, key: &str, value: Value) {
    config.insert(key.to_string(), value);
}

/// The configuration of a Llama as that of a Mistral without windows. What a Llama takes for granted is spelled out, rotary positions
/// as transformers 4 and 5 have them.
fn as_mistral(model: &Architecture, mut config: Object) -> Result<Object> {
    for key in ["attention_bias", "mlp_bias"] {
        if config.get(key).is_some_and(|value| *value != false && !value.is_null()) {
            let reason = format!(
                "their query heads must divide the width of {}, and as a \"mistral\", which takes others, they would lose their biases (`{key}`)",
                model.hidden
            );
            return Err(Error::NoForm { model: model.model_type.clone(), reason });
        }
    }
    set(&mut config, "model_type", "mistral".into());
    set(&mut config, "architectures", json!(["MistralForCausalLM"]));
    set(&mut config, "sliding_window", Value::Null);
    for (key, value) in [
        ("max_position_embeddings", json!(2048)),
        ("rms_norm_eps", json!(1e-6)),
        ("intermediate_size", json!(11008)),
    ] {
        config.entry(key).or_insert(value);
    }
    let object = |config: &Object, key: &str| {
        let found = config.get(key).and_then(Value::as_object).filter(|object| !object.is_empty());
        found.cloned()
    };
    let mut rope =
        object(&config, "rope_scaling").or_else(|| object(&config, "rope_parameters")).unwrap_or_default();
    let given = |value: Option<&Value>| value.filter(|value| !value.is_null()).cloned();
    let theta = given(rope.get("rope_theta")).or_else(|| given(config.get("rope_theta")));
    let theta = theta.unwrap_or_else(|| json!(10_000.0));
    let kind =
        given(rope.get("rope_type")).or_else(|| given(rope.get("type"))).unwrap_or_else(|| "default".into());
    set(&mut rope, "rope_type", kind.clone());
    rope.shift_remove("rope_theta");
    if kind != "default" {
        set(&mut config, "rope_scaling", rope.clone().into());
    }
    set(&mut rope, "rope_theta", theta.clone());
    set(&mut config, "rope_parameters", rope.into());
    set(&mut config, "rope_theta", theta);
    Ok(config)
}

impl Decoder<'_> {
    /// The heads of the layer below that the KV heads of each layer are, where it has none of its own; `heads` are those of the layers.
    pub(super) fn below_by_layer(
        &self,
        heads: Option<&[[usize; 2]]>,
    ) -> Result<Vec<Option<Vec<usize>>>, FileError> {
        let Some(value) = self.config.get(BELOW) else { return Ok(Vec::new()) };
        let all: Option<Vec<Option<Vec<usize>>>> = serde_json::from_value(value.clone()).ok();
        let fits = |all: &Vec<Option<Vec<usize>>>| {
            let heads = heads.unwrap_or_default();
            let fits = |(layer, below): (usize, &Option<Vec<usize>>)| match below {
                None => true,
                Some(below) => {
                    let lower = layer.checked_sub(1).filter(|&lower| all[lower].is_none());
                    let most = lower.map_or(0, |lower| heads[lower][1]);
                    below.len() == heads[layer][1] && below.iter().all(|&head| head < most)
                }
            };
            all.len() == heads.len() && all.iter().enumerate().all(fits)
        };
        all.filter(fits).ok_or_else(|| {
            let expected = format!(
                "for each layer null or, as many as its KV heads in `{BY_LAYER}`, heads of the layer below, which has keys and values"
            );
            self.config.wrong(BELOW, expected, value)
        })
    }

    /// Query heads and KV heads of each layer, where config.json has them one by one.
    pub(super) fn heads_by_layer(
        &self,
        layers: usize,
        head_dim: usize,
    ) -> Result<Option<Vec<[usize; 2]>>, FileError> {
        let Some(value) = self.config.get(BY_LAYER) else { return Ok(None) };
        let fits = |&[queries, kv]: &[usize; 2]| {
            let all = queries.checked_mul(3).and_then(|heads| heads.checked_mul(head_dim));
            (1..=Partition::MAX_HEADS).contains(&kv) && queries > 0 && queries % kv == 0 && all.is_some()
        };
        let pair = |pair: &Value| {
            let numbers = pair.as_array()?.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok()));
            <[usize; 2]>::try_from(numbers.collect::<Option<Vec<_>>>()?).ok().filter(fits)
        };
        let all = value.as_array().filter(|list| list.len() == layers);
        let all = all.and_then(|list| list.iter().map(pair).collect::<Option<Vec<_>>>());
        let expected = || {
            format!(
                "for each of {layers} layers its query heads and its KV heads, at most {}, which divide them",
                Partition::MAX_HEADS
            )
        };
        all.map(Some).ok_or_else(|| self.config.wrong(BY_LAYER, expected(), value))
    }
}
