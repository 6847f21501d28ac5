use std::collections::BTreeMap;

use candle_core::Tensor;

use super::known::Known;
use crate::descent::{Descent, Memory};
use crate::error::Result;
use crate::heads::Pooled;
use crate::plan::Trained;
use crate::runtime::{LayerWeights, Model, Pass, There, combined, squared_lengths, times, weighed};
use crate::text::{RuntimeError, Windows};

/// Layers that go a step together: on a GPU many small products are one, and of large ones not all changes are held.
const TOGETHER: usize = 16;

/// A model on its way towards its source: weights, and what the descent remembers of them.
#[derive(Debug)]
pub(super) struct Trainer<'a> {
    pub(super) source: &'a Model,
    pub(super) model: Model,
    pub(super) descent: Descent,
    trained: Trained,
    /// Those of the model, as they are trained.
    pub(super) weights: Vec<LayerWeights>,
    pub(super) memory: Vec<Memory>,
    /// What the source's last layer gives for the windows of a validation, and for those that are trained on.
    validated: Known,
    known: Known,
    /// Numbers of traces that there is room for.
    traced: usize,
}

impl<'a> Trainer<'a> {
    pub(super) fn new(
        source: &'a Model,
        model: Model,
        descent: Descent,
        trained: Trained,
    ) -> Result<Self, RuntimeError> {
        let weights = (0..model.n_layers()).map(|i| model.trained_weights(i, trained));
        let weights = weights.collect::<Result<Vec<_>, RuntimeError>>()?;
        let memory = weights.iter().map(|weights| descent.memory(weights));
        Ok(Self {
            source,
            memory: memory.collect::<Result<_, _>>()?,
            weights,
            traced: model.room_for_traces(),
            validated: Known::new(model.kept()),
            model,
            descent,
            trained,
            known: Known::default(),
        })
    }

    /// Keeps what the source gives for the windows of `fit` where some are asked for again: where more than there are will be, or it is
    /// not known how many. Those of a validation, which come again in any case, share the room.
    pub(super) fn keep(&mut self, asked: Option<u64>, fit: &Windows, validation: Option<&Windows>) {
        if asked.is_none_or(|asked| asked > fit.count() as u64) {
            let validated = validation.map_or(0, |windows| windows.tokens().len() * self.model.width());
            self.known = Known::new(self.model.kept().saturating_sub(validated));
        }
    }

    /// Puts weights into layer `i`.
    pub(super) fn set(&mut self, i: usize, weights: LayerWeights) -> Result<(), RuntimeError> {
        self.model.set_weights(i, &weights)?;
        self.weights[i] = weights;
        Ok(())
    }

    /// Goes one step on some windows, each with its number, and gives the mean KL(source ‖ model) over their tokens before it.
    pub(super) fn step(
        &mut self,
        windows: &[(usize, &[u32])],
        step: u64,
        rate: f64,
        pull: f64,
    ) -> Result<f64, RuntimeError> {
        let (divergence, gradients) = self.gradients(windows, pull)?;
        let layers = self.model.n_layers();
        for first in (0..layers).step_by(TOGETHER) {
            let together = first..layers.min(first + TOGETHER);
            let weights: Vec<&LayerWeights> = self.weights[together.clone()].iter().collect();
            let (of, memories) = (&gradients[together.clone()], &mut self.memory[together.clone()]);
            let precision = self.source.precision();
            let moved = self.descent.step_all(&weights, of, memories, step, rate, precision)?;
            together.zip(moved).try_for_each(|(i, weights)| self.set(i, weights))?;
        }
        Ok(divergence)
    }

