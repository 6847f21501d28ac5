//! What sharing costs each layer, estimated by one pass backward.

use candle_core::{D, Tensor};
use rand::Rng;

use super::pairs::PairSensitivity;
use super::sensitivity::{Sensitivity, measured, not_finite};
use super::trial::Trial;
use crate::cross_layer::LayerPairs;
use crate::error::Error;
use crate::front::Front;
use crate::partition::Partition;
use crate::run::Run;
use crate::runtime::{Model, Pass};
use crate::text::RuntimeError;

impl Sensitivity {
    /// Estimates each layer at the numbers of groups that [`Sensitivity::measure`] measures: `½ Σ_b (Σ_{t ∈ b} g_t · δ_t)²` a token,
    /// over blocks b of 8 tokens, where δ_t is the change of what the layer gives for token t when its attention alone is shared and
    /// g_t the gradient of Σ_t ln p(y_t) with respect to that, for labels y_t drawn from the model's own predictions: of the Fisher
    /// information, and so of KL(source ‖ shared), the part within blocks (docs/method.md, "Which layers pay"). One pass
    /// forward, one backward, and the layer for every option, whatever the number of layers; several passes backward, with labels of
    /// their own, over texts of fewer than 8192 tokens, which are too few for one. Progress is stage `"sensitivity"`.
    ///
    /// Memory: what enters every layer, for all windows. The same seed gives the same estimate.
    ///
    /// # Errors
    /// As [`Sensitivity::measure`].
    pub fn estimate(trial: &Trial<'_>, fronts: &[Front], run: Run<'_>) -> Result<Self, RuntimeError> {
        Ok(Self::estimated(trial, fronts, None, run)?.0)
    }

    /// As [`Sensitivity::estimate`], and of every pair of layers what both together lose where they share: the sum of both layers'
    /// estimates, each at what that layer gives, up to sharing nothing but the lower layer's input.
    ///
    /// # Errors
    /// As [`Sensitivity::estimate`]; what [`LayerPairs`] reports.
    pub fn estimate_with_pairs(
        trial: &Trial<'_>,
        fronts: &[Front],
        pairs: &LayerPairs<'_>,
        of_pairs: &[Front],
        run: Run<'_>,
    ) -> Result<(Self, PairSensitivity), RuntimeError> {
        Self::estimated(trial, fronts, Some((pairs, of_pairs)), run)
    }

