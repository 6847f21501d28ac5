//! Layers that differ from one another.

use serde_json::Value;

use super::names::LayerKinds;
use crate::checkpoint::{Config, TensorIndex};
use crate::files::FileError;

/// The window of the layers that have one: `otherwise` unless config.json says another, none where that is null.
pub(super) fn window(config: &Config, otherwise: usize) -> Result<Option<usize>, FileError> {
    const KEY: &str = "sliding_window";
    match config.raw().get(KEY) {
        Some(value) if value.is_null() => Ok(None),
        _ => Ok(Some(config.count(KEY)?.unwrap_or(otherwise))),
    }
}

/// Layers of which some look back only so far: those that `layer_types` says, else those of which `otherwise` is true.
pub(super) fn windows(
    config: &Config,
    tensors: &dyn TensorIndex,
    window: Option<usize>,
    otherwise: impl Fn(usize) -> bool,
) -> Result<LayerKinds, FileError> {
    let sliding = sliding(config, tensors, otherwise)?;
    if window.is_none() && config.get("layer_types").is_some() && sliding.contains(&true) {
        const KEY: &str = "sliding_window";
        let expected =
            "a number of tokens, and used (`use_sliding_window`), where `layer_types` has sliding layers";
        let found = config.raw().get(KEY).unwrap_or(&Value::Null);
        return Err(config.wrong(KEY, expected, found));
    }
    let windows = sliding.into_iter().map(|slides| window.filter(|_| slides)).collect();
    Ok(LayerKinds { windows, ..LayerKinds::default() })
}

/// Layers of which all look back only so far, if any does.
pub(super) fn same_window(
    config: &Config,
    tensors: &dyn TensorIndex,
    window: Option<usize>,
) -> Result<LayerKinds, FileError> {
    let windows = vec![window; layers(config, tensors)?];
    Ok(LayerKinds { windows, ..LayerKinds::default() })
}

/// However many layers config.json claims, no more than there are tensors.
fn layers(config: &Config, tensors: &dyn TensorIndex) -> Result<usize, FileError> {
    Ok(config.required("num_hidden_layers")?.min(tensors.names().count()))
}

/// Whether each layer slides.
pub(super) fn sliding(
    config: &Config,
    tensors: &dyn TensorIndex,
    otherwise: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, FileError> {
    const KEY: &str = "layer_types";
    let layers = layers(config, tensors)?;
    let Some(types) = config.get(KEY) else { return Ok((0..layers).map(otherwise).collect()) };
    let kind = |kind: &Value| match kind.as_str() {
        Some("full_attention") => Ok(false),
        Some("sliding_attention") => Ok(true),
        Some(other) => {
            let what = format!("layers of the type {other:?} (`{KEY}`)");
            Err(config.unsupported(what, "full_attention and sliding_attention are"))
        }
        None => Err(config.wrong(KEY, "a list of names", types)),
    };
    let named = config.required("num_hidden_layers")?;
    let kinds = types.as_array().filter(|list| list.len() == named);
    let kinds =
        kinds.ok_or_else(|| config.wrong(KEY, format!("a name for each of {named} layers"), types))?;
    kinds.iter().map(kind).take(layers).collect()
}

impl LayerKinds {
    /// Says that sliding layers and others turn by frequencies of their own.
    pub(super) fn ropes_by_kind(
        &mut self,
        config: &Config,
        tensors: &dyn TensorIndex,
        otherwise: impl Fn(usize) -> bool,
    ) -> Result<(), FileError> {
        let sliding = sliding(config, tensors, otherwise)?;
        let kind = |slides| if slides { "sliding_attention" } else { "full_attention" };
        self.ropes = sliding.into_iter().map(kind).collect();
        Ok(())
    }
}
