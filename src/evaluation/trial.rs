use candle_core::Tensor;

use super::evaluate;
use crate::error::{Error, Result};
use crate::heads::{HeadSource, Heads};
use crate::partition::Partition;
use crate::pooler::KvPooler;
use crate::run::Run;
use crate::runtime::{Model, Pass};
use crate::text::{RuntimeError, Windows};

/// What groups of heads are tried with: the heads, the model that they are of, how they merge, and the text that decides.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Trial<'a> {
    /// The heads, with their moments where the pooler uses any.
    pub source: &'a dyn HeadSource,
    /// The model without any grouping.
    pub model: &'a Model,
    /// How groups merge.
    pub pooler: &'a dyn KvPooler,
    /// The text. Never the one that results are reported on.
    pub windows: &'a Windows,
}

impl<'a> Trial<'a> {
    /// Tries groups of the heads of `source`, merged by `pooler`, in `model` on this text.
    pub fn new(
        source: &'a dyn HeadSource,
        model: &'a Model,
        pooler: &'a dyn KvPooler,
        windows: &'a Windows,
    ) -> Self {
        Self { source, model, pooler, windows }
    }

    /// The model with these groups, one partition a layer.
    ///
    /// # Errors
    /// [`Error::LayerCount`]; what the source and the pooler report; as [`Model::with_layer`].
    pub fn grouped(&self, groups: &[Partition]) -> Result<Model, RuntimeError> {
        Ok(self.grouped_each(&[groups], Run::new(0))?.swap_remove(0))
    }

    /// The models with each of these groups, as [`Trial::grouped`] makes them; what a layer has in common for all is computed
    /// once. Progress is stage `"pool"`.
    ///
    /// # Errors
    /// As [`Trial::grouped`].
    pub fn grouped_each(&self, groups: &[&[Partition]], run: Run<'_>) -> Result<Vec<Model>, RuntimeError> {
        let expected = self.model.n_layers();
        if let Some(found) = groups.iter().map(|groups| groups.len()).find(|&found| found != expected) {
            return Err(Error::LayerCount { what: "partitions", expected, found }.into());
        }
        let made = |i: usize| {
            let (heads, of_layer) = (self.source.heads(i)?, groups.iter().map(|groups| &groups[i]));
            let of_layer: Vec<&Partition> = of_layer.collect();
            let pooled = self.pooler.pool_each(&heads, &of_layer).map_err(|e| e.of_layer(i))?;
            Ok((heads, of_layer.into_iter().map(Into::into).zip(pooled).collect()))
        };
        self.model.with_each(groups.len(), made, run)
    }

    /// The model with one more layer grouped, in each of these ways.
    pub(super) fn regrouped(&self, heads: &Heads, groups: &[&Partition]) -> Result<Vec<Model>, RuntimeError> {
        let pooled = self.pooler.pool_each(heads, groups).map_err(|e| e.of_layer(heads.layer()))?;
        groups
            .iter()
            .zip(pooled)
            .map(|(groups, pooled)| self.model.with_layer(heads, groups, pooled))
            .collect()
    }
}

/// Which of several models reads a text best: its index, and the mean loss of each in nats per token. Progress is stage
/// `"choose"`.
///
/// Whole models are compared. Taking each layer from whichever model loses less there has a lower loss on the calibration
/// text and a higher one on others (docs/quality.md).
///
/// # Errors
/// [`Error::Setting`] without models; as [`evaluate`](super::evaluate()).
pub fn choose_model(
    models: &[Model],
    windows: &Windows,
    run: Run<'_>,
) -> Result<(usize, Vec<f64>), RuntimeError> {
    if models.is_empty() {
        return Err(Error::setting("the number of models", 0, "at least 1").into());
    }
    let total = models.len() as u64;
    let mut losses = Vec::with_capacity(models.len());
    for model in models {
        run.step("choose", losses.len() as u64, total)?;
        losses.push(evaluate(model, windows, run.unwatched())?.loss);
    }
    run.step("choose", total, total)?;
    let best = (0..losses.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap_or(0);
    Ok((best, losses))
}

/// A text on its way through a model: what enters the next layer, for every window.
#[derive(Debug)]
pub(super) struct Reading<'a> {
    pub(super) windows: &'a Windows,
    pub(super) pass: Pass,
    layer: usize,
    /// (tokens, d) of as many windows as the model computes abreast.
    pub(super) inputs: Vec<Tensor>,
}

impl<'a> Reading<'a> {
    /// The text before layer 0.
    pub(super) fn new(model: &Model, windows: &'a Windows) -> Result<Self, RuntimeError> {
        let pass = model.pass(windows.length(), 0)?;
        let parts = windows.batches(model.abreast(windows.length()));
        let inputs = parts.map(|tokens| model.embed(tokens, &pass)).collect::<Result<_, _>>()?;
        Ok(Self { windows, pass, layer: 0, inputs })
    }

    /// The text in parts of as many windows as `model` computes together, with the tensors of each: what is read abreast is one
    /// tensor.
    pub(super) fn parts(&self, model: &Model) -> impl Iterator<Item = (&'a [u32], &[Tensor])> {
        let (together, abreast) =
            (model.together(self.windows.length()), model.abreast(self.windows.length()));
        let tensors = (together / abreast).max(1);
        self.windows.batches(tensors * abreast).zip(self.inputs.chunks(tensors))
    }

    /// What the model's further layers make of some of the tensors.
    pub(super) fn through(&self, model: &Model, inputs: &[Tensor]) -> Result<Vec<Tensor>, RuntimeError> {
        model.through(self.layer, inputs.to_vec(), &self.pass)
    }

    /// Goes through this layer of the model, to before the next.
    pub(super) fn pass_layer(&mut self, model: &Model) -> Result<(), RuntimeError> {
        model.pass_layer(self.layer, &mut self.inputs, &self.pass)?;
        self.layer += 1;
        Ok(())
    }
}
