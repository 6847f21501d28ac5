//! A plan: which heads share in every layer, and how that was decided. Versioned JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::shown;
use crate::{Cardinality, CostScale, Error, FrontPoint, Partition, Result};

/// A partition for every layer, with what made it.
///
/// Serialised as JSON (any serde format will do); unknown fields are refused and everything is checked on the
/// way in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Version of this format, [`Plan::VERSION`].
    pub version: u32,
    /// Version of the crate that made the plan.
    pub qcqa: String,
    /// The model it is for.
    pub source: Source,
    /// The resolved method.
    pub method: Method,
    /// Fingerprint of the calibration that the plan was made with, if any: a pooler that uses moments needs the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// Seed of the search.
    pub seed: u64,
    /// Budget asked for and reached.
    pub budget: PlanBudget,
    /// One entry a layer.
    pub layers: Vec<LayerPlan>,
}

/// The model that a plan is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The checkpoint's `model_type`; `"raw"` for tensors without a checkpoint.
    pub model_type: String,
    /// Layers, L.
    pub layers: usize,
    /// Query heads of a layer.
    pub query_heads: usize,
    /// KV heads of a layer, H.
    pub kv_heads: usize,
    /// Dimensions of a head, h.
    pub head_dim: usize,
    /// Width of the model, d.
    pub hidden: usize,
    /// Type of the stored K and V weights: `"bf16"`, `"f16"`, `"f32"`.
    pub dtype: String,
    /// Fingerprint of the K and V tensors; `None` for tensors without a checkpoint.
    pub fingerprint: Option<String>,
}

/// How a plan was decided, with every setting resolved.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Method {
    /// Name of the method: `gqa`, `mqa`, `qcqa-ec`, `qcqa-ac`, `low-rank`, or a pipeline's own.
    pub name: String,
    /// The optimizer or grouping, with its settings.
    pub search: String,
    /// The fitness function.
    pub fitness: String,
    /// Whether groups may differ in size.
    pub cardinality: Cardinality,
    /// The most groups of a layer that shares.
    pub max_groups: Option<usize>,
    /// The most heads of a group.
    pub max_group_size: Option<usize>,
    /// Layers whose number of groups was given beforehand: index → k.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub fixed: BTreeMap<usize, usize>,
    /// The allocator.
    pub allocation: String,
    /// How layers were made comparable.
    pub cost: CostScale,
    /// The pooler that `convert` uses.
    pub pooler: String,
    /// The target whose limits the search obeyed, if any.
    pub target: Option<String>,
    /// What is fitted again on the calibration text after pooling: `output` or `full`; `None` for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refit: Option<String>,
}

/// Budget asked for and reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanBudget {
    /// Fraction of the source's KV cache that was allowed.
    pub asked: f64,
    /// Fraction that the plan needs.
    pub reached: f64,
    /// KV heads of the plan, over all layers.
    pub kv_heads: usize,
}

/// The plan of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPlan {
    /// The groups, ordered by smallest head.
    pub groups: Partition,
    /// Error of this partition by the method's fitness, unscaled.
    pub error: f64,
    /// Certified lower bound on the error of any partition into as many groups.
    pub lower_bound: Option<f64>,
}

impl From<&FrontPoint> for LayerPlan {
    fn from(point: &FrontPoint) -> Self {
        Self { groups: point.partition.clone(), error: point.error, lower_bound: point.lower_bound }
    }
}

impl LayerPlan {
    /// How far the error may be above the optimum, as [`FrontPoint::gap`](crate::FrontPoint::gap).
    pub fn gap(&self) -> Option<f64> {
        crate::front::gap(self.error, self.lower_bound)
    }
}

impl Plan {
    /// The version of the format that this crate writes and reads.
    pub const VERSION: u32 = 1;

    /// Checks that the parts of the plan agree with one another.
    ///
    /// # Errors
    /// [`Error::PlanVersion`] for another version, [`Error::PlanInconsistent`] naming the first contradiction.
    pub fn check(&self) -> Result<()> {
        if self.version != Self::VERSION {
            return Err(Error::PlanVersion { found: self.version, supported: Self::VERSION });
        }
        let Source { layers, kv_heads, query_heads, .. } = self.source;
        let all = layers.checked_mul(kv_heads).unwrap_or(0);
        let says = |rule: bool, what: String| if rule { Ok(()) } else { Err(Error::PlanInconsistent(what)) };
        says(all > 0, format!("{layers} layers of {kv_heads} KV heads"))?;
        says(query_heads % kv_heads == 0, format!("{query_heads} query heads on {kv_heads} KV heads"))?;
        says(
            self.layers.len() == layers,
            format!("it has groups for {} layers, its source has {layers}", self.layers.len()),
        )?;
        for (i, layer) in self.layers.iter().enumerate() {
            let found = layer.groups.n_heads();
            says(found == kv_heads, format!("layer {i} groups {found} heads, its source has {kv_heads}"))?;
            says(
                layer.error.is_finite() && layer.error >= 0.0,
                format!("layer {i} has the error {}", layer.error),
            )?;
        }
        if let Some(calibration) = &self.calibration {
            let found = shown(calibration);
            says(
                is_fingerprint(calibration),
                format!("its calibration must be `sha256:` and 64 hex digits, found \"{found}\""),
            )?;
        }
        if let Some(refit) = &self.method.refit {
            let name = shown(refit);
            says(
                matches!(refit.as_str(), "none" | "output" | "full"),
                format!("there is no refit \"{name}\"; known are none, output, full"),
            )?;
            says(
                refit == "none" || self.calibration.is_some(),
                format!("its refit \"{name}\" runs on a calibration text, but it names no calibration"),
            )?;
        }
        let kv_heads = self.kv_heads();
        says(
            self.budget.kv_heads == kv_heads,
            format!("its budget says {} KV heads, its groups are {kv_heads}", self.budget.kv_heads),
        )
    }

    /// KV heads over all layers, as the groups say.
    pub fn kv_heads(&self) -> usize {
        self.layers.iter().map(|l| l.groups.n_groups()).sum()
    }

    /// Number of groups of every layer.
    pub fn group_counts(&self) -> Vec<usize> {
        self.layers.iter().map(|l| l.groups.n_groups()).collect()
    }

    /// Sum of the layers' errors, unscaled.
    pub fn error(&self) -> f64 {
        self.layers.iter().map(|l| l.error).sum()
    }
}

/// Whether this is a fingerprint, `sha256:` and 64 hex digits.
fn is_fingerprint(text: &str) -> bool {
    let digits = text.strip_prefix("sha256:").unwrap_or_default();
    digits.len() == 64 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}
