use std::fs;
use std::path::Path;

use super::text::utf8;
use super::{Model, Moments, RuntimeError, Vocabulary, Windows};
use crate::checkpoint::Checkpoint;
use crate::{Error, Heads, KvPooler, Plan, PoolLayer, Run};

/// The longest header of a safetensors file.
const LONGEST_HEADER: u64 = 100_000_000;

/// What is known of a model's inputs: the moments and, where they were measured on a text, that text and the model that
/// read it.
#[derive(Debug, Clone)]
pub struct Calibration {
    moments: Moments,
    text: Option<(Model, Windows)>,
}

/// A calibration of which nothing has been measured yet.
enum Given {
    Moments(Moments),
    Text(Box<Model>, Windows),
}

impl Calibration {
    /// Opens a file or a pipe: moments, recognised by the header of a safetensors file, or a text, of which the first
    /// `most_windows` windows are read. Progress is stage `"calibrate"`.
    ///
    /// # Errors
    /// As [`Moments::read`], or as [`read_text`](super::read_text), [`Vocabulary::encode`], [`Model::load`] and [`Moments::measure`].
    pub fn open(
        path: &Path,
        checkpoint: &Checkpoint,
        most_windows: usize,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        Given::open(path, checkpoint, most_windows)?.measured(run)
    }

    /// The same for a plan: refused before anything is measured unless the plan was made with this calibration.
    ///
    /// # Errors
    /// [`RuntimeError::PlanCalibration`]; as [`Calibration::open`].
    pub fn of_plan(
        path: &Path,
        plan: &Plan,
        checkpoint: &Checkpoint,
        most_windows: usize,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let given = Given::open(path, checkpoint, most_windows)?;
        made_with(plan, Some(given.fingerprint()))?;
        given.measured(run)
    }

    /// The moments.
    pub fn moments(&self) -> &Moments {
        &self.moments
    }

    /// The model and the windows that it read; `None` where only moments were given.
    pub fn text(&self) -> Option<(&Model, &Windows)> {
        self.text.as_ref().map(|(model, windows)| (model, windows))
    }
}

impl Given {
    fn open(path: &Path, checkpoint: &Checkpoint, most_windows: usize) -> Result<Self, RuntimeError> {
        // Once: what a pipe has given it does not give again.
        let bytes = fs::read(path).map_err(|e| RuntimeError::io("read", path, e))?;
        if are_moments(&bytes) {
            return Ok(Self::Moments(Moments::from_bytes(path, &bytes, &checkpoint.source()?)?));
        }
        let tokens = Vocabulary::open(checkpoint)?.encode(&utf8(path, bytes)?)?;
        let model = Model::load(checkpoint)?;
        let windows = Windows::new(tokens, model.window())?.first(most_windows);
        Ok(Self::Text(Box::new(model), windows))
    }

    fn fingerprint(&self) -> String {
        match self {
            Self::Moments(moments) => moments.fingerprint(),
            Self::Text(model, windows) => Moments::fingerprint_of(model.source(), windows),
        }
    }

    fn measured(self, run: Run<'_>) -> Result<Calibration, RuntimeError> {
        match self {
            Self::Moments(moments) => Ok(Calibration { moments, text: None }),
            Self::Text(model, windows) => {
                let moments = Moments::measure(&model, &windows, run)?;
                Ok(Calibration { moments, text: Some((*model, windows)) })
            }
        }
    }
}

/// Checks that a plan was made with the calibration of this fingerprint; `None` for none.
///
/// # Errors
/// [`RuntimeError::PlanCalibration`].
pub fn made_with(plan: &Plan, found: Option<String>) -> Result<(), RuntimeError> {
    let expected = plan.calibration.clone();
    if expected == found { Ok(()) } else { Err(RuntimeError::PlanCalibration { expected, found }) }
}

/// What makes the shared heads of each layer of a plan by a pooler, under the moments where there are any: for
/// [`convert_with`](crate::checkpoint::convert_with) and [`Model::planned_with`]. Beyond the layers of the plan it reports
/// [`Error::LayerCount`]; an [`Error::Moment`] names its layer.
pub fn pool_layers<'a>(
    plan: &'a Plan,
    pooler: &'a dyn KvPooler,
    moments: Option<&'a Moments>,
) -> Box<PoolLayer<'a>> {
    Box::new(move |i: usize, heads: &Heads| {
        let (expected, found) = (i + 1, plan.layers.len());
        let missing = Error::LayerCount { what: "layers of the plan", expected, found };
        let groups = &plan.layers.get(i).ok_or(missing)?.groups;
        let pooled = match moments {
            Some(moments) => pooler.pool(&moments.attach(i, heads.clone())?, groups),
            None => pooler.pool(heads, groups),
        };
        pooled.map_err(|e| e.of_layer(i))
    })
}

/// Whether a file begins as safetensors do: eight bytes with the length of a header, then its brace. As text those
/// eight bytes would hold at least four zeros.
fn are_moments(bytes: &[u8]) -> bool {
    let header = bytes.split_first_chunk::<8>().filter(|(_, rest)| rest.first() == Some(&b'{'));
    header.is_some_and(|(length, _)| u64::from_le_bytes(*length) <= LONGEST_HEADER)
}
