/// What a norm divides by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum NormKind {
    /// The root mean square: `w ⊙ x / √(mean x² + ε)` (Zhang & Sennrich 2019, arXiv 1910.07467).
    #[default]
    Rms,
    /// The standard deviation, and the mean goes: `w ⊙ (x − mean x) / √(var x + ε) + b` (Ba et al. 2016, arXiv 1607.06450).
    Layer,
}

/// A norm by its tensors' names.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Norm {
    /// What it divides by.
    pub kind: NormKind,
    /// Name of w; `None` where it is 1.
    pub weight: Option<String>,
    /// Name of b, of a [`NormKind::Layer`]; `None` where it is 0.
    pub bias: Option<String>,
    /// ε.
    pub epsilon: f64,
    /// What is added to the stored w: 1 where files hold w − 1.
    pub offset: f64,
}

impl Norm {
    /// The root mean square norm with this weight and ε.
    pub fn new(weight: impl Into<String>, epsilon: f64) -> Self {
        Self { kind: NormKind::Rms, weight: Some(weight.into()), bias: None, epsilon, offset: 0.0 }
    }

    /// Replaces what it divides by.
    pub fn with_kind(self, kind: NormKind) -> Self {
        Self { kind, ..self }
    }

    /// Adds the name of the bias, where there is one.
    pub fn with_bias(self, bias: Option<String>) -> Self {
        Self { bias, ..self }
    }

    /// Says what is added to the stored weight.
    pub fn with_offset(self, offset: f64) -> Self {
        Self { offset, ..self }
    }

    /// Names of its tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.weight.as_deref().into_iter().chain(self.bias.as_deref())
    }
}

/// A norm between projection and rotation, of queries or of keys.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct HeadNorm {
    /// The norm.
    pub norm: Norm,
    /// What it is taken over.
    pub over: NormOver,
    /// Names of w of every head, where each has a tensor (h) of its own; the norm then names none.
    pub heads: Vec<String>,
}

impl HeadNorm {
    /// This norm, taken over that.
    pub fn new(norm: Norm, over: NormOver) -> Self {
        Self { norm, over, heads: Vec::new() }
    }

    /// Each head with a norm of its own, whose weights are in these tensors.
    pub fn of_heads(norm: Norm, heads: Vec<String>) -> Self {
        Self { norm: Norm { weight: None, ..norm }, over: NormOver::OwnHead, heads }
    }

    /// Names of its tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.heads.iter().map(String::as_str).chain(self.norm.tensors())
    }
}

/// What a norm of queries or keys is taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormOver {
    /// Each head for itself, all with the same weight (h): Qwen3, Gemma 3.
    Head,
    /// Each head for itself and with weights of its own, (heads, h): Cohere, StableLM.
    OwnHead,
    /// All heads of a token together, weight (heads·h): OLMo 2.
    Width,
}
