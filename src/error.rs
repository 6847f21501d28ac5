//! What can go wrong, one variant for each rule.

use std::fmt::{self, Display};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A rule of the library that was broken, with what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An array has another shape than its place asks for.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The tensor, by its role or its name in a file.
        what: String,
        /// The shape that belongs there.
        expected: Vec<usize>,
        /// The shape that was given.
        found: Vec<usize>,
    },
    /// A tensor holds NaN or an infinity.
    #[error("{what}: a value is NaN or infinite; every weight must be finite")]
    NotFinite {
        /// The tensor, by its role or its name in a file.
        what: String,
    },
    /// Numbers that cannot be squared in f32.
    #[error("{what}: a value is NaN, infinite, or too large to be squared in f32")]
    OutOfRange {
        /// The tensors.
        what: String,
    },
    /// A matrix that holds no squared distances.
    #[error("squared distances {0}")]
    Distances(&'static str),
    /// Energies of keys that are missing, or are none.
    #[error("the energies of keys on windows of text {0}")]
    KeyEnergies(&'static str),
    /// The query heads cannot be shared out evenly over the KV heads.
    #[error("{query_heads} query heads cannot be shared evenly by {kv_heads} KV heads")]
    QueryHeads {
        /// Query heads found.
        query_heads: usize,
        /// KV heads they must be a multiple of.
        kv_heads: usize,
    },
    /// A rotation turns an odd number of dimensions, or more than a head has.
    #[error(
        "a rotation of {dims} dimensions does not fit heads of {head_dim} (it must be even and no larger)"
    )]
    Rotation {
        /// Rotated dimensions asked for.
        dims: usize,
        /// Dimensions of a head.
        head_dim: usize,
    },
    /// A layer without heads, or with more than [`MAX_HEADS`](crate::partition::Partition::MAX_HEADS).
    #[error("a layer of {n_heads} KV heads cannot be partitioned (1 to {max} are possible)")]
    HeadCount {
        /// Heads found.
        n_heads: usize,
        /// The most that a partition can hold.
        max: usize,
    },
    /// A group of a partition has no members.
    #[error("group {group} is empty; every group needs at least one head")]
    EmptyGroup {
        /// Index of the group as it was given.
        group: usize,
    },
    /// A partition names a head that the layer does not have.
    #[error("head {head} does not exist in a layer of {n_heads} KV heads")]
    HeadOutOfRange {
        /// The head named.
        head: usize,
        /// Heads of the layer.
        n_heads: usize,
    },
    /// A head stands in two groups.
    #[error("head {head} is in more than one group")]
    HeadTwice {
        /// The head named twice.
        head: usize,
    },
    /// A head stands in no group.
    #[error("head {head} of {n_heads} is in no group")]
    HeadMissing {
        /// The head left out.
        head: usize,
        /// Heads of the layer.
        n_heads: usize,
    },
    /// A group count outside `1..=n_heads`.
    #[error("{k} groups of {n_heads} heads are impossible; choose 1 to {n_heads}")]
    GroupCount {
        /// Groups asked for.
        k: usize,
        /// Heads of the layer.
        n_heads: usize,
    },
    /// A partition was used on a layer with another number of heads.
    #[error("the partition covers {found} heads, the layer has {expected}")]
    PartitionSize {
        /// Heads of the layer.
        expected: usize,
        /// Heads of the partition.
        found: usize,
    },
    /// The search space holds no partition of a layer besides the one without sharing.
    #[error("no partition of {n_heads} heads has {space}")]
    EmptySpace {
        /// Heads of the layer.
        n_heads: usize,
        /// The space, in words.
        space: String,
    },
    /// A fitness function returned NaN, an infinity or a negative error.
    #[error("the fitness of a partition into {k} groups is {value}; it must be finite and not negative")]
    InvalidFitness {
        /// Groups of the partition.
        k: usize,
        /// What came back.
        value: f64,
    },
    /// There is no plugin of that name.
    #[error("there is no {kind} \"{name}\"; known are {known}")]
    UnknownPlugin {
        /// What it should be: pooler, optimizer, ….
        kind: &'static str,
        /// The name given.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// A plugin has no such setting.
    #[error("{plugin} has no setting \"{setting}\"; it has {known:?}")]
    UnknownSetting {
        /// The plugin.
        plugin: String,
        /// The setting given.
        setting: String,
        /// Its settings.
        known: &'static [&'static str],
    },
    /// A setting of an algorithm is outside its range.
    #[error("{name} is {value}, but must be {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// An exact search of a layer with more heads than it accepts.
    #[error(
        "exact search takes up to {max} heads, the layer has {n_heads}; use local search, or raise the limit (each head triples the time)"
    )]
    TooManyHeads {
        /// Heads of the layer.
        n_heads: usize,
        /// The limit that was set.
        max: usize,
    },
    /// An optimizer that builds on groups was given a fitness that is not a sum over groups.
    #[error("{optimizer} needs a fitness that is a sum over groups; use LocalSearch or Nsga2")]
    NotSeparable {
        /// The optimizer.
        optimizer: &'static str,
    },
    /// The energy of a layer is needed to compare it with others, and its fitness has none.
    #[error(
        "layer {layer}: its fitness names no energy, so its error cannot be taken as a share; use the raw cost"
    )]
    NoEnergy {
        /// Index of the layer.
        layer: usize,
    },
    /// A calibrated computation on a layer that carries no input moment.
    #[error("the layer carries no input moment; calibrate the model, or use the uncalibrated form")]
    NoMoment,
    /// An input moment that is none.
    #[error("the input moment{} {rule}; measure it again", OfLayer(*layer))]
    Moment {
        /// Index of the layer, where it is known.
        layer: Option<usize>,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// A method that turns the query side, on a layer of which only keys and values were given.
    #[error(
        "the layer carries no queries and outputs, which low-rank sharing turns; give them, or pool by the mean"
    )]
    NoQueries,
    /// A model whose own form always has as many KV heads as query heads.
    #[error(
        "models of the type {model:?} have no grouped form of their own; write one of another target (expanded)"
    )]
    NoGroupedForm {
        /// The model's type.
        model: String,
    },
    /// A form that models of this type do not have.
    #[error("models of the type {model:?} cannot be written so: {reason}")]
    NoForm {
        /// The model's type.
        model: String,
        /// What stands against it, and what does not.
        reason: String,
    },
    /// A budget that is not a fraction in (0, 1] or not a number of heads in range.
    #[error(
        "a budget of {0} is outside its range (a fraction above 0 and at most 1, or heads from 1 to all)"
    )]
    BudgetRange(f64),
    /// A budget below everything that the limits allow.
    #[error("{asked} KV heads in all are not reachable here; reachable: {}", List(reachable))]
    BudgetUnreachable {
        /// The most KV heads that the budget allows, over all layers.
        asked: usize,
        /// The totals that can be reached, ascending.
        reachable: Vec<usize>,
    },
    /// A layer that the model does not have.
    #[error("layer {layer} does not exist in a model of {layers} layers")]
    NoLayer {
        /// The layer asked for.
        layer: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// Things that belong together one for each layer came in different numbers.
    #[error("{what}: expected one for each of {expected} layers, found {found}")]
    LayerCount {
        /// What was counted.
        what: &'static str,
        /// Layers of the model.
        expected: usize,
        /// How many came.
        found: usize,
    },
    /// A plan of a version that this crate does not know.
    #[error("plan version {found} is not supported (this crate reads version {supported}); update qcqa")]
    PlanVersion {
        /// The plan's version.
        found: u32,
        /// The version this crate reads.
        supported: u32,
    },
    /// A plan whose parts contradict one another.
    #[error("the plan is inconsistent: {0}")]
    PlanInconsistent(String),
    /// A plan was made for another model.
    #[error(
        "the plan is for another model: its {field} is {expected}, this model's is {found}; search this model again"
    )]
    PlanSource {
        /// What differs.
        field: &'static str,
        /// The plan's value.
        expected: String,
        /// The model's value.
        found: String,
    },
    /// A plan and the calibration given with it do not belong together.
    #[error("the plan was made {}; {}", made_from(expected, found), way_out(expected, found))]
    PlanCalibration {
        /// Fingerprint of the calibration that the plan's pooler works under; `None` for weights alone.
        expected: Option<String>,
        /// Fingerprint of the calibration given.
        found: Option<String>,
    },
    /// A plan's heads were distilled, which a plan alone cannot do again.
    #[error(
        "the heads of this plan were distilled from their source, which takes a distillation: the plan alone does not hold what that found"
    )]
    PlanDistilled,
    /// A plan asks for a refit, which needs a model that runs and the text that the plan was calibrated on.
    #[error(
        "the plan asks for the {refit} refit, which runs the model on the text that it was calibrated on: give that text (moments do not suffice)"
    )]
    PlanRefit {
        /// The refit.
        refit: &'static str,
    },
    /// A target that cannot hold the groups that a method makes.
    #[error("target {target} holds equal groups only, which {method} does not make")]
    TargetMethod {
        /// The target.
        target: String,
        /// The method.
        method: String,
    },
    /// Something that needs a text to run the model on.
    #[error("{what} runs the model on a text: give a calibration text (moments do not suffice)")]
    NeedsText {
        /// What needs it.
        what: &'static str,
    },
    /// A refit of heads that were merged without regard to the inputs.
    #[error("a refit starts from calibrated heads, which the pooler {pooler} does not make")]
    RefitPooler {
        /// The pooler.
        pooler: String,
    },
    /// A plan that the limits of a target or a user forbid.
    #[error("layer {layer} {found}, but {expected}")]
    Limits {
        /// The first layer at fault.
        layer: usize,
        /// What the layer has.
        found: String,
        /// What it needs.
        expected: String,
    },
    /// The observer asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// An error of a plugin, or of a source of layers.
    #[error(transparent)]
    Plugin(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// An [`Error::Setting`] for the setting called `name`.
    pub fn setting(name: &'static str, value: impl Display, expected: &'static str) -> Self {
        Self::Setting { name, value: value.to_string(), expected }
    }

    /// Wraps the error of a plugin.
    pub fn plugin(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Plugin(source.into())
    }

    /// This error, told of a layer where that was not known.
    pub(crate) fn of_layer(self, layer: usize) -> Self {
        match self {
            Self::Moment { layer: None, rule } => Self::Moment { layer: Some(layer), rule },
            error => error,
        }
    }

    /// An [`Error::Shape`] for the array called `what`.
    pub fn shape(what: impl Display, expected: &[usize], found: &[usize]) -> Self {
        Self::Shape { what: what.to_string(), expected: expected.to_vec(), found: found.to_vec() }
    }
}

