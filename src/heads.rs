//! The attention tensors of one layer, checked once when they are made.

use std::sync::Arc;

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3};

use crate::{Error, Partition, Result};

/// One projection of a layer, split into heads: `weight` is (n, h, d), `bias` (n, h).
///
/// Row `weight[i, r, ..]` is row `i·h + r` of the `nn.Linear` weight (out, in). A bias acts as one more
/// input column whose input is always 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    weight: Array3<f32>,
    bias: Option<Array2<f32>>,
}

impl Projection {
    /// A projection of n heads with h rows of d inputs each.
    ///
    /// # Errors
    /// [`Error::Shape`] when a dimension is 0 or the bias is not (n, h).
    pub fn new(weight: Array3<f32>, bias: Option<Array2<f32>>) -> Result<Self> {
        let (n, h, d) = weight.dim();
        if n * h * d == 0 {
            return Err(Error::shape("projection weight", &[n.max(1), h.max(1), d.max(1)], &[n, h, d]));
        }
        if let Some(bias) = bias.as_ref().filter(|b| b.dim() != (n, h)) {
            return Err(Error::shape("projection bias", &[n, h], bias.shape()));
        }
        // Rows of one head lie side by side from here on.
        let weight =
            if weight.is_standard_layout() { weight } else { weight.as_standard_layout().into_owned() };
        Ok(Self { weight, bias: bias.map(|b| b.as_standard_layout().into_owned()) })
    }

    /// Number of heads, n.
    pub fn n_heads(&self) -> usize {
        self.weight.dim().0
    }

    /// Rows of a head, h.
    pub fn head_dim(&self) -> usize {
        self.weight.dim().1
    }

    /// Inputs, d (without the bias column).
    pub fn inputs(&self) -> usize {
        self.weight.dim().2
    }

    /// The weight, (n, h, d), contiguous.
    pub fn weight(&self) -> ArrayView3<'_, f32> {
        self.weight.view()
    }

    /// The bias, (n, h), contiguous.
    pub fn bias(&self) -> Option<ArrayView2<'_, f32>> {
        self.bias.as_ref().map(|b| b.view())
    }

    /// Rows of all heads, one after the other, h·d numbers each.
    pub(crate) fn weight_slice(&self) -> &[f32] {
        self.weight.as_slice().expect("contiguous since it was made")
    }

    /// Biases of all heads, one after the other, h numbers each.
    pub(crate) fn bias_slice(&self) -> Option<&[f32]> {
        self.bias.as_ref().map(|b| b.as_slice().expect("contiguous since it was made"))
    }

    /// Takes the arrays back: weight (n, h, d) and bias (n, h).
    pub fn into_parts(self) -> (Array3<f32>, Option<Array2<f32>>) {
        (self.weight, self.bias)
    }

    fn check_finite(&self, what: &str) -> Result<()> {
        let bias = self.bias.iter().flatten();
        if self.weight.iter().chain(bias).all(|v| v.is_finite()) {
            return Ok(());
        }
        Err(Error::NotFinite { what: what.to_string() })
    }
}

/// Which dimensions of a head the position rotates (RoPE), and how they pair up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rotation {
    /// No rotation: learned positions, ALiBi.
    #[default]
    None,
    /// Dimension f turns with f + dims/2 (Llama, Mistral, Qwen2, GPT-NeoX).
    HalfSplit {
        /// Rotated dimensions, the first ones of the head; even.
        dims: usize,
    },
    /// Dimension 2f turns with 2f + 1 (GPT-J).
    Interleaved {
        /// Rotated dimensions, the first ones of the head; even.
        dims: usize,
    },
}

impl Rotation {
    /// Rotated dimensions; 0 without rotation.
    pub fn dims(&self) -> usize {
        match *self {
            Self::None => 0,
            Self::HalfSplit { dims } | Self::Interleaved { dims } => dims,
        }
    }

    /// The dimensions (a, b) that turn together, for each frequency f < dims/2.
    pub fn pairs(&self) -> impl ExactSizeIterator<Item = (usize, usize)> + use<> {
        let rotation = *self;
        (0..self.dims() / 2).map(move |f| match rotation {
            Self::Interleaved { .. } => (2 * f, 2 * f + 1),
            _ => (f, f + rotation.dims() / 2),
        })
    }
}