    /// The mean KL(source ‖ model) over the tokens of some windows, and the gradient for the weights of every layer of that plus
    /// `pull` times the mean of `‖h − h_source‖² / ‖h_source‖²`, where h is what the output embedding reads.
    ///
    /// Windows are added up one after the other, whoever computes them: as many threads as there are give one sum.
    pub(super) fn gradients(
        &mut self,
        windows: &[(usize, &[u32])],
        pull: f64,
    ) -> Result<(f64, Vec<LayerWeights>), RuntimeError> {
        let mut divergence = 0.0;
        let mut sums: Vec<Option<LayerWeights>> = vec![None; self.model.n_layers()];
        let length = windows.first().map_or(0, |(_, window)| window.len());
        let pass = self.model.pass(length, 0)?;
        let tokens: usize = windows.iter().map(|(_, window)| window.len()).sum();
        let share = 1.0 / tokens.max(1) as f64;
        let [held, abreast] = self.model.held(length);
        for held in windows.chunks(held) {
            let parts = held.chunks(abreast).map(|windows| {
                let (numbers, texts): (Vec<usize>, Vec<&[u32]>) = windows.iter().copied().unzip();
                (numbers, texts.concat())
            });
            let parts: Vec<(Vec<usize>, Vec<u32>)> = parts.collect();
            let theirs = of_source(self.source, &mut self.known, &parts, &pass)?;
            let texts: Vec<&[u32]> = parts.iter().map(|(_, tokens)| &tokens[..]).collect();
            divergence += self.add_gradients(theirs, &texts, &pass, [share, pull], &mut sums)?;
        }
        Ok((divergence * share, sums.into_iter().flatten().collect()))
    }

    /// Adds the gradients of `share` times the sum over some texts to `sums`, and gives the sum of the divergences; `theirs` is what the
    /// source's last layer gives for them.
    fn add_gradients(
        &self,
        theirs: Vec<Tensor>,
        texts: &[&[u32]],
        pass: &Pass,
        [share, pull]: [f64; 2],
        sums: &mut [Option<LayerWeights>],
    ) -> Result<f64, RuntimeError> {
        let (source, model) = (self.source, &self.model);
        let both: Vec<(Tensor, There)> =
            theirs.into_iter().zip(model.there(texts, pass, self.traced)?).collect();
        let forward = model.each(&both, |(theirs, there)| {
            let theirs = source.last(theirs)?;
            let last = &there.inputs[model.n_layers()];
            let own = model.last(last)?;
            let (divergences, mut gradient) = model.divergence(&theirs, &own)?;
            if pull > 0.0 {
                let weight = (2.0 * pull / squared_lengths(&theirs)?)?;
                let off = weighed(&combined(&own, 1.0, &theirs, -1.0)?, &weight)?;
                gradient = combined(&gradient, 1.0, &off, 1.0)?;
            }
            let gradient = model.last_backward(last, &times(gradient, share)?)?;
            Ok((divergences.into_iter().sum::<f64>(), gradient))
        })?;
        let divergence = forward.iter().map(|(divergence, _)| divergence).sum();
        let ways = both.into_iter().zip(forward).map(|((_, there), (_, gradient))| (there, gradient, None));
        let mut ways: Vec<(There, Tensor, Option<LayerWeights>)> = ways.collect();
        for (i, sum) in sums.iter_mut().enumerate().rev() {
            model.share_out(&mut ways, |(there, gradient, weights)| {
                let trace = there.trace(i);
                let on = (&there.inputs[i], trace);
                let back = model.backward(i, on, gradient, pass, Some(self.trained))?;
                (*gradient, *weights) = (back.input, back.weights);
                Ok(())
            })?;
            for weights in ways.iter_mut().filter_map(|(_, _, weights)| weights.take()) {
                *sum = Some(match sum.take() {
                    Some(sum) => sum.plus(&weights)?,
                    None => weights,
                });
            }
        }
        Ok(divergence)
    }

    /// The mean KL(source ‖ model) over the tokens predicted of some windows, the same ones every time: all tokens but the last of each.
    pub(super) fn divergence(&mut self, windows: &Windows) -> Result<f64, RuntimeError> {
        let length = windows.length();
        let (pass, abreast) = (self.model.pass(length, 0)?, self.model.abreast(length));
        let (mut sum, mut tokens, mut number) = (0.0, 0, 0);
        for texts in windows.batches(self.model.together(length)) {
            let parts = texts.chunks(abreast * length).map(|part| {
                let first = number;
                number += part.len() / length;
                ((first..number).collect(), part.to_vec())
            });
            let parts: Vec<(Vec<usize>, Vec<u32>)> = parts.collect();
            let theirs = of_source(self.source, &mut self.validated, &parts, &pass)?;
            let own = self.model.rows(texts, texts.len() / length)?;
            let both: Vec<(Tensor, Tensor)> = theirs.into_iter().zip(own).collect();
            let of = |(theirs, own): &(Tensor, Tensor)| {
                self.model.divergences(&self.source.last(theirs)?, &self.model.last(own)?)
            };
            for divergences in self.model.each(&both, of)? {
                let predicted = divergences.chunks(length).flat_map(|window| &window[..length - 1]);
                (sum, tokens) =
                    predicted.fold((sum, tokens), |(sum, n), divergence| (sum + divergence, n + 1));
            }
        }
        Ok(sum / tokens.max(1) as f64)
    }
}

