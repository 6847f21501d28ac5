//! Calibrations as they are asked for: moments from a file, or texts that they are measured on.

use std::path::{Path, PathBuf};

use super::{Calibration, Moments, sampled};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::files::{FileError, is_safetensors};
use crate::heads::HeadSource;
use crate::plan::Plan;
use crate::run::Run;
use crate::runtime::Model;
use crate::text::{RuntimeError, Texts, Vocabulary, WholeText, Windows, read_file, shared_out, utf8};

/// What a calibration calls the text that the model itself wrote.
const OWN: &str = "self";

/// Where the windows of a calibration text come from, and their share.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct TextSource {
    /// Where they come from.
    pub origin: Origin,
    /// Their share, beside those of the other texts.
    pub share: usize,
}

/// Where a calibration text comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Origin {
    /// A file or a pipe.
    File(PathBuf),
    /// The source model: windows sampled from it, where no text is at hand ([`Calibration::from_self`]).
    Model,
}

impl TextSource {
    /// A file or a pipe, with one share.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self { origin: Origin::File(path.into()), share: 1 }
    }

    /// What the source model writes, with one share.
    pub fn model() -> Self {
        Self { origin: Origin::Model, share: 1 }
    }

    /// With so many shares.
    pub fn with_share(self, share: usize) -> Self {
        Self { share, ..self }
    }

    /// What reports call it.
    fn name(&self) -> String {
        match &self.origin {
            Origin::File(path) => path.display().to_string(),
            Origin::Model => OWN.to_string(),
        }
    }

    /// What is in the file; `None` for a text that is yet to be written.
    fn read(&self) -> Result<Option<Vec<u8>>, FileError> {
        match &self.origin {
            Origin::File(path) => read_file(path).map(Some),
            Origin::Model => Ok(None),
        }
    }
}

/// How much of its texts a calibration reads. A number of windows will do where these may have the usual length.
///
/// ```
/// use qcqa::calibration::Extent;
///
/// let long = Extent::new(32).of_tokens(2048);
/// assert_eq!((Extent::from(128).length, long.length), (None, Some(2048)));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Extent {
    /// The most windows, of all texts together.
    pub windows: usize,
    /// Tokens of a window; [`Model::window`] unless said.
    pub length: Option<usize>,
}

impl Extent {
    /// At most so many windows.
    pub fn new(windows: usize) -> Self {
        Self { windows, length: None }
    }

    /// Of so many tokens each: as many as the model will be asked to look back.
    pub fn of_tokens(self, length: usize) -> Self {
        Self { length: Some(length), ..self }
    }

    /// Tokens of a window of this model.
    fn length_for(self, model: &Model) -> Result<usize, RuntimeError> {
        let length = self.length.unwrap_or(model.window());
        if length > model.positions() {
            return Err(RuntimeError::Positions { expected: model.positions(), found: length });
        }
        Ok(length)
    }
}

impl From<usize> for Extent {
    fn from(windows: usize) -> Self {
        Self::new(windows)
    }
}

/// A calibration of which nothing has been measured yet.
enum Given {
    Moments(Moments),
    Texts(Box<Model>, Texts),
}

impl<'a> Calibration<'a> {
    /// Opens what is given: one file of moments, recognised by the header of a safetensors file, or texts, of which
    /// `extent` is read in all ([`Texts::new`]). Progress is stage `"sample"` where the model writes a text,
    /// then `"calibrate"`.
    ///
    /// # Errors
    /// [`RuntimeError::MomentsAmong`] for moments that are not alone; as [`Moments::read`] or [`Calibration::from_texts`].
    pub fn open(
        checkpoint: &'a Checkpoint,
        sources: &[TextSource],
        extent: impl Into<Extent>,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        Given::open(checkpoint, sources, extent.into(), run)?.measured(checkpoint, run)
    }

