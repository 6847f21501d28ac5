//! What can go wrong, one variant for each rule.

use std::fmt::{self, Display};

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

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
    /// A layer without heads, or with more than [`MAX_HEADS`](crate::Partition::MAX_HEADS).
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
        "exact search takes up to {max} heads, the layer has {n_heads}; use LocalSearch, or raise the limit (each head triples the time)"
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
    #[error("the input moment{} {rule}; make it again with `qcqa calibrate`", OfLayer(*layer))]
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
    /// The observer asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// An error of a plugin, or of a source of layers.
    #[error(transparent)]
    Plugin(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// Wraps the error of a plugin.
    pub fn plugin(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Plugin(source.into())
    }

    /// The same error, told of this layer where that was not known.
    #[cfg(feature = "runtime")]
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