/// What the source's last layer gives for parts of as many windows as are computed as one, with their numbers. Where one of a part is
/// not known all of it are computed: what is kept changes no shape and no result.
fn of_source(
    source: &Model,
    known: &mut Known,
    parts: &[(Vec<usize>, Vec<u32>)],
    pass: &Pass,
) -> Result<Vec<Tensor>, RuntimeError> {
    let theirs = parts.iter().map(|(numbers, _)| known.of(numbers));
    let mut theirs = theirs.collect::<candle_core::Result<Vec<Option<Tensor>>>>()?;
    let missing: Vec<usize> = (0..parts.len()).filter(|&i| theirs[i].is_none()).collect();
    let entered = source.each(&missing, |&i| source.embed(&parts[i].1, pass))?;
    for (i, made) in missing.into_iter().zip(source.through(0, entered, pass)?) {
        known.keep(&parts[i].0, &made)?;
        theirs[i] = Some(made);
    }
    Ok(theirs.into_iter().flatten().collect())
}

/// How far a model is from its source on a text, and which way is up.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Gradient {
    /// The mean of KL(source ‖ model) over all tokens, in nats.
    pub divergence: f64,
    /// Its gradient with respect to the shared heads of every layer, in their places.
    pub heads: Vec<Pooled>,
    /// And with respect to norms and MLPs, by tensor, as [`SharedHeads::with_others`](crate::plan::SharedHeads::with_others) takes them;
    /// empty unless all are trained.
    pub others: BTreeMap<String, Vec<f32>>,
}