    /// Measures the moments on texts, of which `extent` is read in all: of the windows of every text most fit,
    /// and the others choose ([`Texts`]). Progress is stage `"sample"` where the model writes a text, then `"calibrate"`.
    ///
    /// ```
    /// use qcqa::Run;
    /// use qcqa::calibration::{Calibration, TextSource};
    /// use qcqa::checkpoint::Checkpoint;
    /// use qcqa::heads::HeadSource;
    ///
    /// let model = Checkpoint::open("tests/data/novels-1m")?;
    /// let texts = ["calibration.txt", "evaluation.txt"].map(|name| format!("tests/data/novels-1m/{name}"));
    /// let texts = texts.map(TextSource::file);
    /// let calibration = Calibration::from_texts(&model, &texts, 8, Run::new(0))?;
    /// assert!(calibration.heads(0)?.moment().is_some());
    /// let (_, texts) = calibration.text().expect("texts");
    /// assert_eq!((texts.each().len(), texts.fit().count()), (2, 4));
    /// # Ok::<(), qcqa::text::RuntimeError>(())
    /// ```
    ///
    /// # Errors
    /// As [`read_text`](crate::text::read_text), [`Vocabulary::encode`], [`Model::open`], [`Texts::new`] and
    /// [`Moments::measure`]; [`RuntimeError::InText`] for a text that is too short.
    pub fn from_texts(
        checkpoint: &'a Checkpoint,
        sources: &[TextSource],
        extent: impl Into<Extent>,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let (model, texts) = read_texts(checkpoint, sources, extent, run)?;
        Self::measured(checkpoint, model, texts, run)
    }

    /// Measures the moments of a model on texts that were read already; of an encoder all their windows fit. Progress is stage `"calibrate"`.
    ///
    /// # Errors
    /// As [`Moments::measure`] and [`Calibration::new`].
    pub fn measured(
        source: &'a dyn HeadSource,
        model: Model,
        texts: Texts,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let texts = by_what_can_choose(&model, texts);
        let moments = Moments::of_texts(&model, &texts, run)?;
        Ok(Self { text: Some((model, texts)), ..Self::new(source, moments)? })
    }

    /// Measures the moments on one text ([`Calibration::from_texts`]).
    ///
    /// # Errors
    /// As [`Calibration::from_texts`].
    pub fn from_text(
        checkpoint: &'a Checkpoint,
        path: &Path,
        extent: impl Into<Extent>,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        Self::from_texts(checkpoint, &[TextSource::file(path)], extent, run)
    }

    /// Measures the moments on windows that the model writes itself, where no text is at hand: each begins with a token of its
    /// vocabulary, any that is not special, and goes on at temperature 1. One seed gives one text, on any number of threads.
    ///
    /// It is no substitute for text: what it is worth depends on what the model writes (docs/calibration.md, "Text of the model's
    /// own").
    ///
    /// # Errors
    /// As [`Calibration::from_texts`].
    pub fn from_self(
        checkpoint: &'a Checkpoint,
        extent: impl Into<Extent>,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        Self::from_texts(checkpoint, &[TextSource::model()], extent, run)
    }

    /// Opens the calibration under which the heads of a plan are pooled, as [`Calibration::open`] does; another is refused
    /// before anything is measured. What the model writes itself it writes with the seed of the plan.
    ///
    /// # Errors
    /// [`Error::PlanCalibration`]; as [`Calibration::open`].
    pub fn for_plan(
        checkpoint: &'a Checkpoint,
        sources: &[TextSource],
        plan: &Plan,
        extent: impl Into<Extent>,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let given = Given::open(checkpoint, sources, extent.into(), run.with_seed(plan.seed))?;
        let (expected, found) = (plan.pooling.calibration.clone(), Some(given.fingerprint()));
        if expected != found {
            return Err(Error::PlanCalibration { expected, found }.into());
        }
        let calibration = given.measured(checkpoint, run)?;
        if plan.first_below().is_some() { calibration.with_cross_moments(run) } else { Ok(calibration) }
    }
}