/// The heads of one layer: H KV heads and, where the caller has them, their query heads and output columns.
///
/// In a model that already uses GQA the items are its KV heads, each read by r query heads: query head q
/// reads KV head q / r.
#[derive(Debug, Clone)]
pub struct Heads {
    key: Projection,
    value: Projection,
    query: Option<Projection>,
    output: Option<Array3<f32>>,
    output_bias: Option<Array1<f32>>,
    rotation: Rotation,
    moment: Option<Arc<Array2<f64>>>,
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
        if key.weight.dim() != value.weight.dim() {
            return Err(Error::shape("value weight", key.weight.shape(), value.weight.shape()));
        }
        key.check_finite("key projection")?;
        value.check_finite("value projection")?;
        Ok(Self {
            key,
            value,
            query: None,
            output: None,
            output_bias: None,
            rotation: Rotation::None,
            moment: None,
        })
    }

    /// Adds the H·r query heads (H·r, h, d) and the output projection as (H·r, d, h): `output[q]` maps the
    /// h values of query head q to the layer's output.
    ///
    /// # Errors
    /// [`Error::QueryHeads`] when their number is not a multiple of H, [`Error::Shape`] and
    /// [`Error::NotFinite`] as in [`Heads::new`].
    pub fn with_queries(self, query: Projection, output: Array3<f32>) -> Result<Self> {
        let (kv_heads, h, d) = self.key.weight.dim();
        let query_heads = query.n_heads();
        if query_heads % kv_heads != 0 {
            return Err(Error::QueryHeads { query_heads, kv_heads });
        }
        if query.weight.dim() != (query_heads, h, d) {
            return Err(Error::shape("query weight", &[query_heads, h, d], query.weight.shape()));
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

    /// Adds the second moment `E[x xᵀ]` of the layer's inputs with a constant 1 appended, (d+1, d+1).
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::NotFinite`].
    pub fn with_moment(self, moment: Arc<Array2<f64>>) -> Result<Self> {
        let size = self.key.inputs() + 1;
        if moment.dim() != (size, size) {
            return Err(Error::shape("input moment", &[size, size], moment.shape()));
        }
        if !moment.iter().all(|v| v.is_finite()) {
            return Err(Error::NotFinite { what: "input moment".to_string() });
        }
        Ok(Self { moment: Some(moment), ..self })
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

    /// The input moment, (d+1, d+1).
    pub fn moment(&self) -> Option<&Arc<Array2<f64>>> {
        self.moment.as_ref()
    }
}

/// What a pooler makes of a layer: k shared heads, and the query side where it changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Pooled {
    /// Shared keys, (k, h, d); row g belongs to group g of the partition.
    pub key: Projection,
    /// Shared values, (k, h, d).
    pub value: Projection,
    /// Query heads in the source's order, (H·r, h, d); `None` where unchanged.
    pub query: Option<Projection>,
    /// Output projection in the source's order, (H·r, d, h); `None` where unchanged.
    pub output: Option<Array3<f32>>,
    /// Bias of the output projection, (D); `None` where unchanged.
    pub output_bias: Option<Array1<f32>>,
}

impl Pooled {
    /// Checks that this is what `heads` may become under a partition.
    ///
    /// # Errors
    /// [`Error::PartitionSize`] for a partition of another number of heads, [`Error::Shape`] naming the tensor,
    /// [`Error::NotFinite`].
    pub fn check(&self, heads: &Heads, partition: &Partition) -> Result<()> {
        let (n_heads, h, d) = heads.key.weight.dim();
        if partition.n_heads() != n_heads {
            return Err(Error::PartitionSize { expected: n_heads, found: partition.n_heads() });
        }
        let k = partition.n_groups();
        for (what, pooled, source) in
            [("pooled key", &self.key, &heads.key), ("pooled value", &self.value, &heads.value)]
        {
            if pooled.weight.dim() != (k, h, d) {
                return Err(Error::shape(what, &[k, h, d], pooled.weight.shape()));
            }
            same_bias(what, pooled, source)?;
            pooled.check_finite(what)?;
        }
        if let (Some(pooled), Some(source)) = (&self.query, &heads.query) {
            if pooled.weight.dim() != source.weight.dim() {
                return Err(Error::shape("pooled query", source.weight.shape(), pooled.weight.shape()));
            }
            same_bias("pooled query", pooled, source)?;
            pooled.check_finite("pooled query")?;
        }
        if let (Some(pooled), Some(source)) = (&self.output, &heads.output) {
            if pooled.dim() != source.dim() {
                return Err(Error::shape("pooled output", source.shape(), pooled.shape()));
            }
            if !pooled.iter().all(|v| v.is_finite()) {
                return Err(Error::NotFinite { what: "pooled output".to_string() });
            }
        }
        if let Some(pooled) = &self.output_bias {
            let expected = heads.output_bias.as_ref().map_or(0, |bias| bias.len());
            if pooled.len() != expected {
                return Err(Error::shape("pooled output bias", &[expected], pooled.shape()));
            }
            if !pooled.iter().all(|v| v.is_finite()) {
                return Err(Error::NotFinite { what: "pooled output bias".to_string() });
            }
        }
        Ok(())
    }
}

/// A pooled projection has a bias exactly where its source has one.
fn same_bias(what: &str, pooled: &Projection, source: &Projection) -> Result<()> {
    if pooled.bias.is_some() == source.bias.is_some() {
        return Ok(());
    }
    let shape = |p: &Projection| p.bias.as_ref().map_or(vec![0, 0], |b| b.shape().to_vec());
    Err(Error::shape(format!("{what} bias"), &shape(source), &shape(pooled)))
}
