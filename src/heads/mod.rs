//! The attention tensors of one layer, checked once when they are made, and where layers come from.

mod energies;
mod moment;
mod pooled;
mod projection;
mod rows;
mod source;

use ndarray::{Array1, Array3, ArrayView1, ArrayView3};

use crate::error::{Error, Result};
use crate::model::{NormOver, Rotation};
use crate::partition::Partition;

pub use energies::KeyEnergies;
pub use moment::{CrossMoment, Moment};
pub use pooled::Pooled;
pub use projection::Projection;
pub use rows::HeadRows;
#[cfg(feature = "checkpoint")]
pub(crate) use rows::read_across;
pub use source::{HeadSource, InMemory, Needs};

/// The heads of one layer: H KV heads and, where the caller has them, their query heads and output columns.
///
/// In a model that already uses GQA the items are its KV heads, each read by r query heads: query head q
/// reads KV head q / r.
///
/// ```
/// use qcqa::heads::{Heads, Projection};
/// use qcqa::ndarray::Array3;
///
/// let weight = Array3::from_shape_fn((4, 2, 3), |(i, r, c)| (i + r * c) as f32);
/// let heads = Heads::new(Projection::new(weight.clone(), None)?, Projection::new(weight, None)?)?;
/// assert_eq!((heads.n_heads(), heads.queries_per_head(), heads.layer()), (4, 1, 0));
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Heads {
    layer: usize,
    key: Projection,
    value: Projection,
    query: Option<Projection>,
    output: Option<Array3<f32>>,
    output_bias: Option<Array1<f32>>,
    rotation: Rotation,
    key_norm: Option<NormOver>,
    moment: Option<Moment>,
    key_energies: Option<KeyEnergies>,
    weighing: Option<Projection>,
}

impl Heads {
    /// A layer of H KV heads: key and value projections (H, h, d).
    ///
    /// # Errors
    /// [`Error::HeadCount`] above [`Partition::MAX_HEADS`] heads, [`Error::Shape`] when key and value differ in
    /// shape, [`Error::NotFinite`] when a weight is NaN or infinite.
    pub fn new(key: Projection, value: Projection) -> Result<Self> {
        let n_heads = key.n_heads();
        if n_heads > Partition::MAX_HEADS {
            return Err(Error::HeadCount { n_heads, max: Partition::MAX_HEADS });
        }
        if key.weight().dim() != value.weight().dim() {
            return Err(Error::shape("value weight", key.weight().shape(), value.weight().shape()));
        }
        key.check_finite("key projection")?;
        value.check_finite("value projection")?;
        Ok(Self {
            layer: 0,
            key,
            value,
            query: None,
            output: None,
            output_bias: None,
            rotation: Rotation::None,
            key_norm: None,
            moment: None,
            key_energies: None,
            weighing: None,
        })
    }

    /// Adds the H·r query heads (H·r, h, d) and the output projection as (H·r, d, h): `output[q]` maps the
    /// h values of query head q to the layer's output.
    ///
    /// # Errors
    /// [`Error::QueryHeads`] when their number is not a multiple of H, [`Error::Shape`] and
    /// [`Error::NotFinite`] as in [`Heads::new`].
    pub fn with_queries(self, query: Projection, output: Array3<f32>) -> Result<Self> {
        let (kv_heads, h, d) = self.key.weight().dim();
        let query_heads = query.n_heads();
        if query_heads % kv_heads != 0 {
            return Err(Error::QueryHeads { query_heads, kv_heads });
        }
        if query.weight().dim() != (query_heads, h, d) {
            return Err(Error::shape("query weight", &[query_heads, h, d], query.weight().shape()));
        }
        let (n, out, columns) = output.dim();
        if (n, columns) != (query_heads, h) || out == 0 {
            return Err(Error::shape("output projection", &[query_heads, out.max(1), h], output.shape()));
        }
        query.check_finite("query projection")?;
        if !output.iter().all(|v| v.is_finite()) {
            return Err(Error::NotFinite { what: "output projection".to_string() });
        }
        Ok(Self { query: Some(query), output: Some(output), ..self })
    }

    /// Adds the bias of the output projection, (D).
    ///
    /// # Errors
    /// [`Error::NoQueries`] before the output projection is given, [`Error::Shape`], [`Error::NotFinite`].
    pub fn with_output_bias(self, bias: Array1<f32>) -> Result<Self> {
        let outputs = self.output.as_ref().ok_or(Error::NoQueries)?.dim().1;
        if bias.len() != outputs {
            return Err(Error::shape("output bias", &[outputs], bias.shape()));
        }
        if !bias.iter().all(|v| v.is_finite()) {
            return Err(Error::NotFinite { what: "output bias".to_string() });
        }
        Ok(Self { output_bias: Some(bias), ..self })
    }