/// What a file says, as a message may show it: its beginning, with control characters escaped.
pub(crate) fn shown(text: &str) -> String {
    const SHOWN: usize = 80;
    let rest = text.chars().nth(SHOWN).map(|_| '…');
    text.chars().take(SHOWN).flat_map(char::escape_debug).chain(rest).collect()
}

/// ` of layer 3`, or nothing.
struct OfLayer(Option<usize>);

impl Display for OfLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |layer| write!(f, " of layer {layer}"))
    }
}

fn made_from(expected: &Option<String>, found: &Option<String>) -> String {
    match (expected, found) {
        (Some(expected), Some(found)) => {
            format!("with the calibration {}, but {} was given", shown(expected), shown(found))
        }
        (Some(expected), None) => format!("with the calibration {}, but none was given", shown(expected)),
        (None, _) => "from weights alone, but a calibration was given".to_string(),
    }
}

fn way_out(expected: &Option<String>, found: &Option<String>) -> &'static str {
    match (expected, found) {
        (Some(_), Some(_)) => {
            "give the texts that it was made with, in their order, with their shares and as many windows, or their moments, or search again with these"
        }
        (Some(_), None) => "give those texts or their moments",
        (None, _) => "leave the calibration out, or search again with it",
    }
}

/// At most a dozen numbers, then how many were left out.
struct List<'a>(&'a [usize]);

impl Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 12;
        for (i, n) in self.0.iter().take(SHOWN).enumerate() {
            write!(f, "{}{n}", if i == 0 { "" } else { ", " })?;
        }
        match self.0.len().checked_sub(SHOWN + 1) {
            Some(_) => write!(f, ", … {} ({} in all)", self.0[self.0.len() - 1], self.0.len()),
            None => Ok(()),
        }
    }
}
