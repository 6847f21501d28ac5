//! Rotary positions as config.json has them, in the spellings of transformers 4 and 5.

use serde_json::{Map, Value};

use crate::checkpoint::Config;
use crate::files::FileError;
use crate::model::{Architecture, AttentionSpec, Rotary, Rotation, Stretch, Unsupported};

/// What a family says of rotary positions where config.json does not.
#[derive(Debug, Clone, Copy)]
pub(super) struct RopeRule {
    /// Base of the frequencies.
    pub(super) theta: f64,
    /// Its key at top level.
    pub(super) theta_key: &'static str,
    /// Share of a head's dimensions that turn.
    pub(super) partial: f64,
    /// Key of that share at top level; `None` where all of them always turn.
    pub(super) partial_key: Option<&'static str>,
    /// Dimensions that turn, by the usual frequencies, whatever else config.json says.
    pub(super) fixed: Option<usize>,
    /// Which of so many dimensions turn together.
    pub(super) pairs: fn(usize) -> Rotation,
    /// Tokens that a model has positions for.
    pub(super) positions: usize,
    /// Tokens that it was first trained on, where that is not in config.json.
    pub(super) original: Option<usize>,
    /// Whether "yarn" is another name of "longrope".
    pub(super) yarn_is_longrope: bool,
    /// A kind of layers that turn by the usual frequencies of this base unless config.json has an object for them.
    pub(super) of_kind: Option<(&'static str, f64)>,
}

/// Dimension f turns with f + dims/2.
pub(super) fn half_split(dims: usize) -> Rotation {
    Rotation::HalfSplit { dims }
}

/// Dimension 2f turns with 2f + 1.
pub(super) fn interleaved(dims: usize) -> Rotation {
    Rotation::Interleaved { dims }
}

type Object = Map<String, Value>;

/// What config.json says of rotary positions in one object: `rope_scaling`, unless that is empty, else `rope_parameters`; of
/// layers of a kind where it has an object for each. One `rope_parameters` for all is nobody's where layers are of kinds.
fn object<'a>(config: &'a Config, kind: Option<&str>) -> Option<(&'static str, &'a Object)> {
    ["rope_scaling", "rope_parameters"].into_iter().find_map(|key| {
        let object = config.get(key)?.as_object().filter(|object| !object.is_empty())?;
        let own = kind.and_then(|kind| object.get(kind)).and_then(Value::as_object);
        let shared = if kind.is_some() && key == "rope_parameters" { None } else { Some(object) };
        Some((key, own.or(shared)?))
    })
}

/// A value of that object, else one at top level under its key there: as transformers 5 has it.
fn value<'a>(config: &'a Config, kind: Option<&str>, key: &str, top: &str) -> Option<&'a Value> {
    let nested = object(config, kind).and_then(|(_, object)| object.get(key)).filter(|v| !v.is_null());
    nested.or_else(|| config.get(top))
}

/// What is to be said where a value stands in two places and differs.
pub(super) fn contradicted(config: &Config, key: &str) -> Option<String> {
    let (top, (place, _)) = (config.get(key)?, object(config, None)?);
    let taken = value(config, None, key, key)?;
    (taken.as_f64() != top.as_f64())
        .then(|| format!("`{key}` is {top}, but {taken} in `{place}`: the latter is used"))
}

/// Whether config.json has an object for layers of a kind.
fn by_kind(config: &Config, kind: &str) -> bool {
    let objects = ["rope_scaling", "rope_parameters"].into_iter().filter_map(|key| config.get(key));
    objects.filter_map(Value::as_object).any(|object| object.get(kind).is_some_and(Value::is_object))
}