    /// States how positions rotate keys and queries.
    ///
    /// # Errors
    /// [`Error::Rotation`] when the rotated dimensions are odd in number or more than a head has.
    pub fn with_rotation(self, rotation: Rotation) -> Result<Self> {
        let (dims, head_dim) = (rotation.dims(), self.key.head_dim());
        if dims % 2 != 0 || dims > head_dim {
            return Err(Error::Rotation { dims, head_dim });
        }
        Ok(Self { rotation, ..self })
    }

    /// States that keys and queries go through a norm before they turn: then queries can undo nothing but turns, and those only
    /// as far as the norm's weights are equal on what turns together.
    pub fn with_key_norm(self, over: NormOver) -> Self {
        Self { key_norm: Some(over), ..self }
    }

    /// Adds the second moment of the layer's inputs.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is of inputs of another width.
    pub fn with_moment(self, moment: Moment) -> Result<Self> {
        let size = self.key.inputs() + 1;
        if moment.size() != size {
            return Err(Error::shape("input moment", &[size, size], &[moment.size(); 2]));
        }
        Ok(Self { moment: Some(moment), ..self })
    }

    /// Adds the energies of the keys on windows of text.
    ///
    /// # Errors
    /// [`Error::Shape`] when they are of another number of heads.
    pub fn with_key_energies(self, energies: KeyEnergies) -> Result<Self> {
        let (windows, n_heads) = energies.energies().dim();
        if n_heads != self.n_heads() {
            return Err(Error::shape("key energies", &[windows, self.n_heads()], &[windows, n_heads]));
        }
        Ok(Self { key_energies: Some(energies), ..self })
    }

    /// Gives query heads that stand for the real ones where keys are weighed by what reads them, (H·r, h, d): of queries that read other
    /// inputs than the keys, such as have the same second moment under those of the keys.
    ///
    /// # Errors
    /// [`Error::NoQueries`] before the queries are given, [`Error::Shape`], [`Error::NotFinite`].
    pub fn with_weighing(self, queries: Projection) -> Result<Self> {
        let expected = self.query.as_ref().ok_or(Error::NoQueries)?.weight().dim();
        if queries.weight().dim() != expected {
            let (n, h, d) = expected;
            return Err(Error::shape("weighing queries", &[n, h, d], queries.weight().shape()));
        }
        queries.check_finite("weighing queries")?;
        Ok(Self { weighing: Some(queries), ..self })
    }

    /// Says which layer of its model this is, counted from 0.
    pub fn with_layer(self, layer: usize) -> Self {
        Self { layer, ..self }
    }

    /// Index of the layer in its model; 0 where nobody said.
    pub fn layer(&self) -> usize {
        self.layer
    }

    /// Number of KV heads, H.
    pub fn n_heads(&self) -> usize {
        self.key.n_heads()
    }

    /// Query heads of each KV head, r; 1 where the query heads were not given.
    pub fn queries_per_head(&self) -> usize {
        self.query.as_ref().map_or(1, |q| q.n_heads() / self.n_heads())
    }

    /// Key projection, (H, h, d).
    pub fn key(&self) -> &Projection {
        &self.key
    }

    /// Value projection, (H, h, d).
    pub fn value(&self) -> &Projection {
        &self.value
    }

    /// Query projection, (H·r, h, d).
    pub fn query(&self) -> Option<&Projection> {
        self.query.as_ref()
    }

    /// The query heads by which keys are weighed: those of the layer, unless others stand for them.
    pub fn weighing(&self) -> Option<&Projection> {
        self.weighing.as_ref().or(self.query.as_ref())
    }

    /// Output projection, (H·r, d, h).
    pub fn output(&self) -> Option<ArrayView3<'_, f32>> {
        self.output.as_ref().map(|o| o.view())
    }

    /// Bias of the output projection, (D).
    pub fn output_bias(&self) -> Option<ArrayView1<'_, f32>> {
        self.output_bias.as_ref().map(|b| b.view())
    }

    /// The rotation of keys and queries.
    pub fn rotation(&self) -> Rotation {
        self.rotation
    }

    /// What the norm of keys and queries is taken over, where there is one.
    pub fn key_norm(&self) -> Option<NormOver> {
        self.key_norm
    }

    /// The second moment of the layer's inputs, where it is known.
    pub fn moment(&self) -> Option<&Moment> {
        self.moment.as_ref()
    }

    /// The energies of the keys on windows of text, where they are known.
    pub fn key_energies(&self) -> Option<&KeyEnergies> {
        self.key_energies.as_ref()
    }
}
