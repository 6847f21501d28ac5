//! A plan: which heads share in every layer, how that was decided, and how their shared heads come about. Versioned JSON.

mod below;
#[cfg(feature = "checkpoint")]
mod file;
mod method;
#[cfg(feature = "checkpoint")]
mod migrate;
mod shared;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result, shown};
use crate::front::{self, FrontPoint};
use crate::model::ModelId;
use crate::partition::Partition;
use crate::spec::Spec;

pub use below::Below;
#[cfg(feature = "runtime")]
pub(crate) use below::Sharing;
#[cfg(feature = "checkpoint")]
pub(crate) use file::{PLAN_LIMIT, parse_plan};
#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub use file::{read_plan, write_plan};
pub use method::Method;
#[cfg(feature = "runtime")]
pub(crate) use shared::Layers;
#[cfg(feature = "checkpoint")]
pub(crate) use shared::Others;
pub use shared::SharedHeads;

/// A partition for every layer, with what made it and what makes shared heads of it.
///
/// Serialised as JSON (any serde format will do); unknown fields are refused, and [`Plan::check`] finds contradictions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Plan {
    /// Version of this format, [`Plan::VERSION`].
    pub version: u32,
    /// Version of the crate that made the plan.
    pub qcqa: String,
    /// The model it is for.
    pub source: ModelId,
    /// How the groups were decided.
    pub method: Method,
    /// How the heads of a group become one: what conversion and runtime obey.
    pub pooling: Pooling,
    /// Seed of the search.
    pub seed: u64,
    /// Budget asked for and reached.
    pub budget: PlanBudget,
    /// One entry a layer.
    pub layers: Vec<LayerPlan>,
}

/// What makes the shared heads of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Pooling {
    /// The pooler.
    pub pooler: Spec,
    /// Fingerprint of the calibration under whose moments it works; `None` for weights alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// What is fitted again on the calibration texts afterwards; `None` for nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refit: Option<Refit>,
    /// How the heads were distilled after that; `None` where they were not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distilled: Option<Distillation>,
}

/// What a distillation has read until its best step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Distillation {
    /// Tokens, each as often as it was read.
    pub tokens: u64,
    /// Steps.
    pub steps: u64,
    /// Fingerprint of the text.
    pub text: String,
    /// What it has trained.
    #[serde(default, skip_serializing_if = "Trained::is_attention")]
    pub trained: Trained,
}

/// What a distillation trains of every layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Trained {
    /// Queries, keys, values and outputs, and their biases.
    #[default]
    Attention,
    /// Its MLP and its norms, too, but for those of queries and keys.
    All,
}

impl Trained {
    fn is_attention(&self) -> bool {
        *self == Self::Attention
    }
}

impl Distillation {
    /// So many tokens of a text of this fingerprint, in so many steps.
    pub fn new(tokens: u64, steps: u64, text: impl Into<String>) -> Self {
        Self { tokens, steps, text: text.into(), trained: Trained::Attention }
    }

    /// Says what it has trained.
    pub fn with_trained(self, trained: Trained) -> Self {
        Self { trained, ..self }
    }
}

impl Pooling {
    /// Pooling by weights alone.
    pub fn new(pooler: Spec) -> Self {
        Self { pooler, calibration: None, refit: None, distilled: None }
    }

    /// Says under which calibration the pooler works.
    pub fn with_calibration(self, fingerprint: Option<String>) -> Self {
        Self { calibration: fingerprint, ..self }
    }

    /// Says how the heads were distilled.
    pub fn with_distillation(self, distilled: Option<Distillation>) -> Self {
        Self { distilled, ..self }
    }

    /// Says what is fitted again.
    pub fn with_refit(self, refit: Option<Refit>) -> Self {
        Self { refit, ..self }
    }
}

/// What is fitted again on a text after heads were merged (docs/method.md, "Refits").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Refit {
    /// The output projection.
    Output,
    /// Queries and shared keys on attention scores, then shared values and the output projection.
    Full,
}

impl Refit {
    /// Its name in plans: `output`, `full`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::Full => "full",
        }
    }
}

/// Budget asked for and reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PlanBudget {
    /// Fraction of the source's KV cache that was allowed.
    pub asked: f64,
    /// Fraction that the plan needs.
    pub reached: f64,
    /// KV heads of the plan, over all layers.
    pub kv_heads: usize,
}

/// How far numbers that follow from one another may be apart.
const ROUNDING: f64 = 1e-9;

/// The plan of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LayerPlan {
    /// The groups, ordered by smallest head.
    pub groups: Partition,
    /// Error of this partition by the method's fitness, unscaled.
    pub error: f64,
    /// Certified lower bound on the error of any partition into as many groups.
    pub lower_bound: Option<f64>,
    /// What its groups read where the layer has no keys and values of its own; its error is then part of that of the layer below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub below: Option<Below>,
}

impl From<&FrontPoint> for LayerPlan {
    fn from(point: &FrontPoint) -> Self {
        Self { lower_bound: point.lower_bound, ..Self::new(point.partition.clone(), point.error) }
    }
}

impl LayerPlan {
    /// Groups of this error, with no bound.
    pub fn new(groups: Partition, error: f64) -> Self {
        Self { groups, error, lower_bound: None, below: None }
    }

