//! Heads of neighbouring layers as those of one: cross-layer attention (Brandon et al. 2024, arXiv 2405.12981), in which a layer
//! reads keys and values that the layer below has computed and cached.
//!
//! The shared heads are functions of the lower layer's input. The upper layer's heads become such functions by the best linear
//! prediction of its input from the lower one (docs/method.md, "Across layers"), or as they are where nothing is known of the
//! inputs; from there on the heads of both layers are those of one ordinary layer, with the same fitness functions, optimizers and
//! poolers.

#[cfg(feature = "linalg")]
mod predicted;

use ndarray::{Array2, Array3, Axis, concatenate, s};

use crate::error::{Error, Result};
use crate::heads::{CrossMoment, HeadSource, Heads, Pooled, Projection};
use crate::model::{Architecture, AttentionSpec, ModelId};

/// Pairs of neighbouring layers of a source as layers of their own, each with the heads of the lower layer and then those of the upper.
///
/// ```
/// use qcqa::cross_layer::LayerPairs;
/// use qcqa::heads::{HeadSource, Heads, InMemory, Projection};
/// use qcqa::ndarray::Array3;
///
/// let tensor = Array3::from_shape_fn((2, 2, 3), |(i, r, c)| (i * 7 + r * 3 + c) as f32);
/// let heads = Heads::new(Projection::new(tensor.clone(), None)?, Projection::new(tensor, None)?)?;
/// let source = InMemory::new(vec![heads; 3])?;
/// let pairs = LayerPairs::new(&source, false)?;
/// assert_eq!(pairs.lower(), [0, 1]);
/// assert_eq!(pairs.heads(1)?.n_heads(), 4);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug)]
pub struct LayerPairs<'a> {
    source: &'a dyn HeadSource,
    calibrated: bool,
    lower: Vec<usize>,
    architecture: Architecture,
}

impl<'a> LayerPairs<'a> {
    /// All pairs of neighbouring layers of which the upper one can read the lower one's keys: the same width, rotation, mask and number of query
    /// heads for each KV head, biases alike, and neither norms nor sinks of heads. `calibrated`: the upper heads as the measured inputs
    /// predict them, under the moment of the lower layer; else all as they are.
    ///
    /// # Errors
    /// [`Error::NeedsText`] for a calibrated source without the [moments of neighbouring layers](HeadSource::cross_moment);
    /// [`Error::Limits`] for a source whose layers already share.
    pub fn new(source: &'a dyn HeadSource, calibrated: bool) -> Result<Self> {
        let model = source.architecture();
        if let Some(layer) = model.first_below() {
            let expected = "its heads are to be shared across layers, which is done once".to_string();
            let found = "reads the keys and values of the layer below".to_string();
            return Err(Error::Limits { layer, found, expected });
        }
        let lower: Vec<usize> = (1..model.n_layers())
            .map(|i| i - 1)
            .filter(|&i| alike(&model.layers[i], &model.layers[i + 1]))
            .collect();
        let calibrated = calibrated && source.calibration().is_some();
        if calibrated && lower.iter().any(|&i| source.cross_moment(i).is_none()) {
            return Err(Error::NeedsText {
                what: "predicting the inputs of a layer from those of the one below",
            });
        }
        let joint = |&i: &usize| {
            let [lower, upper] = [&model.layers[i], &model.layers[i + 1]];
            let (query_heads, kv_heads) =
                (lower.query_heads + upper.query_heads, lower.kv_heads + upper.kv_heads);
            AttentionSpec { query_heads, kv_heads, stored: None, ..lower.clone() }
        };
        let layers = lower.iter().map(joint).collect();
        let architecture = Architecture::new(model.model_type.clone(), model.hidden, layers);
        Ok(Self { source, calibrated, lower, architecture })
    }

    /// The lower layer of every pair, ascending.
    pub fn lower(&self) -> &[usize] {
        &self.lower
    }

    /// The heads of a layer and those of the one above, as one layer's.
    ///
    /// # Errors
    /// As [`HeadSource::heads`] and [`joined`].
    pub fn of_lower(&self, layer: usize) -> Result<Heads> {
        let (lower, upper) = (self.source.heads(layer)?, self.source.heads(layer + 1)?);
        let cross = self.calibrated.then(|| self.source.cross_moment(layer)).flatten();
        joined(&lower, &upper, cross.as_ref())
    }

    /// How much of the mean squares of both layers' keys and values is a function of the lower layer's input, from 0 to 1: what the
    /// prediction misses no sharing can give back. 1 where nothing is known of the inputs.
    ///
    /// # Errors
    /// As [`LayerPairs::of_lower`].
    pub fn predicted_share(&self, pair: usize) -> Result<f64> {
        if !self.calibrated {
            return Ok(1.0);
        }
        let layer = self.lower_of(pair)?;
        let (lower, upper) = (self.source.heads(layer)?, self.source.heads(layer + 1)?);
        let joint = self.of_lower(layer)?;
        let whole = energy(&lower) + energy(&upper);
        Ok(if whole > 0.0 { (energy(&joint) / whole).clamp(0.0, 1.0) } else { 1.0 })
    }

    fn lower_of(&self, pair: usize) -> Result<usize> {
        let missing = Error::NoLayer { layer: pair, layers: self.lower.len() };
        self.lower.get(pair).copied().ok_or(missing)
    }
}

