use serde::{Deserialize, Serialize};

use super::{Architecture, AttentionSpec};
use crate::error::{Error, Result, shown};

/// The model that a plan is for: its shape, and a fingerprint of its keys and values.
///
/// Serialised with one number where all layers are alike (`"kv_heads": 8`), else with a list (`"kv_heads": [8, 4]`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Flat", into = "Flat")]
#[non_exhaustive]
pub struct ModelId {
    /// The checkpoint's `model_type`; `"raw"` for tensors without a checkpoint.
    pub model_type: String,
    /// Heads of every layer.
    pub layers: Vec<LayerShape>,
    /// Width of the model, d.
    pub hidden: usize,
    /// Type of the stored K and V weights: `"bf16"`, `"f16"`, `"f32"`.
    pub dtype: String,
    /// Fingerprint of the K and V tensors; `None` for tensors without a checkpoint.
    pub fingerprint: Option<String>,
}

/// How many heads a layer has, and of how many dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerShape {
    /// Query heads.
    pub query_heads: usize,
    /// KV heads, H.
    pub kv_heads: usize,
    /// Dimensions of a head, h.
    pub head_dim: usize,
}

impl From<&AttentionSpec> for LayerShape {
    fn from(layer: &AttentionSpec) -> Self {
        let AttentionSpec { query_heads, kv_heads, head_dim, .. } = *layer;
        Self { query_heads, kv_heads, head_dim }
    }
}

impl ModelId {
    /// A model of this architecture, whose keys and values are stored as `dtype`.
    pub fn new(model: &Architecture, dtype: impl Into<String>, fingerprint: Option<String>) -> Self {
        let (model_type, layers) =
            (model.model_type.clone(), model.layers.iter().map(LayerShape::from).collect());
        Self { model_type, layers, hidden: model.hidden, dtype: dtype.into(), fingerprint }
    }

    /// KV heads over all layers.
    pub fn kv_heads(&self) -> usize {
        self.layers.iter().map(|layer| layer.kv_heads).sum()
    }

    /// Checks that `found` is this model.
    ///
    /// # Errors
    /// [`Error::PlanSource`] naming the first thing that differs.
    pub fn check_same(&self, found: &Self) -> Result<()> {
        let print = |id: &Self| id.fingerprint.as_deref().map_or("none".to_string(), shown);
        let heads = |id: &Self, of: fn(&LayerShape) -> usize| list(id.layers.iter().map(of).collect());
        let both = |of: &dyn Fn(&Self) -> String| (of(self), of(found));
        let fields = [
            ("model_type", both(&|id| shown(&id.model_type))),
            ("number of layers", both(&|id| id.layers.len().to_string())),
            ("number of query heads", both(&|id| heads(id, |l| l.query_heads))),
            ("number of KV heads", both(&|id| heads(id, |l| l.kv_heads))),
            ("head_dim", both(&|id| heads(id, |l| l.head_dim))),
            ("hidden size", both(&|id| id.hidden.to_string())),
            ("dtype", both(&|id| shown(&id.dtype))),
            ("fingerprint of keys and values", both(&print)),
        ];
        match fields.into_iter().find(|(_, (expected, found))| expected != found) {
            None => Ok(()),
            Some((field, (expected, found))) => Err(Error::PlanSource { field, expected, found }),
        }
    }
}

/// One number for all layers, or all of them.
fn list(numbers: Vec<usize>) -> String {
    match PerLayer::from(numbers) {
        PerLayer::Same(n) => n.to_string(),
        PerLayer::Each(all) => format!("{all:?}"),
    }
}

/// One number for all layers where they agree.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum PerLayer {
    Same(usize),
    Each(Vec<usize>),
}

impl From<Vec<usize>> for PerLayer {
    fn from(all: Vec<usize>) -> Self {
        match all.first() {
            Some(&first) if all.iter().all(|&n| n == first) => Self::Same(first),
            _ => Self::Each(all),
        }
    }
}

impl PerLayer {
    fn at(&self, layer: usize) -> Option<usize> {
        match self {
            Self::Same(n) => Some(*n),
            Self::Each(all) => all.get(layer).copied(),
        }
    }

    fn misses(&self, layers: usize) -> bool {
        matches!(self, Self::Each(all) if all.len() != layers)
    }
}

/// A model as plans write it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Flat {
    model_type: String,
    layers: usize,
    query_heads: PerLayer,
    kv_heads: PerLayer,
    head_dim: PerLayer,
    hidden: usize,
    dtype: String,
    fingerprint: Option<String>,
}

/// The most layers that a plan may claim before it lists them.
const MOST_LAYERS: usize = 1 << 16;

impl TryFrom<Flat> for ModelId {
    type Error = Error;

    fn try_from(flat: Flat) -> Result<Self> {
        let Flat { model_type, layers: n, query_heads, kv_heads, head_dim, hidden, dtype, fingerprint } =
            flat;
        if n > MOST_LAYERS || [&query_heads, &kv_heads, &head_dim].iter().any(|per_layer| per_layer.misses(n))
        {
            let rule = format!("its source has {n} layers, but not one number of heads for each of them");
            return Err(Error::PlanInconsistent(rule));
        }
        let shape = |i| {
            let (query_heads, kv_heads, head_dim) = (query_heads.at(i)?, kv_heads.at(i)?, head_dim.at(i)?);
            Some(LayerShape { query_heads, kv_heads, head_dim })
        };
        Ok(Self { model_type, layers: (0..n).filter_map(shape).collect(), hidden, dtype, fingerprint })
    }
}

impl From<ModelId> for Flat {
    fn from(id: ModelId) -> Self {
        let each = |of: fn(&LayerShape) -> usize| id.layers.iter().map(of).collect::<Vec<_>>().into();
        Self {
            layers: id.layers.len(),
            query_heads: each(|l| l.query_heads),
            kv_heads: each(|l| l.kv_heads),
            head_dim: each(|l| l.head_dim),
            model_type: id.model_type,
            hidden: id.hidden,
            dtype: id.dtype,
            fingerprint: id.fingerprint,
        }
    }
}