    /// Says that the layer has no keys and values, and which heads of the layer below its groups read.
    pub fn with_below(self, below: Option<Below>) -> Self {
        Self { below, ..self }
    }

    /// How far the error may be above the optimum, as [`FrontPoint::gap`].
    pub fn gap(&self) -> Option<f64> {
        front::gap(self.error, self.lower_bound)
    }
}

impl Plan {
    /// The version of the format that this crate writes; version 1 is read, too.
    pub const VERSION: u32 = 2;

    /// A plan for this model, where `asked` is the fraction of its cache that was allowed.
    ///
    /// # Errors
    /// As [`Plan::check`].
    pub fn new(
        source: ModelId,
        method: Method,
        pooling: Pooling,
        layers: Vec<LayerPlan>,
        asked: f64,
        seed: u64,
    ) -> Result<Self> {
        let kv_heads: usize = below::kept(&layers).iter().sum();
        let reached = kv_heads as f64 / source.kv_heads() as f64;
        let budget = PlanBudget { asked, reached, kv_heads };
        let (version, qcqa) = (Self::VERSION, env!("CARGO_PKG_VERSION").to_string());
        let plan = Self { version, qcqa, source, method, pooling, seed, budget, layers };
        plan.check()?;
        Ok(plan)
    }

    /// Checks that the parts of the plan agree with one another.
    ///
    /// # Errors
    /// [`Error::PlanVersion`] for another version, [`Error::PlanInconsistent`] naming the first contradiction.
    pub fn check(&self) -> Result<()> {
        if self.version != Self::VERSION {
            return Err(Error::PlanVersion { found: self.version, supported: Self::VERSION });
        }
        let says = |rule: bool, what: String| if rule { Ok(()) } else { Err(Error::PlanInconsistent(what)) };
        let layers = self.source.layers.len();
        says(layers > 0, "its source has no layers".to_string())?;
        says(
            self.layers.len() == layers,
            format!("it has groups for {} layers, its source has {layers}", self.layers.len()),
        )?;
        for (i, (layer, shape)) in self.layers.iter().zip(&self.source.layers).enumerate() {
            let (query_heads, kv_heads) = (shape.query_heads, shape.kv_heads);
            says(
                kv_heads > 0 && query_heads % kv_heads == 0,
                format!("{query_heads} query heads on {kv_heads} KV heads"),
            )?;
            let found = layer.groups.n_heads();
            says(found == kv_heads, format!("layer {i} groups {found} heads, its source has {kv_heads}"))?;
            says(
                layer.error.is_finite() && layer.error >= 0.0,
                format!("layer {i} has the error {}", layer.error),
            )?;
            let bound = layer.lower_bound.unwrap_or(0.0);
            says(
                (0.0..=layer.error * (1.0 + ROUNDING) + f64::MIN_POSITIVE).contains(&bound),
                format!("layer {i} has the error {}, but a lower bound of {bound}", layer.error),
            )?;
        }
        below::check(&self.layers, &self.source)?;
        self.method.check()?;
        let limits = self.method.limits();
        // A search need not share: one group a head is outside no space.
        limits.check(self.groups()).map_err(|error| {
            Error::PlanInconsistent(format!(
                "it says that it was searched otherwise: {error}; correct its groups, or what `method` says of them"
            ))
        })?;
        for calibration in [&self.method.calibration, &self.pooling.calibration].into_iter().flatten() {
            let found = shown(calibration);
            says(
                is_fingerprint(calibration),
                format!("its calibration must be `sha256:` and 64 hex digits, found \"{found}\""),
            )?;
        }
        if let Some(refit) = self.pooling.refit {
            says(
                self.pooling.calibration.is_some(),
                format!(
                    "its {} refit runs on a calibration text, but its pooling names no calibration",
                    refit.name()
                ),
            )?;
        }
        let kv_heads = self.kv_heads();
        says(
            self.budget.kv_heads == kv_heads,
            format!("its budget says {} KV heads, its groups are {kv_heads}", self.budget.kv_heads),
        )?;
        let PlanBudget { asked, reached, .. } = self.budget;
        says(asked > 0.0 && asked <= 1.0, format!("its budget asks for {asked} of the KV cache"))?;
        let whole: usize = self.source.layers.iter().map(|layer| layer.kv_heads).sum();
        let share = kv_heads as f64 / whole as f64;
        says(
            (reached - share).abs() <= ROUNDING,
            format!(
                "its budget says that {reached} of the KV cache is reached, its groups are {share} of it"
            ),
        )?;
        says(reached <= asked + ROUNDING, format!("it needs {reached} of the KV cache, {asked} was allowed"))
    }

    /// The groups of every layer.
    pub fn groups(&self) -> impl ExactSizeIterator<Item = &Partition> {
        self.layers.iter().map(|layer| &layer.groups)
    }

    /// KV heads over all layers that are computed and cached.
    pub fn kv_heads(&self) -> usize {
        self.group_counts().iter().sum()
    }

    /// KV heads that every layer computes and caches: its groups, with those that only the layer above reads, and none of a layer
    /// that reads those of the one below.
    pub fn group_counts(&self) -> Vec<usize> {
        below::kept(&self.layers)
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
