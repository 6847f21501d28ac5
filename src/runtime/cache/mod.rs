//! What attention keeps of the tokens that a model has read: all of it, or what a [`CachePolicy`] does.

mod attended;
mod corm;
mod full;
mod headkv;
mod qaq;
mod rows;
mod steps;
mod window;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{Result as Candle, Tensor};
use ndarray::{Array2, ArrayView3};

use crate::error::{Error, Result};
use crate::spec::{Registry, Spec};

pub use corm::Corm;
pub use full::FullCache;
pub use headkv::HeadKv;
pub use qaq::Qaq;
pub use steps::Steps;
pub use window::SlidingWindow;

/// The cache policies of this crate by name.
pub static POLICIES: Registry<dyn CachePolicy> = Registry::new(
    "cache policy",
    &[
        ("full", |spec| Ok(Box::new(FullCache::from_spec(spec)?))),
        ("window", |spec| Ok(Box::new(SlidingWindow::from_spec(spec)?))),
        ("corm", |spec| Ok(Box::new(Corm::from_spec(spec)?))),
        ("headkv", |spec| Ok(Box::new(HeadKv::from_spec(spec)?))),
        ("headkv-r2", |spec| Ok(Box::new(HeadKv::from_spec(spec)?))),
        ("qaq", |spec| Ok(Box::new(Qaq::from_spec(spec)?))),
    ],
);

/// Decides what a layer keeps of the keys and values of a text: which tokens, and in how many bits.
///
/// Works on the KV heads that a model has, shared ones of groups of any size among them.
pub trait CachePolicy: Debug + Send + Sync {
    /// Its name and settings: enough to make it again.
    fn spec(&self) -> Spec;

    /// An empty cache for one text, of the layer with this number and `kv_heads` KV heads of `head_dim` numbers.
    ///
    /// # Errors
    /// A policy that [needs to know its heads](CachePolicy::probe) and does not; whatever else it can fail with.
    fn layer(&self, layer: usize, kv_heads: usize, head_dim: usize) -> Result<Box<dyn LayerCache>>;

    /// What it has to know of a model's heads before it can be used; `None` where it knows enough.
    fn probe(&self) -> Option<Probe> {
        None
    }

    /// The policy for heads of this importance, one number for each KV head of each layer, where it has a [probe](CachePolicy::probe).
    ///
    /// # Errors
    /// [`Error::Setting`] where it has no use for it, or for numbers that are not finite or below 0.
    fn with_importance(&self, importance: &[Vec<f64>]) -> Result<Box<dyn CachePolicy>> {
        let _ = importance;
        Err(Error::setting("importance", "given", "left out: this policy makes no use of it"))
    }
}

/// What makes a head important (docs/caches.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Probe {
    /// That it looks where what comes next was said before.
    Retrieval,
    /// That it does so where the same words were said twice, and only what stood before tells which is meant.
    Reasoning,
}

/// What one layer keeps of one text.
///
/// In every step, of one token or more, attention [appends](LayerCache::append) their keys and values, [reads](LayerCache::read) each
/// head, tells [with which weights](LayerCache::attended) where that is wanted, and [settles](LayerCache::settle).
pub trait LayerCache: Debug + Send {
    /// Takes keys and values (k, T, h) of tokens at T further positions, ascending.
    fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>, positions: &[usize]);

    /// What a KV head reads: whatever it keeps, and at least the tokens of this step.
    fn read(&self, head: usize) -> Kept;

    /// Whether it wants to be told how its heads are read.
    fn wants_weights(&self) -> bool {
        false
    }

    /// Takes the attention weights (r, T, S) of the head's r query heads for the T tokens of this step over the S that it
    /// [read](LayerCache::read).
    fn attended(&mut self, head: usize, weights: ArrayView3<'_, f32>) {
        let _ = (head, weights);
    }

    /// Ends a step: drops and rounds what it does not keep.
    fn settle(&mut self);

    /// Bytes held: numbers and whatever is needed to read or to choose among them.
    fn bytes(&self) -> usize;
}

/// Keys and values of some tokens in one KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// Keys, turned by their positions, (S, h).
    pub keys: Array2<f32>,
    /// Values, (S, h).
    pub values: Array2<f32>,
    /// Where the S tokens stand, ascending.
    pub positions: Vec<usize>,
}