/// A model, and its calibration texts in their roles: `extent` of them in all, of each source its share; of an encoder, which has no
/// loss to choose by, all fit. Progress is stage `"sample"` where the model writes a text.
///
/// # Errors
/// As [`read_text`](crate::text::read_text), [`Vocabulary::encode`], [`Model::open`] and [`Texts::new`];
/// [`RuntimeError::InText`] for a text that is too short.
pub fn read_texts(
    checkpoint: &Checkpoint,
    sources: &[TextSource],
    extent: impl Into<Extent>,
    run: Run<'_>,
) -> Result<(Model, Texts), RuntimeError> {
    let contents = sources.iter().map(TextSource::read).collect::<Result<_, _>>()?;
    texts_of(checkpoint, sources, contents, extent.into(), run)
}

/// Of an encoder, which has no loss to choose by, all windows fit.
fn by_what_can_choose(model: &Model, texts: Texts) -> Texts {
    if model.predicts() { texts } else { texts.all_fit() }
}

/// As [`read_texts`], of contents that were read already: what a pipe has given it does not give again.
fn texts_of(
    checkpoint: &Checkpoint,
    sources: &[TextSource],
    contents: Vec<Option<Vec<u8>>>,
    extent: Extent,
    run: Run<'_>,
) -> Result<(Model, Texts), RuntimeError> {
    let counts = shared_out(extent.windows, &sources.iter().map(|source| source.share).collect::<Vec<_>>())?;
    let words = contents.iter().any(Option::is_some).then(|| Vocabulary::open(checkpoint)).transpose()?;
    let tokens = |(source, bytes): (&TextSource, Option<Vec<u8>>)| match (&source.origin, bytes, &words) {
        (Origin::File(path), Some(bytes), Some(words)) => words.encode(&utf8(path, bytes)?).map(Some),
        _ => Ok(None),
    };
    let tokens = sources.iter().zip(contents).map(tokens).collect::<Result<Vec<_>, _>>()?;
    // Whoever writes needs every layer for every token.
    let writes = sources.iter().any(|source| source.origin == Origin::Model);
    let load = if writes { Model::load_on } else { Model::open };
    let model = load(checkpoint, run.device())?.in_numbers(run.precision())?;
    let length = extent.length_for(&model)?;
    let whole = |((source, tokens), count): ((&TextSource, Option<Vec<u32>>), usize)| {
        let name = source.name();
        let windows = match tokens {
            Some(tokens) => Windows::new(tokens, length)
                .map_err(|error| RuntimeError::InText { name: name.clone(), source: Box::new(error) })?,
            None => sampled::windows(checkpoint, &model, [count, length], run)?,
        };
        Ok::<_, RuntimeError>(WholeText::new(name, windows).with_share(source.share))
    };
    let whole = sources.iter().zip(tokens).zip(counts).map(whole).collect::<Result<Vec<_>, _>>()?;
    let texts = Texts::new(&whole, extent.windows)?;
    let texts = by_what_can_choose(&model, texts);
    Ok((model, texts))
}

impl Given {
    fn open(
        checkpoint: &Checkpoint,
        sources: &[TextSource],
        extent: Extent,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let contents = sources.iter().map(TextSource::read).collect::<Result<Vec<_>, _>>()?;
        for (source, bytes) in sources.iter().zip(&contents) {
            match (&source.origin, bytes) {
                (Origin::File(path), Some(bytes)) if is_safetensors(bytes) => {
                    if sources.len() > 1 {
                        return Err(RuntimeError::MomentsAmong { path: path.clone() });
                    }
                    return Ok(Self::Moments(Moments::from_bytes(path, bytes, &checkpoint.id()?)?));
                }
                _ => {}
            }
        }
        let (model, texts) = texts_of(checkpoint, sources, contents, extent, run)?;
        Ok(Self::Texts(Box::new(model), texts))
    }

    fn fingerprint(&self) -> String {
        match self {
            Self::Moments(moments) => moments.fingerprint(),
            Self::Texts(model, texts) => texts.fingerprint(model.id()),
        }
    }

    fn measured<'a>(self, source: &'a Checkpoint, run: Run<'_>) -> Result<Calibration<'a>, RuntimeError> {
        match self {
            Self::Moments(moments) => Ok(Calibration::new(source, moments)?),
            Self::Texts(model, texts) => Calibration::measured(source, *model, texts, run),
        }
    }
}
