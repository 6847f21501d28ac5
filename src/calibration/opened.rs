//! Calibrations from files: moments, or a text that they are measured on.

use std::path::Path;

use super::{Calibration, Moments};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::heads::HeadSource;
use crate::plan::Plan;
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{RuntimeError, Vocabulary, Windows, read_file, utf8};

/// A calibration of which nothing has been measured yet.
enum Given {
    Moments(Moments),
    Text(Box<Model>, Windows),
}

impl<'a> Calibration<'a> {
    /// Opens a file or a pipe: moments, recognised by the header of a safetensors file, or a text, of which the first
    /// `most_windows` windows are read. Progress is stage `"calibrate"`.
    ///
    /// # Errors
    /// As [`Moments::read`] or [`Calibration::from_text`].
    pub fn open(
        checkpoint: &'a Checkpoint,
        path: &Path,
        most_windows: usize,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        Given::open(checkpoint, path, most_windows, run)?.measured(checkpoint, run)
    }

    /// Measures the moments on the first `most_windows` windows of a text. Progress is stage `"calibrate"`.
    ///
    /// ```
    /// use qcqa::Run;
    /// use qcqa::calibration::Calibration;
    /// use qcqa::checkpoint::Checkpoint;
    /// use qcqa::heads::HeadSource;
    ///
    /// let model = Checkpoint::open("tests/data/novels-1m")?;
    /// let text = "tests/data/novels-1m/calibration.txt".as_ref();
    /// let calibration = Calibration::from_text(&model, text, 2, Run::new(0))?;
    /// assert!(calibration.heads(0)?.moment().is_some() && calibration.text().is_some());
    /// # Ok::<(), qcqa::text::RuntimeError>(())
    /// ```
    ///
    /// # Errors
    /// As [`read_text`](crate::text::read_text), [`Vocabulary::encode`], [`Model::load_on`] and [`Moments::measure`].
    pub fn from_text(
        checkpoint: &'a Checkpoint,
        path: &Path,
        most_windows: usize,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        Given::text(checkpoint, path, read_file(path)?, most_windows, run)?.measured(checkpoint, run)
    }

    /// Opens the calibration under which the heads of a plan are pooled, as [`Calibration::open`] does; another is refused
    /// before anything is measured.
    ///
    /// # Errors
    /// [`Error::PlanCalibration`]; as [`Calibration::open`].
    pub fn for_plan(
        checkpoint: &'a Checkpoint,
        path: &Path,
        plan: &Plan,
        most_windows: usize,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let given = Given::open(checkpoint, path, most_windows, run)?;
        let (expected, found) = (plan.pooling.calibration.clone(), Some(given.fingerprint()));
        if expected != found {
            return Err(Error::PlanCalibration { expected, found }.into());
        }
        given.measured(checkpoint, run)
    }
}

impl Given {
    fn open(
        checkpoint: &Checkpoint,
        path: &Path,
        most_windows: usize,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        // Once: what a pipe has given it does not give again.
        let bytes = read_file(path)?;
        if Moments::recognised(&bytes) {
            return Ok(Self::Moments(Moments::from_bytes(path, &bytes, &checkpoint.id()?)?));
        }
        Self::text(checkpoint, path, bytes, most_windows, run)
    }

    fn text(
        checkpoint: &Checkpoint,
        path: &Path,
        bytes: Vec<u8>,
        most_windows: usize,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let tokens = Vocabulary::open(checkpoint)?.encode(&utf8(path, bytes)?)?;
        let model = Model::load_on(checkpoint, run.device())?;
        let windows = Windows::new(tokens, model.window())?.first(most_windows);
        Ok(Self::Text(Box::new(model), windows))
    }

    fn fingerprint(&self) -> String {
        match self {
            Self::Moments(moments) => moments.fingerprint(),
            Self::Text(model, windows) => windows.fingerprint(model.id()),
        }
    }

    fn measured<'a>(self, source: &'a Checkpoint, run: Run<'_>) -> Result<Calibration<'a>, RuntimeError> {
        match self {
            Self::Moments(moments) => Ok(Calibration::new(source, moments)?),
            Self::Text(model, windows) => {
                let moments = Moments::measure(&model, &windows, run)?;
                Ok(Calibration { source, moments, text: Some((*model, windows)) })
            }
        }
    }
}