/// The keys and values of the tokens that a model has read, for each layer as many heads as it has groups: all of them, as the
/// model computes them, or what a [`CachePolicy`] keeps.
///
/// ```
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::ndarray::array;
/// use qcqa::runtime::{KvCache, Model, SlidingWindow};
///
/// let model = Model::load(&Checkpoint::open("tests/data/novels-1m")?)?;
/// let mut cache = KvCache::default();
/// model.extend(&mut cache, array![[5, 7, 11]].view())?;
/// let logits = model.extend(&mut cache, array![[13]].view())?;
/// assert_eq!((logits.dim(), cache.tokens()), ((1, 1, 1024), 4));
/// assert_eq!(cache.bytes(), 4 * model.kv_bytes_per_token());
///
/// // The first token and the last two, in 16 bits in place of 32.
/// let mut cache = KvCache::by(SlidingWindow::new(1, 2));
/// model.extend(&mut cache, array![[5, 7, 11, 13, 17]].view())?;
/// assert_eq!((cache.tokens(), cache.bytes()), (5, 3 * model.kv_bytes_per_token() / 2));
/// # Ok::<(), qcqa::runtime::RuntimeError>(())
/// ```
#[derive(Debug, Default)]
pub struct KvCache {
    policy: Option<Arc<dyn CachePolicy>>,
    /// By number; a layer that reads what another one keeps has none.
    layers: BTreeMap<usize, Past>,
    pub(super) tokens: usize,
}

impl KvCache {
    /// An empty cache that keeps what a policy keeps.
    pub fn by(policy: impl CachePolicy + 'static) -> Self {
        Self::shared(Arc::new(policy))
    }

    /// An empty cache that keeps what a policy keeps.
    pub fn shared(policy: Arc<dyn CachePolicy>) -> Self {
        Self { policy: Some(policy), ..Self::default() }
    }

    /// Tokens read so far, of each row of the batch.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.layers.values().map(Past::bytes).sum()
    }

    /// What layer `layer` keeps of a batch of `rows` texts, with KV heads of this number and size.
    pub(super) fn of(
        &mut self,
        layer: usize,
        rows: usize,
        [kv_heads, head_dim]: [usize; 2],
    ) -> Result<&mut Past> {
        match self.layers.entry(layer) {
            Entry::Occupied(past) => Ok(past.into_mut()),
            Entry::Vacant(none) => Ok(none.insert(match &self.policy {
                None => Past::Whole(Whole::default()),
                Some(policy) => {
                    let empty = (0..rows).map(|_| policy.layer(layer, kv_heads, head_dim));
                    Past::Chosen(empty.collect::<Result<_>>()?)
                }
            })),
        }
    }

    /// Ends a step of a layer.
    pub(super) fn settle(&mut self, layer: usize) {
        if let Some(Past::Chosen(rows)) = self.layers.get_mut(&layer) {
            rows.iter_mut().for_each(|row| row.settle());
        }
    }
}

/// What one layer keeps of all rows of a batch.
#[derive(Debug)]
pub(super) enum Past {
    /// Everything, on the device of the model.
    Whole(Whole),
    /// What a policy chose, for each row.
    Chosen(Vec<Box<dyn LayerCache>>),
}

impl Past {
    fn bytes(&self) -> usize {
        match self {
            Self::Whole(whole) => {
                let held = whole.held.iter().flat_map(|(keys, values)| [keys, values]);
                held.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
            }
            Self::Chosen(rows) => rows.iter().map(|row| row.bytes()).sum(),
        }
    }
}

/// All keys and values.
#[derive(Debug, Default)]
pub(super) struct Whole {
    /// Keys and values, (B, k, S, h).
    held: Option<(Tensor, Tensor)>,
    /// Where the S tokens stand, ascending.
    positions: Vec<usize>,
}

impl Whole {
    /// Adds the keys and values (B, k, T, h) of the tokens at T further positions.
    ///
    /// Gives all keys and values, and their positions.
    pub(super) fn extend(
        &mut self,
        keys: Tensor,
        values: Tensor,
        positions: &[usize],
    ) -> Candle<(Tensor, Tensor, &[usize])> {
        let (keys, values) = match &self.held {
            Some((old_keys, old_values)) => {
                (Tensor::cat(&[old_keys, &keys], 2)?, Tensor::cat(&[old_values, &values], 2)?)
            }
            None => (keys, values),
        };
        self.held = Some((keys.clone(), values.clone()));
        self.positions.extend_from_slice(positions);
        Ok((keys, values, &self.positions))
    }
}
