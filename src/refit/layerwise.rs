//! All of a layer's attention, down the gradient of its own error.

use candle_core::Tensor;

use super::texts::Texts;
use crate::descent::{Descent, Fall, Order, share};
use crate::error::Result;
use crate::run::Run;
use crate::runtime::{Asked, LONGEST_WINDOW, LayerWeights, Model, combined, weighed};
use crate::text::RuntimeError;

/// Windows of a step, of which longer ones count by their tokens, and the highest rate; below so many windows in all half as many make
/// a step, and heads are made orthogonal one by one: what a CPU can pay.
const BATCH: usize = 4;
const FEW_WINDOWS: usize = 256;
const RATE: f64 = 5e-3;
/// Steps over which the rate rises.
const WARM_UP: u64 = 5;
/// Steps that a layer takes where the text is long enough for that, and how often a shorter one is read at most.
const STEPS: usize = 512;
const EPOCHS: usize = 10;
/// Of few windows each step asks at every so many-th token, from another one on, as long as it asks at so many in all: tokens beside
/// one another say much the same, and what a step costs is their queries.
const APART: usize = 4;
const ASKED: usize = 256;

/// The model with queries, keys, values and outputs of layer `i` where [`Descent::Muon`] leads them: down the gradient of
/// `Σ_t w_t ‖y_t − target_t‖²` over the attention outputs y_t.
pub(super) fn refit(model: &Model, i: usize, texts: &Texts, run: Run<'_>) -> Result<Model, RuntimeError> {
    let mut model = model.clone();
    let mut weights = model.attention_weights(i)?;
    let length = texts.pass.positions().len();
    let usual = length.div_ceil(LONGEST_WINDOW);
    let few = texts.count() * usual < FEW_WINDOWS;
    let (descent, batch) = if few { (Descent::MuonByHead, BATCH / 2) } else { (Descent::Muon, BATCH) };
    let batch = (batch / usual).max(1);
    let mut memory = descent.memory(&weights)?;
    let epochs = (STEPS * batch / texts.count().max(1)).clamp(1, EPOCHS);
    let steps = (epochs * texts.count()).div_ceil(batch) as u64;
    let mut order = Order::new(texts.count(), run);
    let apart = if few { (batch * length / ASKED).clamp(1, APART) } else { 1 };
    let all = (0..apart).map(|first| model.asked(i, apart, first, &texts.pass));
    let all: Vec<Asked> = all.collect::<Result<_, _>>()?;
    for step in 0..steps {
        let asked = &all[step as usize % apart];
        let gradients = texts.map(&model, i, &order.batch(step, batch), |text| {
            let at = |rows: &Tensor| asked.rows(rows, &texts.pass);
            model.attention_backward(i, &text.input, asked, &texts.pass, |output| {
                weighed(&combined(output, 1.0, &at(&text.target)?, -1.0)?, &at(&text.weight)?)
            })
        })?;
        if let Some(gradients) = LayerWeights::sum(gradients)? {
            let rate = RATE * share(step, Some(steps), WARM_UP, Fall::Line);
            weights = descent.step(&weights, &gradients, &mut memory, step, rate)?;
            model.set_weights(i, &weights)?;
        }
    }
    Ok(model)
}