    fn estimated(
        trial: &Trial<'_>,
        fronts: &[Front],
        pairs: Option<(&LayerPairs<'_>, &[Front])>,
        run: Run<'_>,
    ) -> Result<(Self, PairSensitivity), RuntimeError> {
        let (key, model) =
            (format!("fisher-blocks {} {}", run.seed(), Self::key(trial, fronts)?), trial.model);
        let layers = fronts.len();
        let total = layers as u64 + 1;
        run.step("sensitivity", 0, total)?;
        let pass = model.pass(trial.windows.length(), 0)?;
        let texts: Vec<&[u32]> = trial.windows.batches(model.abreast(trial.windows.length())).collect();
        let inputs = model.there(&texts, &pass, 0)?.into_iter().map(|there| there.inputs);
        let tokens = trial.windows.tokens().len();
        let draws = TOKENS.div_ceil(tokens).min(MOST_DRAWS);
        let mut texts = {
            let there: Vec<_> = inputs.zip(&texts).enumerate().collect();
            model.each(&there, |(i, (inputs, tokens))| {
                Way::there(model, inputs.clone(), tokens, draws, run.fork(*i as u64))
            })?
        };
        let mut estimates = vec![Vec::new(); layers];
        let mut both = PairSensitivity::default();
        // Those of the layer that was gone through last and the one below: this one's part is yet to come.
        let mut lower: Vec<(usize, Model)> = Vec::new();
        for (i, front) in fronts.iter().enumerate().rev() {
            run.step("sensitivity", (layers - i) as u64, total)?;
            let heads = trial.source.heads(i)?;
            let partitions: Vec<&Partition> = measured(front).map(|point| &point.partition).collect();
            let models = trial.regrouped(&heads, &partitions)?;
            let upper = match pairs {
                Some((pairs, of_pairs)) => both.begin(trial, pairs, of_pairs, i)?,
                None => Vec::new(),
            };
            let alone: Vec<&Model> = models.iter().chain(lower.iter().map(|(_, model)| model)).collect();
            let above: Vec<&Model> = upper.iter().map(|(_, model)| model).collect();
            model.share_out(&mut texts, |way| way.back(model, i, [&alone, &above], &pass))?;
            let ks = partitions.iter().map(|partition| partition.n_groups());
            let ks: Vec<usize> = ks.chain(lower.iter().chain(&upper).map(|(k, _)| *k)).collect();
            for (n, &k) in ks.iter().enumerate() {
                // In the order of the text, on however many threads.
                let estimate =
                    0.5 * texts.iter().map(|way| way.sums[n]).sum::<f64>() / (draws * tokens) as f64;
                if !estimate.is_finite() {
                    return Err(not_finite(i, k));
                }
                match n.checked_sub(partitions.len()) {
                    None => estimates[i].push((k, estimate)),
                    Some(n) if n < lower.len() => both.add(i, k, estimate),
                    Some(_) => both.add(i - 1, k, estimate),
                }
            }
            lower = upper;
        }
        run.step("sensitivity", total, total)?;
        Ok((Self::from_rises(key, fronts, estimates), both))
    }
}

/// Neighbouring tokens whose effects are added before they are squared: what a layer does to one is much like what it does to the next, and
/// later tokens read both. Of more the noise of the labels is larger than what is gained (docs/quality.md).
const BLOCK: usize = 8;
/// Tokens that are drawn for, those of a short text several times, and the most times.
const TOKENS: usize = 8192;
const MOST_DRAWS: usize = 8;

/// One window on its way back.
struct Way {
    /// What enters the layers that it has yet to go through, (T, d).
    inputs: Vec<Tensor>,
    /// What leaves the last of these, (T, d).
    given: Tensor,
    /// Its gradient, (T, d), for every time that labels were drawn.
    gradients: Vec<Tensor>,
    /// What the layer that it has gone through last would cost, for each model.
    sums: Vec<f64>,
}

impl Way {
    /// There, where all layers have been, and back through the output embedding.
    fn there(
        model: &Model,
        mut inputs: Vec<Tensor>,
        tokens: &[u32],
        draws: usize,
        run: Run<'_>,
    ) -> Result<Self, RuntimeError> {
        let given = inputs.pop().ok_or(Error::NoLayer { layer: 0, layers: 0 })?;
        let (own, mut rng) = (model.last(&given)?, run.rng());
        let mut drawn = || {
            let draw: Vec<f32> = tokens.iter().map(|_| rng.random()).collect();
            Ok(model.last_backward(&given, &model.drawn_gradient(&own, &draw)?)?)
        };
        let gradients = (0..draws).map(|_| drawn()).collect::<Result<_, RuntimeError>>()?;
        Ok(Self { inputs, given, gradients, sums: Vec::new() })
    }

    /// Back through layer `i`: for each model in which that layer alone is shared, and then for each in which it reads the layer below,
    /// `Σ_b (Σ_{t ∈ b} g_t · δ_t)²`, summed over what was drawn, into `sums`.
    fn back(
        &mut self,
        model: &Model,
        i: usize,
        [shared, above]: [&[&Model]; 2],
        pass: &Pass,
    ) -> Result<(), RuntimeError> {
        let x = self.inputs.pop().ok_or(Error::NoLayer { layer: i, layers: i })?;
        let input = model.attention_input(i, &x)?;
        let below = match self.inputs.last().filter(|_| !above.is_empty()) {
            Some(below) => Some(model.attention_input(i - 1, below)?),
            None => None,
        };
        let of = |attended: Tensor| {
            let change = (model.finish(i, &x, Some(&attended))? - &self.given)?;
            let mut sum = 0.0;
            for gradient in &self.gradients {
                let effects: Vec<f32> = (&change * gradient)?.sum(D::Minus1)?.to_vec1()?;
                // No block reaches into the next window.
                let blocks = effects.chunks(pass.positions().len()).flat_map(|window| window.chunks(BLOCK));
                sum += blocks
                    .map(|block| block.iter().copied().map(f64::from).sum::<f64>().powi(2))
                    .sum::<f64>();
            }
            Ok(sum)
        };
        let alone = shared.iter().map(|shared| of(shared.attend(i, &input, pass)?));
        let across = below.iter().flat_map(|below| above.iter().map(move |above| (above, below)));
        let across = across.map(|(above, below)| of(above.attend_above(i, [below, &input], pass)?));
        self.sums = alone.chain(across).collect::<Result<_, RuntimeError>>()?;
        for gradient in &mut self.gradients {
            *gradient = model.backward(i, (&x, None), gradient, pass, None)?.input;
        }
        self.given = x;
        Ok(())
    }
}
