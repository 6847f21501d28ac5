use std::sync::Arc;

use ndarray::Array2;

use crate::error::{Error, Result};

/// How far a moment may be from symmetric and from ending with 1, as a share of `√(C_ii C_jj)` and of 1.
const ROUNDING: f64 = 1e-6;

/// The second moment `C̃ = E[x̃ x̃ᵀ]` of a layer's inputs with a constant 1 appended, `x̃ = (x, 1)`: (d+1, d+1), symmetric.
///
/// What is no moment cannot be one of these, but for negative eigenvalues, which show only where they are computed.
/// Cloning shares the numbers, of which half are held.
///
/// ```
/// use qcqa::heads::Moment;
/// use qcqa::ndarray::array;
///
/// // Inputs 1 and 3, half of the time each: E[x²] = 5, E[x] = 2.
/// assert!(Moment::new(array![[5.0, 2.0], [2.0, 1.0]]).is_ok());
/// assert!(Moment::new(array![[5.0, 2.0], [7.0, 1.0]]).is_err());
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Moment {
    /// d + 1.
    size: usize,
    /// Row i up to the diagonal, for every i.
    half: Arc<[f64]>,
}

impl Moment {
    /// A moment, made exactly symmetric.
    ///
    /// # Errors
    /// [`Error::Shape`] unless it is square with at least one input; [`Error::Moment`] for NaN and infinities, asymmetry
    /// beyond 1e-6, a negative diagonal, a last entry other than 1, or inputs that were 0 throughout: any shared head would
    /// seem to lose nothing.
    pub fn new(matrix: Array2<f64>) -> Result<Self> {
        let (n, m) = matrix.dim();
        if n != m || n < 2 {
            return Err(Error::shape("input moment", &[n.max(2), n.max(2)], &[n, m]));
        }
        let rules: [(bool, &'static str); 5] = [
            (!matrix.iter().all(|v| v.is_finite()), "holds NaN or infinities"),
            (matrix.diag().iter().any(|&v| v < 0.0), "has a negative diagonal, so it is no second moment"),
            (!is_symmetric(&matrix), "is not symmetric, so it is no second moment"),
            (
                (matrix[[n - 1, n - 1]] - 1.0).abs() > ROUNDING,
                "must end with 1, the moment of the constant that is appended to the input",
            ),
            (
                matrix.diag().iter().take(n - 1).all(|&v| v == 0.0),
                "is 0 for every input, so nothing was measured",
            ),
        ];
        match rules.into_iter().find(|(broken, _)| *broken) {
            Some((_, rule)) => Err(Error::Moment { layer: None, rule }),
            None => {
                let half = (0..n).flat_map(|i| (0..=i).map(move |j| (i, j)));
                let half = half.map(|(i, j)| (matrix[[i, j]] + matrix[[j, i]]) * 0.5).collect();
                Ok(Self { size: n, half })
            }
        }
    }

    /// Inputs with the constant, d + 1.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The numbers, (d+1, d+1).
    pub fn matrix(&self) -> Array2<f64> {
        let at = |(i, j): (usize, usize)| {
            let (row, column) = (i.max(j), i.min(j));
            self.half[row * (row + 1) / 2 + column]
        };
        Array2::from_shape_fn((self.size, self.size), at)
    }
}

/// The second moment `E[x̃_{l+1} x̃_lᵀ]` of the attention inputs of two neighbouring layers at the same tokens, each with a constant 1
/// appended: (d+1, d+1), the upper layer's inputs along the rows.
///
/// Cloning shares the numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossMoment(Arc<Array2<f64>>);

impl CrossMoment {
    /// A moment of two layers.
    ///
    /// # Errors
    /// [`Error::Shape`] unless it is square with at least one input; [`Error::Moment`] for NaN and infinities, or a last entry other than 1.
    pub fn new(matrix: Array2<f64>) -> Result<Self> {
        let (n, m) = matrix.dim();
        if n != m || n < 2 {
            return Err(Error::shape("joint moment", &[n.max(2), n.max(2)], &[n, m]));
        }
        let rule = if !matrix.iter().all(|v| v.is_finite()) {
            "holds NaN or infinities"
        } else if (matrix[[n - 1, n - 1]] - 1.0).abs() > ROUNDING {
            "must end with 1, the moment of the constant that is appended to the input"
        } else {
            return Ok(Self(Arc::new(matrix)));
        };
        Err(Error::Moment { layer: None, rule })
    }

    /// The numbers, (d+1, d+1).
    pub fn matrix(&self) -> &Array2<f64> {
        &self.0
    }
}

fn is_symmetric(matrix: &Array2<f64>) -> bool {
    matrix
        .indexed_iter()
        .all(|((i, j), &v)| (v - matrix[[j, i]]).abs() <= ROUNDING * (matrix[[i, i]] * matrix[[j, j]]).sqrt())
}
