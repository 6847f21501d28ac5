//! Where experts are.

use super::decoder::Decoder;
use crate::model::{Experts, Linear, Mlp};

/// Experts of a layer, of whom each is like an MLP.
#[derive(Debug, Clone)]
pub(super) struct Mixture {
    /// Scores: a weight in the layer, and a bias where that is stored.
    pub(super) router: &'static str,
    /// Where the experts are.
    pub(super) experts: &'static str,
    pub(super) within: Within,
    pub(super) count: usize,
    pub(super) chosen: usize,
    pub(super) normalised: bool,
    /// Layers that have one MLP instead.
    pub(super) dense: Vec<bool>,
}

/// How the experts of a layer lie.
#[derive(Debug, Clone, Copy)]
pub(super) enum Within {
    /// One after the other by number: gate, up and down of one.
    Each([&'static str; 3]),
    /// All in one tensor, the other way round, with biases: gate and up in turn, and down.
    Stacked([&'static str; 2]),
}

impl Decoder<'_> {
    /// What a layer with experts has in the place of an MLP.
    pub(super) fn experts(&self, layer: usize, mixture: &Mixture) -> Experts {
        let Mixture { router, experts, within, count, chosen, normalised, .. } = mixture;
        let name = |part: &str| self.of_layer(layer, &format!("{experts}.{part}"));
        let one = |e: usize, of: usize| {
            let [gate, up, down] = match within {
                Within::Each(parts) => {
                    parts.map(|part| Linear::new(name(&format!("{e}.{part}.weight")), None))
                }
                Within::Stacked([wide, down]) => {
                    let [wide, down] = [wide, down].map(|part| {
                        Linear::new(name(part), Some(name(&format!("{part}_bias"))))
                            .transposed()
                            .stacked(e, of)
                    });
                    [wide.clone().interleaved().part(0, 2), wide.interleaved().part(1, 2), down]
                }
            };
            Mlp::new(gate, up, down).with_activation(self.activation)
        };
        // However many config.json claims, not many more than there are.
        let stored = |e: usize| {
            let shape = self.tensors.shape(&one(e, *count).up.weight);
            shape.is_some_and(|shape| matches!(within, Within::Each(_)) || shape.first() > Some(&e))
        };
        let there = (0..*count).take_while(|&e| stored(e)).count().max(1) + 1;
        let count = there.min(*count);
        let bias = self.tensors.existing(self.of_layer(layer, &format!("{router}.bias")));
        let router = self.of_layer(layer, &format!("{router}.weight"));
        let all = (0..count).map(|e| one(e, count)).collect();
        Experts::new(router, all, *chosen, *normalised).with_router_bias(bias)
    }
}
