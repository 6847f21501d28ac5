//! All of a layer's attention, down the gradient of its own error.

use super::texts::Texts;
use crate::descent::{Descent, Order, share};
use crate::error::Result;
use crate::run::Run;
use crate::runtime::{AttentionWeights, Model};
use crate::text::RuntimeError;

/// Steps over which the rate rises.
const WARM_UP: u64 = 5;

/// The model with queries, keys, values and outputs of layer `i` where [`Descent::Muon`] leads them: down the gradient of
/// `Σ_t w_t ‖y_t − target_t‖²` over the attention outputs y_t.
pub(super) fn refit(model: &Model, i: usize, texts: &Texts, run: Run<'_>) -> Result<Model, RuntimeError> {
    let env = |n: &str, d: f64| std::env::var(n).ok().and_then(|v| v.parse().ok()).unwrap_or(d);
    let (epochs, batch, rate) = (env("EPOCHS", 4.0) as usize, env("BATCH", 4.0) as usize, env("RRATE", 5e-3));
    let mut model = model.clone();
    let mut weights = model.attention_weights(i)?;
    let mut memory = Descent::Muon.memory(&weights)?;
    let batch = batch.min(texts.count()).max(1);
    let steps = (epochs * texts.count()).div_ceil(batch) as u64;
    let mut order = Order::new(texts.count(), run);
    for step in 0..steps {
        let gradients = texts.map(&model, &order.batch(step, batch), |text| {
            let gradient = model.attention_backward(i, &text.input, &texts.pass, |output| {
                (output - &text.target)?.broadcast_mul(&text.weight)
            });
            Ok(gradient?)
        })?;
        let sum = |sum: Option<AttentionWeights>, more: AttentionWeights| -> Result<_, RuntimeError> {
            Ok(Some(match sum {
                Some(sum) => sum.plus(&more)?,
                None => more,
            }))
        };
        if let Some(gradients) = gradients.into_iter().try_fold(None, sum)? {
            let rate = rate * share(step, Some(steps), WARM_UP);
            weights = Descent::Muon.step(&weights, &gradients, &mut memory, step, rate)?;
            model.set_attention_weights(i, &weights)?;
        }
    }
    Ok(model)
}
