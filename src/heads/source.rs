use std::fmt::Debug;

use super::{CrossMoment, HeadRows, Heads};
use crate::error::{Error, Result};
use crate::model::{Architecture, AttentionSpec, ModelId, Rotary};

/// Where the heads of a model come from, layer by layer.
///
/// A checkpoint is one; a calibration is one that adds the moments of the inputs and the energies of keys; [`InMemory`] holds raw tensors.
pub trait HeadSource: Debug + Sync {
    /// The model.
    fn architecture(&self) -> &Architecture;

    /// The model as plans name it.
    ///
    /// # Errors
    /// What reading it can fail with.
    fn id(&self) -> Result<ModelId>;

    /// The heads of a layer, with its index and, where it is known, the moment of its inputs.
    ///
    /// # Errors
    /// [`Error::NoLayer`]; what reading it can fail with, naming the tensor.
    fn heads(&self, layer: usize) -> Result<Heads>;

    /// The keys and values of a layer as rows to be read in pieces, without decoding the layer whole where the source can.
    ///
    /// # Errors
    /// As [`HeadSource::heads`].
    fn rows(&self, layer: usize) -> Result<Box<dyn HeadRows + '_>> {
        Ok(Box::new(self.heads(layer)?))
    }

    /// The moment of the inputs of a layer and of the one above at the same tokens; `None` where it was not measured.
    fn cross_moment(&self, _layer: usize) -> Option<CrossMoment> {
        None
    }

    /// Fingerprint of the calibration that the heads' moments come from; `None` for heads without moments.
    fn calibration(&self) -> Option<String> {
        None
    }
}

/// What a plugin makes use of besides keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// Queries and outputs: without them it fails.
    pub queries: bool,
    /// The moments of the inputs: without them it takes the inputs as white.
    pub moment: bool,
    /// The energies of keys on windows of text: without them it fails.
    pub key_energies: bool,
}

impl Needs {
    /// Keys and values alone.
    pub const NOTHING: Self = Self { queries: false, moment: false, key_energies: false };
    /// Queries and outputs, and the moments of the inputs.
    pub const QUERIES_AND_MOMENT: Self = Self { queries: true, moment: true, key_energies: false };
    /// Keys and values, and the energies of keys.
    pub const KEY_ENERGIES: Self = Self { queries: false, moment: false, key_energies: true };
}

/// Layers of raw tensors.
///
/// ```
/// use qcqa::heads::{HeadSource, Heads, InMemory, Projection};
/// use qcqa::ndarray::Array3;
///
/// let layer = |h| {
///     let tensor = Array3::from_shape_fn((h, 2, 3), |(i, r, c)| (i * 7 + r * 3 + c) as f32);
///     Heads::new(Projection::new(tensor.clone(), None)?, Projection::new(tensor, None)?)
/// };
/// let source = InMemory::new(vec![layer(4)?, layer(2)?])?;
/// assert_eq!(source.architecture().kv_heads(), [4, 2]);
/// assert_eq!(source.heads(1)?.layer(), 1);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct InMemory {
    architecture: Architecture,
    layers: Vec<Heads>,
    calibration: Option<String>,
}

impl InMemory {
    /// These layers, in this order.
    ///
    /// # Errors
    /// [`Error::NoLayer`] without layers, [`Error::Shape`] for layers of another width than the first.
    pub fn new(layers: Vec<Heads>) -> Result<Self> {
        let hidden = layers.first().ok_or(Error::NoLayer { layer: 0, layers: 0 })?.key().inputs();
        if let Some(other) = layers.iter().find(|heads| heads.key().inputs() != hidden) {
            let (heads, h, found) = other.key().weight().dim();
            return Err(Error::shape("key weight", &[heads, h, hidden], &[heads, h, found]));
        }
        let spec = |heads: &Heads| {
            let (n, h) = (heads.n_heads(), heads.key().head_dim());
            let spec = AttentionSpec::new(n * heads.queries_per_head(), n, h);
            AttentionSpec { rotary: Some(Rotary::new(heads.rotation(), Vec::new())), ..spec }
        };
        let architecture = Architecture::new("raw", hidden, layers.iter().map(spec).collect());
        let layers = layers.into_iter().enumerate().map(|(i, heads)| heads.with_layer(i)).collect();
        Ok(Self { architecture, layers, calibration: None })
    }

    /// Names the calibration that the layers' moments come from.
    pub fn with_calibration(self, fingerprint: impl Into<String>) -> Self {
        Self { calibration: Some(fingerprint.into()), ..self }
    }
}

impl HeadSource for InMemory {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn id(&self) -> Result<ModelId> {
        Ok(ModelId::new(&self.architecture, "f32", None))
    }

    fn heads(&self, layer: usize) -> Result<Heads> {
        let missing = Error::NoLayer { layer, layers: self.layers.len() };
        self.layers.get(layer).cloned().ok_or(missing)
    }

    fn calibration(&self) -> Option<String> {
        self.calibration.clone()
    }
}
