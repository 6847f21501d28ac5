//! What is known of a model's inputs: [second moments](Moments), as a file or measured on a text, and the [`Calibration`]
//! that attaches them to the heads of a model.

#[cfg(feature = "runtime")]
mod measure;
mod moments;
#[cfg(feature = "runtime")]
mod opened;

use crate::error::{Error, Result};
use crate::heads::{HeadRows, HeadSource, Heads};
use crate::model::{Architecture, ModelId};
#[cfg(feature = "runtime")]
use crate::runtime::Model;
#[cfg(feature = "runtime")]
use crate::text::Windows;

pub use moments::Moments;

/// A model whose heads carry the moments of their inputs and, where the moments were measured on a text, that text and the
/// model that read it.
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
    #[cfg(feature = "runtime")]
    text: Option<(Model, Windows)>,
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
        match moments.layers().iter().find(|moment| moment.matrix().nrows() != size) {
            Some(other) => Err(Error::shape("input moment", &[size, size], other.matrix().shape())),
            None => Ok(Self {
                source,
                moments,
                #[cfg(feature = "runtime")]
                text: None,
            }),
        }
    }

    /// The moments.
    pub fn moments(&self) -> &Moments {
        &self.moments
    }

    /// The model and the windows that it read; `None` where only moments were given.
    #[cfg(feature = "runtime")]
    #[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
    pub fn text(&self) -> Option<(&Model, &Windows)> {
        self.text.as_ref().map(|(model, windows)| (model, windows))
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

    fn calibration(&self) -> Option<String> {
        Some(self.moments.fingerprint())
    }
}