/// The divergence of `model` from `source` and its gradient with respect to what is trained: for those who bring a descent of their
/// own.
///
/// # Errors
/// [`RuntimeError::Vocabulary`] unless the two have one vocabulary; as [`Distill::run`](super::Distill::run).
pub fn gradient(
    source: &Model,
    model: &Model,
    windows: &Windows,
    trained: Trained,
) -> Result<Gradient, RuntimeError> {
    let (expected, found) = (source.vocabulary(), model.vocabulary());
    if expected != found {
        return Err(RuntimeError::Vocabulary { expected, found });
    }
    let mut trainer = Trainer::new(source, model.clone(), Descent::default(), trained)?;
    let texts: Vec<(usize, &[u32])> = windows.batches(1).enumerate().collect();
    let (divergence, gradients) = trainer.gradients(&texts, 0.0)?;
    let (mut heads, mut others) = (Vec::with_capacity(gradients.len()), BTreeMap::new());
    for (i, of) in gradients.iter().enumerate() {
        heads.push(model.laid_out(i, of)?);
        if trained == Trained::All {
            others.extend(model.stored_gradients(i, of)?);
        }
    }
    Ok(Gradient { divergence, heads, others })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::descent::Order;
    use crate::heads::HeadSource;
    use crate::partition::Partition;
    use crate::plan::{LayerPlan, Method, Plan, Pooling, SharedHeads};
    use crate::run::Run;
    use crate::spec::Spec;

    /// A source, and it with shared heads.
    fn models() -> [Model; 2] {
        let checkpoint = Checkpoint::open("tests/data/novels-1m").unwrap();
        let source = Model::load(&checkpoint).unwrap();
        let by_hand = Method::new("by hand", Spec::new("none"), Spec::new("none"), Spec::new("none"));
        let groups = Partition::from_groups(8, &[vec![0, 1, 2], vec![3], vec![4, 5], vec![6, 7]]).unwrap();
        let (pooling, layers) = (Pooling::new(Spec::new("mean")), vec![LayerPlan::new(groups, 0.0); 4]);
        let plan = Plan::new(checkpoint.id().unwrap(), by_hand, pooling, layers, 0.5, 0).unwrap();
        let shared = source.with_shared(&SharedHeads::new(&plan, &checkpoint).unwrap()).unwrap();
        [source, shared]
    }

    /// All numbers of gradients, as they are.
    fn bits(gradients: &[LayerWeights]) -> Vec<Vec<f32>> {
        let tensors = gradients.iter().flat_map(LayerWeights::tensors);
        tensors.map(|tensor| tensor.flatten_all().unwrap().to_vec1().unwrap()).collect()
    }

    #[test]
    fn gradients_are_the_same_whatever_is_kept_on_the_way() {
        let [source, model] = models();
        let text = text(5);
        let windows: Vec<(usize, &[u32])> = text.batches(1).enumerate().collect();
        for trained in [Trained::Attention, Trained::All] {
            let mut trainer = Trainer::new(&source, model.clone(), Descent::AdamW, trained).unwrap();
            assert_eq!(trainer.traced, 0, "the CPU has no room");
            let [without, some, all] = [0, 1 << 17, usize::MAX].map(|room| {
                trainer.traced = room;
                let (divergence, gradients) = trainer.gradients(&windows, 0.3).unwrap();
                (divergence, bits(&gradients))
            });
            assert!(without.1.len() >= 4 * 4 && without == some && without == all, "{trained:?}");
        }
    }

    /// Windows of 16 tokens, all different.
    fn text(windows: usize) -> Windows {
        Windows::new((0..16 * windows as u32).map(|t| (t * t + t / 7) % 1021).collect(), 16).unwrap()
    }

    /// Three rounds of six windows end where they end whether the source is computed for every step, for some windows or once.
    #[test]
    fn steps_are_the_same_whatever_is_known() {
        let ([source, model], text) = (models(), text(6));
        let texts: Vec<&[u32]> = text.batches(1).collect();
        let one = 16 * source.width();
        for (descent, trained) in [(Descent::AdamW, Trained::All), (Descent::Muon, Trained::Attention)] {
            let [none, some, all] = [0, 4 * one - 1, usize::MAX].map(|room| {
                let mut trainer = Trainer::new(&source, model.clone(), descent, trained).unwrap();
                trainer.known = Known::new(room);
                let mut order = Order::new(texts.len(), Run::new(3));
                let step = |step: u64| {
                    let numbers = order.batch(step, 3).into_iter();
                    let windows: Vec<(usize, &[u32])> = numbers.map(|n| (n, texts[n])).collect();
                    trainer.step(&windows, step, 1e-3, 0.2).unwrap().to_bits()
                };
                let losses: Vec<u64> = (0..6).map(step).collect();
                assert_eq!(trainer.known.len(), (room / one).min(6));
                (losses, bits(&trainer.weights))
            });
            assert!(none == some && none == all && none.0[0] != none.0[5]);
        }
    }

    /// Windows that are computed as one are known one by one, in whatever company they come again.
    #[test]
    fn parts_of_several_windows_are_known_whole_or_computed_whole() {
        let ([source, model], text) = (models(), text(5));
        let texts: Vec<&[u32]> = text.batches(1).collect();
        let pass = source.pass(16, 0).unwrap();
        let part = |numbers: &[usize]| {
            (numbers.to_vec(), numbers.iter().map(|&n| texts[n]).collect::<Vec<_>>().concat())
        };
        let mut trainer = Trainer::new(&source, model, Descent::AdamW, Trained::Attention).unwrap();
        let mut all = |room: Option<usize>| {
            trainer.known = room.map_or(std::mem::take(&mut trainer.known), Known::new);
            let parts = [part(&[0, 1]), part(&[3, 2]), part(&[1, 3]), part(&[4, 0]), part(&[2])];
            let found = of_source(&source, &mut trainer.known, &parts, &pass).unwrap();
            let numbers = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            (found.iter().map(numbers).collect::<Vec<_>>(), trainer.known.len())
        };
        let (expected, _) = all(Some(0));
        assert!(expected[..4].iter().all(|part| part.len() == 2 * 16 * source.width()));
        // Of window 2 there is one that was computed with another, and one that was alone.
        for (room, known) in [(Some(usize::MAX), 6), (None, 6), (Some(3 * 16 * source.width()), 3), (None, 3)]
        {
            assert!(all(room) == (expected.clone(), known), "{known}");
        }
    }

    #[test]
    fn windows_are_kept_that_come_again() {
        let [source, model] = models();
        let (fit, validation) = (text(6), text(2));
        let room = |asked, validation| {
            let mut trainer =
                Trainer::new(&source, model.clone(), Descent::AdamW, Trained::Attention).unwrap();
            trainer.keep(asked, &fit, validation);
            trainer.known.room()
        };
        assert_eq!([room(Some(6), None), room(Some(7), None)], [0, source.kept()]);
        assert_eq!(room(None, Some(&validation)), source.kept() - 2 * 16 * source.width());
    }
}
