use std::sync::Arc;

use ndarray::{Array2, ArrayView2};

use crate::error::{Error, Result};

/// The mean squared length of every key head of a layer on each of some windows of text, in the order in which these were read:
/// entry (w, i) is `E_{t∈w} ‖K_i x_t + b_i‖²`, (W, H). Keys are taken as they are projected, before any norm or rotation.
///
/// The mean over windows of one length is what the [`Moment`](super::Moment) of the same text says, `tr K_i C̃ K_iᵀ`; how it changes from window to
/// window is what a moment has forgotten. Cloning shares the numbers.
///
/// ```
/// use qcqa::heads::KeyEnergies;
/// use qcqa::ndarray::array;
///
/// let energies = KeyEnergies::new(array![[4.0, 1.0], [9.0, 1.0]])?;
/// assert_eq!((energies.windows(), energies.n_heads()), (2, 2));
/// assert!(KeyEnergies::new(array![[4.0, -1.0]]).is_err());
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct KeyEnergies(Arc<Array2<f64>>);

impl KeyEnergies {
    /// The energies of H heads on W windows, (W, H).
    ///
    /// # Errors
    /// [`Error::Shape`] unless there is a window and a head; [`Error::KeyEnergies`] for NaN, infinities and negative numbers.
    pub fn new(energies: Array2<f64>) -> Result<Self> {
        let (windows, heads) = energies.dim();
        if windows * heads == 0 {
            return Err(Error::shape("key energies", &[windows.max(1), heads.max(1)], &[windows, heads]));
        }
        if !energies.iter().all(|e| e.is_finite() && *e >= 0.0) {
            return Err(Error::KeyEnergies(Self::RULE));
        }
        Ok(Self(Arc::new(energies.as_standard_layout().into_owned())))
    }

    /// What they must be.
    pub(crate) const RULE: &'static str = "must be finite and at least 0";

    /// Number of windows, W.
    pub fn windows(&self) -> usize {
        self.0.nrows()
    }

    /// Number of key heads, H.
    pub fn n_heads(&self) -> usize {
        self.0.ncols()
    }

    /// The energies, (W, H), contiguous.
    pub fn energies(&self) -> ArrayView2<'_, f64> {
        self.0.view()
    }
}
