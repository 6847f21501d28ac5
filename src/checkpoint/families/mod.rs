//! Where each family of models keeps its attention tensors. A new family is a file with one constant here, and
//! its line in [`ALL`].

mod llama;
mod mistral;
mod qwen2;

/// The four projections of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// (H·r·h, d).
    Query,
    /// (H·h, d).
    Key,
    /// (H·h, d).
    Value,
    /// (d, H·r·h).
    Output,
}

impl Part {
    pub(super) const ALL: [Self; 4] = [Self::Query, Self::Key, Self::Value, Self::Output];
}

/// A layout of checkpoints.
#[derive(Debug)]
pub(super) struct Family {
    /// `model_type` in config.json.
    pub(super) model_type: &'static str,
    /// KV heads where config.json has no `num_key_value_heads`, given the query heads.
    pub(super) default_kv_heads: fn(usize) -> usize,
    /// What stands before the number of the layer.
    before_layer: &'static str,
    /// What follows the number: the module of query, key, value and output, in the order of [`Part`].
    modules: [&'static str; 4],
}

const ALL: &[&Family] = &[&llama::LLAMA, &mistral::MISTRAL, &qwen2::QWEN2];

impl Family {
    pub(super) fn of(model_type: &str) -> Option<&'static Self> {
        ALL.iter().copied().find(|f| f.model_type == model_type)
    }

    /// The supported model types, for people.
    pub(super) fn names() -> String {
        ALL.iter().map(|f| f.model_type).collect::<Vec<_>>().join(", ")
    }

    /// Name of the weight of a projection.
    pub(super) fn weight(&self, layer: usize, part: Part) -> String {
        self.name(layer, part, "weight")
    }

    /// Name of the bias of a projection.
    pub(super) fn bias(&self, layer: usize, part: Part) -> String {
        self.name(layer, part, "bias")
    }

    fn name(&self, layer: usize, part: Part, kind: &str) -> String {
        format!("{}{layer}{}.{kind}", self.before_layer, self.modules[part as usize])
    }
}
