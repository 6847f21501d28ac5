use candle_core::Tensor;
use rayon::prelude::*;

use super::attention::Pass;
use super::evaluate::loss;
use super::{Model, Moments, RuntimeError, Windows};
use crate::checkpoint::Checkpoint;
use crate::heads::Heads;
use crate::partition::Partition;
use crate::pooler::KvPooler;
use crate::run::Run;

/// What groups of heads are tried with: the model that they are of, how they merge, and the text that decides.
#[derive(Debug, Clone, Copy)]
pub struct Trial<'a> {
    /// The files of the model.
    pub checkpoint: &'a Checkpoint,
    /// The model without any grouping.
    pub source: &'a Model,
    /// The moments that the pooler works under, where it uses any.
    pub moments: Option<&'a Moments>,
    /// How groups merge.
    pub pooler: &'a dyn KvPooler,
    /// The text. Never the one that results are reported on.
    pub windows: &'a Windows,
}

impl Trial<'_> {
    /// The heads of a layer, with their moment.
    ///
    /// # Errors
    /// As [`Checkpoint::layer`] and [`Moments::attach`].
    pub fn heads(&self, layer: usize) -> Result<Heads, RuntimeError> {
        let heads = self.checkpoint.layer(layer)?;
        Ok(match self.moments {
            Some(moments) => moments.attach(layer, heads)?,
            None => heads,
        })
    }

    /// The model with these groups, one partition a layer.
    ///
    /// # Errors
    /// [`Error::LayerCount`](crate::Error::LayerCount); as [`Model::regrouped`].
    pub fn grouped(&self, groups: &[Partition]) -> Result<Model, RuntimeError> {
        let (expected, found) = (self.source.n_layers(), groups.len());
        if expected != found {
            return Err(crate::Error::LayerCount { what: "partitions", expected, found }.into());
        }
        let regroup = |model: Model, (i, groups): (usize, &Partition)| {
            model.regrouped(i, &self.heads(i)?, groups, self.pooler)
        };
        groups.iter().enumerate().try_fold(self.source.clone(), regroup)
    }
}

/// Which of several models reads a text best: its index, and the mean loss of each in nats per token. Progress is stage
/// `"choose"`.
///
/// Whole models are compared. Taking each layer from whichever model loses less there has a lower loss on the calibration
/// text and a higher one on others (docs/quality.md).
///
/// # Errors
/// [`Error::LayerCount`](crate::Error::LayerCount) without models; as [`evaluate`](super::evaluate()).
pub fn choose_model(
    models: &[Model],
    windows: &Windows,
    run: Run<'_>,
) -> Result<(usize, Vec<f64>), RuntimeError> {
    let first = models.first().ok_or(crate::Error::LayerCount { what: "models", expected: 1, found: 0 })?;
    let reading = Reading::new(first, windows)?;
    let total = models.len() as u64;
    let mut losses = Vec::with_capacity(models.len());
    for model in models {
        run.step("choose", losses.len() as u64, total)?;
        losses.push(reading.loss(model)?);
    }
    run.step("choose", total, total)?;
    let best = (0..losses.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap_or(0);
    Ok((best, losses))
}

/// A text on its way through a model: what enters the next layer, for every window.
pub(super) struct Reading<'a> {
    windows: &'a Windows,
    pass: Pass,
    layer: usize,
    /// (T, d) a window.
    inputs: Vec<Tensor>,
}

impl<'a> Reading<'a> {
    /// The text before layer 0.
    pub(super) fn new(model: &Model, windows: &'a Windows) -> Result<Self, RuntimeError> {
        let pass = model.pass(1, windows.length(), 0)?;
        let inputs = windows.batches(1).map(|tokens| model.embed(tokens)).collect::<Result<_, _>>()?;
        Ok(Self { windows, pass, layer: 0, inputs })
    }

    /// The mean loss of a model whose layers below this one are those that the text went through.
    pub(super) fn loss(&self, model: &Model) -> Result<f64, RuntimeError> {
        let texts: Vec<&[u32]> = self.windows.batches(1).collect();
        let losses = self.inputs.par_iter().zip(texts).map(|(x, tokens)| {
            Ok(loss(&model.logits_from(self.layer, x, &self.pass)?, tokens, self.windows.length()))
        });
        let losses: Vec<(f64, u64)> = losses.collect::<Result<_, RuntimeError>>()?;
        let (sum, n) = losses.iter().fold((0.0, 0), |(sum, all), (loss, n)| (sum + loss, all + n));
        let mean = sum / n as f64;
        let what = || format!("the loss with layer {} grouped", self.layer);
        if mean.is_finite() { Ok(mean) } else { Err(RuntimeError::NotFinite { what: what() }) }
    }

    /// Goes through this layer of the model, to before the next.
    pub(super) fn pass_layer(&mut self, model: &Model) -> Result<(), RuntimeError> {
        let outputs = self.inputs.par_iter().map(|x| model.layer(self.layer, x, &self.pass, None));
        self.inputs = outputs.collect::<Result<_, _>>()?;
        self.layer += 1;
        Ok(())
    }
}
