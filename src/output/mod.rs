//! Models out: what a [`Target`] says of an output, written whole or not at all.
//!
//! A target describes a model by what differs from its source, an [`OutputModel`]; [`convert`] checks the
//! description, fills it with shared heads, and writes it.

mod check;
mod conversion;
mod copy;
mod gguf;
mod read_back;
mod relaid;
mod staging;
mod views;
mod weights;

use std::collections::BTreeSet;
use std::fmt::{self, Debug};
use std::path::{Path, PathBuf};

use ndarray::ArrayD;
use serde_json::{Map, Value};

use crate::budget::Limits;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::Result;
use crate::files::FileError;
use crate::heads::{Heads, Pooled};
use crate::model::{Architecture, Axis, Part};
use crate::plan::Plan;

pub use conversion::{Report, check_form, check_plan, convert};
pub use gguf::Metadata;
pub use read_back::{Provenance, read_back};

/// A form in which a model is written: what it can hold, and what becomes of the source's tensors and
/// config.json.
///
/// ```
/// use qcqa::budget::Limits;
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::files::FileError;
/// use qcqa::heads::HeadSource;
/// use qcqa::model::Architecture;
/// use qcqa::output::{OutputModel, Slot, Target};
/// use qcqa::plan::Plan;
///
/// /// Every head reads a copy of its group's: the source's shape, and its cache.
/// #[derive(Debug)]
/// struct Copies;
///
/// impl Target for Copies {
///     fn name(&self) -> &'static str {
///         "copies"
///     }
///     fn limits(&self, _: &Architecture) -> Limits {
///         Limits::default()
///     }
///     fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
///         let model = source.architecture();
///         let laid = OutputModel::from_slots(model, source.config().raw().clone(), |layer| {
///             let groups = &plan.layers[layer].groups;
///             let copies = (0..groups.n_heads()).map(|head| Slot::Head(groups.group_of(head)));
///             let queries = (0..model.layers[layer].query_heads).map(Slot::Head);
///             (copies.collect(), queries.collect())
///         })?;
///         Ok(laid)
///     }
/// }
/// ```
pub trait Target: Debug + Send + Sync {
    /// Its name, for messages and provenance.
    fn name(&self) -> &'static str;

    /// What a plan must keep to. [`Limits::check`] checks a plan against it.
    fn limits(&self, model: &Architecture) -> Limits;

    /// What search and allocation keep to, so that whatever they find can be written: [`Target::limits`], unless further rules bind
    /// layers together, which [`Target::output`] checks.
    fn search_limits(&self, model: &Architecture) -> Limits {
        self.limits(model)
    }

    /// Whether it can write a layer that reads the keys and values of the layer below ([`LayerPlan::below`](crate::plan::LayerPlan::below)).
    fn holds_pairs(&self) -> bool {
        false
    }

    /// The output that a plan, one within the limits, makes of a model.
    ///
    /// # Errors
    /// Whatever keeps the target from writing this model.
    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError>;
}

/// A model to be written, as far as it differs from its source: tensors and files that nothing is said of are
/// copied.
///
/// [`OutputModel::from_slots`] makes one of lists of heads, for targets that only lay heads out anew.
///
/// ```
/// use qcqa::model::{Architecture, AttentionSpec, Axis, Stored, StoredHeads};
/// use qcqa::output::{OutputModel, Slot};
/// use serde_json::Map;
///
/// // Two heads of 4, each with its own tensor rows, become one that both read.
/// let part = |name, axis| Stored::split(name, axis, 2, 4);
/// let [q, k, v] = ["q", "k", "v"].map(|name| part(name, Axis::Rows));
/// let stored = StoredHeads::new(q, k, v, part("o", Axis::Columns));
/// let model = Architecture::new("raw", 8, vec![AttentionSpec::new(2, 2, 4).with_stored(stored)]);
///
/// let (kv, queries) = (vec![Slot::Head(0)], vec![Slot::Head(0), Slot::Head(1)]);
/// let output = OutputModel::from_slots(&model, Map::new(), |_| (kv.clone(), queries.clone()))?;
/// assert_eq!(output.kv_heads, [1]);
/// assert!(output.tensors.iter().map(|tensor| &*tensor.name).eq(["k", "o", "q", "v"]));
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug)]
#[non_exhaustive]
pub struct OutputModel {
    /// config.json.
    pub config: Map<String, Value>,
    /// Tensors that are new, or not what they are in the source: all that hold heads or their biases are
    /// among them.
    pub tensors: Vec<OutputTensor>,
    /// Tensors of the source that the output does not have.
    pub left_out: BTreeSet<String>,
    /// Files besides weights and config.json, by their place in the output, with their bytes: new ones, or in
    /// the place of the source's.
    pub files: Vec<(PathBuf, Vec<u8>)>,
    /// Heads that each layer of the output keeps in its cache.
    pub kv_heads: Vec<usize>,
    /// What holds the tensors.
    pub container: Container,
}

/// What holds the tensors of an output.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum Container {
    /// A directory like the source: its files of weights, config.json, and all other files of the source.
    #[default]
    Directory,
    /// One GGUF file, which has those tensors alone of which something is said; tensors of one dimension are stored as f32. Of the
    /// source's other files licences are copied.
    Gguf {
        /// Its name.
        file: String,
        /// The type of its matrices; `None`: as they are in the source.
        matrices: Option<Dtype>,
        /// What describes the model, by its keys.
        metadata: Vec<(String, Metadata)>,
    },
}

/// A tensor of an output.
#[derive(Debug)]
#[non_exhaustive]
pub struct OutputTensor {
    /// Its name in the output.
    pub name: String,
    /// What is in it.
    pub content: Content,
}