/// How positions turn heads of `head_dim` in layers of a kind, or why that cannot be run.
pub(super) fn rotary(
    config: &Config,
    head_dim: usize,
    kind: Option<&str>,
    rule: RopeRule,
) -> Result<(Rotary, Option<Unsupported>), FileError> {
    if let Some(dims) = rule.fixed {
        return Ok((Rotary::from_theta((rule.pairs)(dims), rule.theta), None));
    }
    let number_at = |key: &'static str, top: &'static str| -> Result<Option<f64>, FileError> {
        let Some(value) = value(config, kind, key, top) else { return Ok(None) };
        let number = value.as_f64().filter(|n| *n > 0.0 && n.is_finite());
        number.map(Some).ok_or_else(|| config.wrong(key, "a number above 0", value))
    };
    let number = |key: &'static str| number_at(key, key);
    let needed = |key: &'static str| number(key)?.ok_or_else(|| config.missing(key));
    let theta = number_at("rope_theta", rule.theta_key)?.unwrap_or(rule.theta);
    const PARTIAL: &str = "partial_rotary_factor";
    let partial = match (number_at(PARTIAL, rule.partial_key.unwrap_or(PARTIAL))?, rule.partial_key) {
        (Some(partial), Some(_)) => partial,
        (None, Some(_)) => rule.partial,
        (None | Some(1.0), None) => 1.0,
        (Some(factor), None) => {
            let what = format!("a partial rotation (`{PARTIAL}` {factor})");
            return Err(config.unsupported(what, "all dimensions of a head turn in models of this type"));
        }
    };
    let dims = (head_dim as f64 * partial) as usize;
    if dims == 0 || dims % 2 != 0 || dims > head_dim {
        let expected = format!("a share that leaves an even number of the {head_dim} dimensions of a head");
        return Err(config.wrong(PARTIAL, expected, partial));
    }
    let rotation = (rule.pairs)(dims);
    if let (Some(kind), Some((apart, theta))) = (kind, rule.of_kind) {
        if kind == apart && !by_kind(config, kind) {
            return Ok((Rotary::from_theta(rotation, theta), None));
        }
    }
    let plain = Rotary::from_theta(rotation, theta);
    let Some((place, of)) = object(config, kind) else { return Ok((plain, None)) };
    let given = of.get("rope_type").or(of.get("type"));
    let named = given.map(|given| given.as_str().unwrap_or("?"));
    let positions = config.count("max_position_embeddings")?.unwrap_or(rule.positions) as f64;
    let original = || -> Result<f64, FileError> {
        const KEY: &str = "original_max_position_embeddings";
        let top = config.count(KEY)?.or(rule.original).map(|n| n as f64);
        Ok(top.or(number(KEY)?).unwrap_or(positions))
    };
    let changed = |change: &dyn Fn(f64, usize) -> f64| {
        let each = plain.frequencies.iter().enumerate();
        Rotary::new(rotation, each.map(|(f, &own)| change(f64::from(own), f) as f32).collect())
    };
    if value(config, kind, "llama_4_scaling_beta", "").is_some_and(|beta| beta.as_f64() != Some(0.0)) {
        let what = format!("queries that grow with their position (`llama_4_scaling_beta` in `{place}`)");
        return Ok((plain, Some(Unsupported::new(what, "models without it are"))));
    }
    let named = if rule.yarn_is_longrope && named == Some("yarn") { Some("longrope") } else { named };
    let rotary = match named {
        // Whoever wrote a factor meant something by it.
        None if place == "rope_scaling" && of.contains_key("factor") => {
            let what = "rope scaling of no type (`rope_scaling`)";
            return Ok((plain, Some(Unsupported::new(what, "give its `rope_type`"))));
        }
        None | Some("default" | "mrope") => plain,
        Some("linear") => {
            let factor = needed("factor")?;
            changed(&|own, _| own / factor)
        }
        Some("dynamic") => {
            let (factor, tokens) = (needed("factor")?, positions as usize);
            plain.with_stretch(Stretch::Dynamic { theta, factor, tokens })
        }
        Some("llama3") => {
            let [factor, low, high] =
                [needed("factor")?, needed("low_freq_factor")?, needed("high_freq_factor")?];
            let original = original()?;
            changed(&|own, _| {
                let waves = original * own / std::f64::consts::TAU;
                let share = ((waves - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 - share) * own / factor + share * own
            })
        }
        Some("yarn") => {
            // Of layers of kinds, transformers looks for it around their objects.
            let around =
                config.get(place).and_then(Value::as_object).filter(|_| kind.is_some()).unwrap_or(of);
            let (original, truncate) = (original()?, around.get("truncate").and_then(Value::as_bool));
            let factor = number("factor")?.unwrap_or(positions / original);
            let (fast, slow) = (number("beta_fast")?.unwrap_or(32.0), number("beta_slow")?.unwrap_or(1.0));
            // The pair that turns so often within the original length.
            let pair = |turns: f64| {
                dims as f64 * (original / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
            };
            let (low, high) = match truncate {
                Some(false) => (pair(fast), pair(slow)),
                _ => (pair(fast).floor(), pair(slow).ceil()),
            };
            let (low, mut high) = (low.max(0.0), high.min(dims as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
            let attention = match (number("attention_factor")?, number("mscale")?, number("mscale_all_dim")?)
            {
                (Some(given), ..) => given,
                (None, Some(own), Some(all)) => scale(own) / scale(all),
                _ => scale(1.0),
            };
            let stretched = changed(&|own, f| {
                let share = ((f as f64 - low) / (high - low)).clamp(0.0, 1.0);
                share * own / factor + (1.0 - share) * own
            });
            stretched.with_factor(attention)
        }
        Some("longrope" | "su") => {
            let original = original()?;
            let factor = number("factor")?.unwrap_or(positions / original);
            let attention = match number("attention_factor")? {
                Some(given) => given,
                None if factor <= 1.0 => 1.0,
                None if original <= 1.0 => {
                    return Err(config.wrong("original_max_position_embeddings", "more than 1", original));
                }
                None => (1.0 + factor.ln() / original.ln()).sqrt(),
            };
            let factors = |key: &'static str| -> Result<Vec<f64>, FileError> {
                let list = of.get(key).ok_or_else(|| config.missing(key))?;
                let all = list.as_array().map(|all| all.iter().filter_map(Value::as_f64).collect::<Vec<_>>());
                let expected = || format!("{} numbers above 0", dims / 2);
                let fits = |all: &Vec<f64>| all.len() == dims / 2 && all.iter().all(|&n| n > 0.0);
                all.filter(fits).ok_or_else(|| config.wrong(key, expected(), list))
            };
            let (short, long) = (factors("short_factor")?, factors("long_factor")?);
            let short = changed(&|own, f| own / short[f]).with_factor(attention);
            let frequencies = changed(&|own, f| own / long[f]).frequencies;
            short.with_stretch(Stretch::Beyond { tokens: original as usize, frequencies })
        }
        Some(_) => {
            let what = format!("rope scaling {} (`{place}`)", given.unwrap_or(&Value::Null));
            let hint = "linear, dynamic, llama3, yarn and longrope are";
            return Ok((plain, Some(Unsupported::new(what, hint))));
        }
    };
    Ok((rotary, None))
}

/// How many positions a model has whose frequencies grow with the text.
pub(super) fn stretched(positions: usize, model: &Architecture) -> usize {
    let of = |spec: &AttentionSpec| match spec.rotary.as_ref().map(|rotary| &rotary.stretch) {
        Some(Stretch::Dynamic { factor, .. }) => ((positions as f64 * factor) as usize).max(positions),
        _ => positions,
    };
    model.layers.iter().map(of).max().unwrap_or(positions)
}
