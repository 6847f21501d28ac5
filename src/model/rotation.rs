/// Which dimensions of a head the position rotates (RoPE, Su et al. 2021, arXiv 2104.09864), and how they pair up.
///
/// ```
/// use qcqa::model::Rotation;
///
/// assert!(Rotation::HalfSplit { dims: 4 }.pairs().eq([(0, 2), (1, 3)]));
/// assert!(Rotation::Interleaved { dims: 4 }.pairs().eq([(0, 1), (2, 3)]));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rotation {
    /// No rotation: learned positions, ALiBi.
    #[default]
    None,
    /// Dimension f turns with f + dims/2.
    HalfSplit {
        /// Rotated dimensions, the first ones of the head; even.
        dims: usize,
    },
    /// Dimension 2f turns with 2f + 1.
    Interleaved {
        /// Rotated dimensions, the first ones of the head; even.
        dims: usize,
    },
}

impl Rotation {
    /// Rotated dimensions, ρ; 0 without rotation.
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

/// A rotation with its frequencies: at position t the pair of frequency f turns by `t · frequencies[f]` radians.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Rotary {
    /// Which dimensions turn together.
    pub rotation: Rotation,
    /// Radians per position of each pair.
    pub frequencies: Vec<f32>,
}

impl Rotary {
    /// The usual frequencies, `theta^(−2f/ρ)`, rounded to f32 as transformers does.
    pub fn from_theta(rotation: Rotation, theta: f64) -> Self {
        let dims = rotation.dims();
        let frequency = |f: usize| theta.powf(-2.0 * f as f64 / dims as f64) as f32;
        Self { rotation, frequencies: (0..dims / 2).map(frequency).collect() }
    }
}
