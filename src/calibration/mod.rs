//! What is known of a model's inputs: [second moments](Moments), as a file or measured on a text, and the [`Calibration`]
//! that attaches them to the heads of a model.

#[cfg(feature = "runtime")]
mod measure;
mod moments;
#[cfg(feature = "runtime")]
mod opened;
#[cfg(feature = "runtime")]
mod sampled;
#[cfg(feature = "runtime")]
mod sums;

use crate::error::{Error, Result};
use crate::heads::{CrossMoment, HeadRows, HeadSource, Heads};
use crate::model::{Architecture, ModelId};
#[cfg(feature = "runtime")]
use crate::run::Run;
#[cfg(feature = "runtime")]
use crate::runtime::Model;
#[cfg(feature = "runtime")]
use crate::text::{RuntimeError, Texts, windows_that_fit};

pub use moments::Moments;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub use opened::{Extent, Origin, TextSource, read_texts};

/// Tokens that fit, for each input dimension of a layer, below which more text still helps much (docs/calibration.md, "How much
/// text").
pub const ENOUGH_TOKENS_PER_DIMENSION: f64 = 64.0;

/// A model whose heads carry the moments of their inputs, with the energies of their keys, and, where the moments were measured on texts, these texts in their
/// [roles](Texts) and the model that read them.
///
/// ```no_run
/// use qcqa::calibration::{Calibration, Moments};
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::heads::HeadSource;
///
/// let model = Checkpoint::open("model")?;
/// let moments = Moments::read("moments.safetensors".as_ref(), &model.id()?)?;
/// let calibration = Calibration::new(&model, moments)?;
/// assert!(calibration.heads(0)?.moment().is_some());
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug)]
pub struct Calibration<'a> {
    source: &'a dyn HeadSource,
    moments: Moments,
    /// Of every layer and the one above, where they were asked for.
    cross: Vec<CrossMoment>,
    #[cfg(feature = "runtime")]
    text: Option<(Model, Texts)>,
}

impl<'a> Calibration<'a> {
    /// Attaches moments to a model.
    ///
    /// # Errors
    /// [`Error::LayerCount`] unless there is a moment for every layer; [`Error::Shape`] for moments of another width.
    pub fn new(source: &'a dyn HeadSource, moments: Moments) -> Result<Self> {
        let (expected, found) = (source.architecture().n_layers(), moments.n_layers());
        if expected != found {
            return Err(Error::LayerCount { what: "moments", expected, found });
        }
        let size = source.architecture().hidden + 1;
        match moments.layers().iter().find(|moment| moment.size() != size) {
            Some(other) => Err(Error::shape("input moment", &[size, size], &[other.size(); 2])),
            None => Ok(Self {
                source,
                moments,
                cross: Vec::new(),
                #[cfg(feature = "runtime")]
                text: None,
            }),
        }
    }

    /// Measures the [moments of neighbouring layers](HeadSource::cross_moment), too, on the windows that fitted the moments: what calibrated
    /// sharing across layers takes ([`Preset::ClaLowRank`](crate::pipeline::Preset::ClaLowRank)). Progress is stage `"calibrate"`.
    ///
    /// # Errors
    /// [`Error::NeedsText`] where only moments were given; as [`Moments::measure`].
    #[cfg(feature = "runtime")]
    #[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
    pub fn with_cross_moments(self, run: Run<'_>) -> std::result::Result<Self, RuntimeError> {
        let what = "predicting the inputs of a layer from those of the one below";
        let (model, texts) = self.text().ok_or(Error::NeedsText { what })?;
        let cross = measure::cross_moments(model, texts.fit(), run)?;
        Ok(Self { cross, ..self })
    }

    /// The moments.
    pub fn moments(&self) -> &Moments {
        &self.moments
    }

    /// The model that the moments were attached to, as it came without them.
    pub fn source(&self) -> &'a dyn HeadSource {
        self.source
    }

    /// Tokens that fitted the moments, for each of the d input dimensions of a layer.
    pub fn tokens_per_dimension(&self) -> f64 {
        self.moments.tokens() as f64 / self.source.architecture().hidden as f64
    }

    /// Windows of one text that would do, where fewer were read: [`ENOUGH_TOKENS_PER_DIMENSION`] in those that fit, beside those that
    /// validate. `None` where there are enough, and of moments alone.
    #[cfg(feature = "runtime")]
    #[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
    pub fn windows_needed(&self) -> Option<usize> {
        let (_, texts) = self.text()?;
        let tokens = ENOUGH_TOKENS_PER_DIMENSION * self.source.architecture().hidden as f64;
        let windows = windows_that_fit((tokens / texts.fit().length() as f64).ceil() as usize);
        (self.tokens_per_dimension() < ENOUGH_TOKENS_PER_DIMENSION).then_some(windows)
    }

    /// The model and the texts that it read, in their roles; `None` where only moments were given.
    #[cfg(feature = "runtime")]
    #[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
    pub fn text(&self) -> Option<(&Model, &Texts)> {
        self.text.as_ref().map(|(model, texts)| (model, texts))
    }
}

impl HeadSource for Calibration<'_> {
    fn architecture(&self) -> &Architecture {
        self.source.architecture()
    }

    fn id(&self) -> Result<ModelId> {
        self.source.id()
    }

    fn heads(&self, layer: usize) -> Result<Heads> {
        self.moments.attach(self.source.heads(layer)?)
    }

    fn rows(&self, layer: usize) -> Result<Box<dyn HeadRows + '_>> {
        self.source.rows(layer)
    }

    fn cross_moment(&self, layer: usize) -> Option<CrossMoment> {
        self.cross.get(layer).cloned()
    }

    fn calibration(&self) -> Option<String> {
        Some(self.moments.fingerprint())
    }
}
