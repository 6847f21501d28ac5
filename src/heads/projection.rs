use std::ops::Range;

use ndarray::{Array2, Array3, ArrayView2, ArrayView3, Axis};

use crate::error::{Error, Result};

/// One projection of a layer, split into heads: `weight` is (n, h, d), `bias` (n, h).
///
/// Row `weight[i, r, ..]` is row `i·h + r` of the `nn.Linear` weight (out, in). A bias acts as one more
/// input column whose input is always 1.
///
/// ```
/// use qcqa::heads::Projection;
/// use qcqa::ndarray::Array3;
///
/// let weight = Array3::from_shape_fn((2, 3, 4), |(i, r, c)| (100 * i + 10 * r + c) as f32);
/// let projection = Projection::new(weight, None)?;
/// assert_eq!((projection.n_heads(), projection.head_dim(), projection.inputs()), (2, 3, 4));
///
/// let rows = projection.augmented(0..3, f32::from);
/// assert_eq!(rows.dim(), (6, 5));
/// assert_eq!(Projection::from_augmented(&rows, 3, false)?, projection);
/// # Ok::<(), qcqa::Error>(())
/// ```
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

    /// Rows `part` of every head, one head after the other, with the bias as one more column, 0 where there is none:
    /// (n·|part|, d+1), every number changed by `number`.
    ///
    /// # Panics
    /// When a head has no such rows.
    pub fn augmented<T>(&self, part: Range<usize>, number: impl Fn(f32) -> T) -> Array2<T> {
        let (n, d, len) = (self.n_heads(), self.inputs(), part.len());
        Array2::from_shape_fn((n * len, d + 1), |(row, column)| {
            let (head, row) = (row / len, part.start + row % len);
            number(match &self.bias {
                _ if column < d => self.weight[[head, row, column]],
                Some(bias) => bias[[head, row]],
                None => 0.0,
            })
        })
    }

    /// The projection whose [`augmented`](Self::augmented) rows these are, h rows a head; the last column is dropped
    /// unless there is a `bias`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the rows are no whole number of heads or only a bias.
    pub fn from_augmented(rows: &Array2<f32>, head_dim: usize, bias: bool) -> Result<Self> {
        let (h, (count, width)) = (head_dim.max(1), rows.dim());
        if count % h != 0 || width < 2 {
            return Err(Error::shape(
                "augmented rows",
                &[count.next_multiple_of(h), width.max(2)],
                rows.shape(),
            ));
        }
        let (n, d) = (count / h, width - 1);
        let weight = Array3::from_shape_fn((n, h, d), |(i, row, column)| rows[[i * h + row, column]]);
        let bias = bias.then(|| Array2::from_shape_fn((n, h), |(i, row)| rows[[i * h + row, d]]));
        Self::new(weight, bias)
    }

    /// Some of its heads, in this order.
    ///
    /// # Errors
    /// [`Error::Shape`] of none; [`Error::HeadOutOfRange`].
    pub(crate) fn selected(&self, heads: &[usize]) -> Result<Self> {
        let n_heads = self.n_heads();
        if let Some(&head) = heads.iter().find(|&&head| head >= n_heads) {
            return Err(Error::HeadOutOfRange { head, n_heads });
        }
        let bias = self.bias.as_ref().map(|bias| bias.select(Axis(0), heads));
        Self::new(self.weight.select(Axis(0), heads), bias)
    }

    /// Takes the arrays back: weight (n, h, d) and bias (n, h).
    pub fn into_parts(self) -> (Array3<f32>, Option<Array2<f32>>) {
        (self.weight, self.bias)
    }

    pub(super) fn check_finite(&self, what: &str) -> Result<()> {
        let bias = self.bias.iter().flatten();
        if self.weight.iter().chain(bias).all(|v| v.is_finite()) {
            return Ok(());
        }
        Err(Error::NotFinite { what: what.to_string() })
    }
}