/// What is in a tensor of an output. [`Content::heads`] and [`Content::made`] make those with more than one
/// field.
#[non_exhaustive]
pub enum Content {
    /// A tensor of the source, bit for bit; none that holds heads, which sharing changes.
    Copied(String),
    /// Heads, one after the other.
    #[non_exhaustive]
    Heads {
        /// The tensor of the source whose type and file this one has.
        like: String,
        /// The layer of the heads.
        layer: usize,
        /// The dimension along which they lie, d being the other; `None` for their biases, (heads·h).
        axis: Option<Axis>,
        /// The heads in the order in which they lie there, so that split and fused projections are one case.
        pieces: Vec<(Part, Slot)>,
        /// The rows of each head in their new order, where that is another, (h): of heads that lie as rows, and of biases.
        rows: Option<Vec<usize>>,
    },
    /// The bias of a layer's output projection, (d), which a refit may have changed.
    OutputBias(usize),
    /// Weights of norms that heads have for themselves, or of one over all queries or all keys of a token, (heads·h) or (heads, h) as in
    /// the source: of a group the mean of its members'.
    #[non_exhaustive]
    HeadNorm {
        /// The tensor of the source, or those of its heads one by one.
        like: Vec<String>,
        /// The layer of the heads.
        layer: usize,
        /// [`Part::Query`] or [`Part::Key`].
        part: Part,
        /// The heads in their new order.
        slots: Vec<Slot>,
    },
    /// Sinks of the query heads of a layer, (heads): of those that are not there 0.
    #[non_exhaustive]
    Sinks {
        /// The tensor of the source.
        like: String,
        /// The layer of the heads.
        layer: usize,
        /// The query heads in their new order.
        slots: Vec<Slot>,
    },
    /// Numbers that are made from the shared heads of a layer.
    #[non_exhaustive]
    Made {
        /// The layer; the tensor lies in the file of its keys.
        layer: usize,
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// How it is stored.
        dtype: Dtype,
        /// The numbers, in that shape.
        make: Make,
    },
}

/// Makes the numbers of a tensor from the heads of a layer and what became of them.
pub type Make = Box<dyn Fn(&Heads, &Pooled) -> Result<ArrayD<f32>> + Send + Sync>;

/// A place for a head in an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Slot {
    /// Of keys and values, the shared head of this group; of queries and outputs, this head of the source.
    Head(usize),
    /// Zeros: a query head that is not there, which fills up a group, or a KV head that only such ones read.
    Zero,
}

impl OutputTensor {
    /// A tensor of this name.
    pub fn new(name: impl Into<String>, content: Content) -> Self {
        Self { name: name.into(), content }
    }
}

impl Content {
    /// Heads of a layer along `axis`, or their biases (`None`); type and file are those of `like`, a tensor
    /// of the source.
    pub fn heads(
        like: impl Into<String>,
        layer: usize,
        axis: Option<Axis>,
        pieces: Vec<(Part, Slot)>,
    ) -> Self {
        Self::Heads { like: like.into(), layer, axis, pieces, rows: None }
    }

    /// Gives the rows of heads, and of their biases, this order; other contents stay as they are.
    pub fn with_rows(mut self, order: Option<Vec<usize>>) -> Self {
        if let Self::Heads { rows, .. } = &mut self {
            *rows = order;
        }
        self
    }

    /// Numbers of this shape that are made from the shared heads of a layer.
    pub fn made(
        layer: usize,
        shape: &[usize],
        dtype: Dtype,
        make: impl Fn(&Heads, &Pooled) -> Result<ArrayD<f32>> + Send + Sync + 'static,
    ) -> Self {
        Self::Made { layer, shape: shape.to_vec(), dtype, make: Box::new(make) }
    }
}

impl Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Copied(tensor) => f.debug_tuple("Copied").field(tensor).finish(),
            Self::Heads { like, layer, axis, pieces, rows } => {
                let mut heads = f.debug_struct("Heads");
                heads.field("like", like).field("layer", layer).field("axis", axis);
                heads.field("pieces", pieces).field("rows", rows).finish()
            }
            Self::OutputBias(layer) => f.debug_tuple("OutputBias").field(layer).finish(),
            Self::HeadNorm { like, layer, part, slots } => {
                let mut norm = f.debug_struct("HeadNorm");
                norm.field("like", like).field("layer", layer).field("part", part);
                norm.field("slots", slots).finish()
            }
            Self::Sinks { like, layer, slots } => {
                let mut sinks = f.debug_struct("Sinks");
                sinks.field("like", like).field("layer", layer).field("slots", slots).finish()
            }
            Self::Made { layer, shape, dtype, .. } => {
                let mut made = f.debug_struct("Made");
                made.field("layer", layer).field("shape", shape).field("dtype", dtype).finish_non_exhaustive()
            }
        }
    }
}

impl OutputModel {
    /// An output with this config.json and these numbers of cached heads, and nothing yet in the place of the
    /// source's heads.
    pub fn new(config: Map<String, Value>, kv_heads: Vec<usize>) -> Self {
        let (left_out, container) = (BTreeSet::new(), Container::Directory);
        Self { config, tensors: Vec::new(), left_out, files: Vec::new(), kv_heads, container }
    }
}

/// Checks the place that [`convert`] would write to and the files that it would copy, as far as that can be without a plan.
///
/// # Errors
/// [`FileError::OutputExists`] unless `force` is set, [`FileError::OutputForeign`],
/// [`FileError::OutputOverlap`], [`FileError::Io`], [`FileError::Dangling`], [`FileError::Name`], [`FileError::TooManyFiles`].
pub fn check_place(source: &Checkpoint, out: &Path, force: bool) -> Result<(), FileError> {
    staging::Destination::check(out, source.path(), force)?;
    conversion::copied_files(source, out).map(drop)
}
