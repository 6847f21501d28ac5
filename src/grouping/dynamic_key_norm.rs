use crate::error::{Error, Result};
use crate::grouping::{Grouping, KeyNorm};
use crate::heads::{Heads, KeyEnergies, Needs};
use crate::partition::Partition;
use crate::spec::Spec;

/// Neighbouring heads in groups whose sizes follow the norms of their keys on a text, averaged exponentially over its windows:
/// DGQA-EMA of key-driven grouping (Khan et al. 2024, arXiv 2408.08454) for a model that is no longer trained.
///
/// Key head i has the norm `n_wi = (E_{t∈w} ‖K_i x_t + b_i‖²)^½` on window w ([`KeyEnergies`]), and
/// `n̄_1i = n_1i`, `n̄_wi = α n_wi + (1 − α) n̄_{w−1,i}`: the later a window stands in the calibration text, the more it counts, by
/// a factor of 1/(1 − α) from one to the next. The last average makes groups as [`KeyNorm`] does: runs of neighbours, sizes by
/// largest remainder. There is a partition for every k.
///
/// The paper follows the norms while the model is trained, window after window of steps. Here the weights stand still, and what changes from
/// window to window is the text; what that departs in is in docs/method.md, "Key-driven grouping".
///
/// ```
/// use qcqa::grouping::DynamicKeyNorm;
/// use qcqa::heads::KeyEnergies;
/// use qcqa::ndarray::array;
///
/// // Norms 2 and 1 on the first window, 4 and 1 on the second.
/// let energies = KeyEnergies::new(array![[4.0, 1.0], [16.0, 1.0]])?;
/// assert_eq!(DynamicKeyNorm { smoothing: 0.25 }.norms(&energies)?, [2.5, 1.0]);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DynamicKeyNorm {
    /// The smoothing factor α, above 0 and at most 1: the weight of the newest window. 0.1 by default, so that about the last
    /// twenty windows count (2/α − 1); 1 is the last window alone.
    pub smoothing: f64,
}

impl Default for DynamicKeyNorm {
    fn default() -> Self {
        Self { smoothing: 0.1 }
    }
}

impl DynamicKeyNorm {
    pub(super) fn from_spec(spec: &Spec) -> Result<Self> {
        spec.only(&["smoothing"])?;
        let smoothing = spec.number("smoothing")?.unwrap_or(Self::default().smoothing);
        Self { smoothing }.checked()
    }

    fn checked(self) -> Result<Self> {
        match self.smoothing > 0.0 && self.smoothing <= 1.0 {
            true => Ok(self),
            false => Err(Error::setting("smoothing", self.smoothing, "above 0 and at most 1")),
        }
    }

    /// The exponential average of the norms of every key head over the windows, H numbers.
    ///
    /// # Errors
    /// [`Error::Setting`] for a smoothing factor that is none.
    pub fn norms(&self, energies: &KeyEnergies) -> Result<Vec<f64>> {
        let Self { smoothing } = self.checked()?;
        let mut windows = energies.energies().into_outer_iter().map(|window| window.mapv(f64::sqrt));
        let first = windows.next().into_iter().flatten().collect();
        let next = |mut average: Vec<f64>, norms: ndarray::Array1<f64>| {
            average
                .iter_mut()
                .zip(norms)
                .for_each(|(average, norm)| *average += smoothing * (norm - *average));
            average
        };
        Ok(windows.fold(first, next))
    }
}

impl Grouping for DynamicKeyNorm {
    fn spec(&self) -> Spec {
        Spec::new("key-norm-ema").with("smoothing", self.smoothing)
    }

    /// # Errors
    /// [`Error::KeyEnergies`] for heads without them; [`Error::Setting`]; as [`KeyNorm::partition`].
    fn group(&self, heads: &Heads, k: usize) -> Result<Option<Partition>> {
        let missing = match heads.moment() {
            Some(_) => "are not among these moments: measure them again on a text",
            None => "are not known: give a calibration text",
        };
        let energies = heads.key_energies().ok_or(Error::KeyEnergies(missing))?;
        KeyNorm::partition(&self.norms(energies)?, k).map(Some)
    }

    fn needs(&self) -> Needs {
        Needs::KEY_ENERGIES
    }
}