impl HeadSource for LayerPairs<'_> {
    fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    fn id(&self) -> Result<ModelId> {
        self.source.id()
    }

    fn heads(&self, pair: usize) -> Result<Heads> {
        Ok(self.of_lower(self.lower_of(pair)?)?.with_layer(pair))
    }

    fn calibration(&self) -> Option<String> {
        self.source.calibration().filter(|_| self.calibrated)
    }
}

/// Whether the upper of two layers can read the keys of the lower one.
fn alike(lower: &AttentionSpec, upper: &AttentionSpec) -> bool {
    let plain = |layer: &AttentionSpec| {
        layer.norms.iter().all(Option::is_none) && layer.sinks.is_none() && layer.alibi.is_none()
    };
    plain(lower)
        && plain(upper)
        && lower.head_dim == upper.head_dim
        && lower.queries_per_head() == upper.queries_per_head()
        && lower.rotary == upper.rotary
        && lower.mask == upper.mask
}

/// The heads of two neighbouring layers as one layer's over the input of the lower one, the lower layer's first; the upper's keys and values
/// as `cross`, the moment of both inputs, and the layers' own moments predict them, or as they are without it.
///
/// Queries and outputs are those of the layers; keys are weighed by queries that see of the lower input what the real ones
/// see of their own ([`Heads::weighing`]). There is no output bias: each layer keeps its own.
///
/// # Errors
/// [`Error::Shape`] for layers of other widths; [`Error::PlanInconsistent`] for biases in one layer alone;
/// [`Error::NoMoment`] with `cross` where a layer has none, [`Error::Moment`] for moments that are none.
pub fn joined(lower: &Heads, upper: &Heads, cross: Option<&CrossMoment>) -> Result<Heads> {
    #[cfg(feature = "linalg")]
    let seen = cross.map(|cross| predicted::Inputs::new(lower, upper, cross)).transpose()?;
    #[cfg(not(feature = "linalg"))]
    if cross.is_some() {
        return Err(Error::NoMoment);
    }
    let both = |own: &Projection, above: &Projection, key: bool| {
        #[cfg(feature = "linalg")]
        if let Some(seen) = seen.as_ref().filter(|_| key) {
            return chained(own, &seen.predicted(above)?);
        }
        let _ = key;
        chained(own, above)
    };
    let heads = Heads::new(both(lower.key(), upper.key(), true)?, both(lower.value(), upper.value(), true)?)?;
    let mut heads = heads.with_rotation(lower.rotation())?.with_layer(lower.layer());
    if let (Some((query, output)), Some((above, columns))) =
        (lower.query().zip(lower.output()), upper.query().zip(upper.output()))
    {
        let outputs = concatenate(Axis(0), &[output, columns]).map_err(Error::plugin)?;
        heads = heads.with_queries(both(query, above, false)?, outputs)?;
        #[cfg(feature = "linalg")]
        if let Some(seen) = &seen {
            heads = heads.with_weighing(chained(query, &seen.weighing(above)?)?)?;
        }
    }
    match lower.moment().filter(|_| cross.is_some()) {
        Some(moment) => heads.with_moment(moment.clone()),
        None => Ok(heads),
    }
}

/// What pooling the joint heads of two layers made, as each layer has it: `lower` heads and `queries` query heads are the lower one's, and
/// the upper one reads the shared heads `below`.
pub(crate) fn parted(joint: Pooled, queries: usize, below: &[usize]) -> Result<[Pooled; 2]> {
    let select = |of: &Projection| of.selected(below);
    let upper = Pooled::new(select(&joint.key)?, select(&joint.value)?);
    let mut lower = Pooled::new(joint.key, joint.value);
    let mut upper = upper;
    if let Some(query) = joint.query {
        let (weight, bias) = query.into_parts();
        let part = |range: std::ops::Range<usize>| {
            let own: Array3<f32> = weight.slice(s![range.clone(), .., ..]).to_owned();
            let bias: Option<Array2<f32>> = bias.as_ref().map(|bias| bias.slice(s![range, ..]).to_owned());
            Projection::new(own, bias)
        };
        lower.query = Some(part(0..queries)?);
        upper.query = Some(part(queries..weight.dim().0)?);
    }
    if let Some(output) = joint.output {
        lower.output = Some(output.slice(s![..queries, .., ..]).to_owned());
        upper.output = Some(output.slice(s![queries.., .., ..]).to_owned());
    }
    Ok([lower, upper])
}

/// The heads of two projections one after the other.
fn chained(own: &Projection, above: &Projection) -> Result<Projection> {
    let weight = concatenate(Axis(0), &[own.weight(), above.weight()]);
    let wrong = |_| {
        let (n, h, d) = own.weight().dim();
        Error::shape("heads of the layer above", &[n, h, d], above.weight().shape())
    };
    let bias = match (own.bias(), above.bias()) {
        (Some(own), Some(above)) => Some(concatenate(Axis(0), &[own, above]).map_err(Error::plugin)?),
        (None, None) => None,
        _ => {
            let what = "two layers cannot share heads of which those of one alone have biases".to_string();
            return Err(Error::PlanInconsistent(what));
        }
    };
    Projection::new(weight.map_err(wrong)?, bias)
}

/// `Σ E‖K x‖² + E‖V x‖²` over the heads of a layer; of one without a moment over white inputs.
fn energy(heads: &Heads) -> f64 {
    let of = |projection: &Projection| {
        let rows = projection.augmented(0..projection.head_dim(), f64::from);
        match heads.moment() {
            Some(moment) => (&rows.dot(&moment.matrix()) * &rows).sum(),
            None => (&rows * &rows).sum(),
        }
    };
    of(heads.key()) + of(heads.value())
}
