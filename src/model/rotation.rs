use std::borrow::Cow;

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
    /// What turned pairs are multiplied by besides.
    pub factor: f64,
    /// What becomes of the frequencies in long texts.
    pub stretch: Stretch,
}

/// What becomes of frequencies in texts that are longer than those that a model was first trained on.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum Stretch {
    /// Nothing.
    #[default]
    Fixed,
    /// Beyond so many tokens they are others (LongRoPE, Ding et al. 2024, arXiv 2402.13753).
    Beyond {
        /// Tokens up to which they are as they are.
        tokens: usize,
        /// Those for longer texts.
        frequencies: Vec<f32>,
    },
    /// Beyond so many tokens the base grows with the length of the text: `θ (s·n/tokens − s + 1)^(ρ/(ρ−2))` for n tokens.
    Dynamic {
        /// The base, θ.
        theta: f64,
        /// s.
        factor: f64,
        /// Tokens up to which it is θ.
        tokens: usize,
    },
}

impl Rotary {
    /// The usual frequencies, `theta^(−2f/ρ)`, rounded to f32 as transformers does.
    pub fn from_theta(rotation: Rotation, theta: f64) -> Self {
        Self::new(rotation, usual(rotation, theta))
    }

    /// These frequencies, one for each pair.
    pub fn new(rotation: Rotation, frequencies: Vec<f32>) -> Self {
        Self { rotation, frequencies, factor: 1.0, stretch: Stretch::Fixed }
    }

    /// Says what turned pairs are multiplied by.
    pub fn with_factor(self, factor: f64) -> Self {
        Self { factor, ..self }
    }

    /// Says what becomes of the frequencies in long texts.
    pub fn with_stretch(self, stretch: Stretch) -> Self {
        Self { stretch, ..self }
    }

    /// The frequencies in a text of so many tokens.
    pub fn frequencies_of(&self, tokens: usize) -> Cow<'_, [f32]> {
        match &self.stretch {
            Stretch::Beyond { tokens: most, frequencies } if tokens > *most => Cow::Borrowed(frequencies),
            Stretch::Dynamic { theta, factor, tokens: most } if tokens > *most => {
                let dims = self.rotation.dims() as f64;
                let growth = factor * tokens as f64 / *most as f64 - (factor - 1.0);
                Cow::Owned(usual(self.rotation, theta * growth.powf(dims / (dims - 2.0))))
            }
            _ => Cow::Borrowed(&self.frequencies),
        }
    }
}

fn usual(rotation: Rotation, theta: f64) -> Vec<f32> {
    let dims = rotation.dims();
    (0..dims / 2).map(|f| theta.powf(-2.0 * f as f64 / dims as f64) as f32).collect()
}
