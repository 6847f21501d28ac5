//! What all layers of one forward pass share.

use std::collections::BTreeMap;

use super::ops::KeptMask;
use super::rope::Rope;
use super::{Model, RuntimeError};
use crate::model::Mask;

/// What all layers of one forward pass share.
#[derive(Debug)]
pub(crate) struct Pass {
    /// Where the new tokens of each row stand, ascending.
    pub(super) positions: Vec<usize>,
    /// Of every layer.
    pub(super) ropes: Vec<Rope>,
    /// What hides keys, kept for all layers that reach as far.
    pub(super) masks: BTreeMap<usize, KeptMask>,
}

impl Pass {
    /// How positions turn the heads of a layer.
    pub(crate) fn rope(&self, layer: usize) -> &Rope {
        &self.ropes[layer]
    }

    /// Where the new tokens of each row stand, ascending.
    pub(crate) fn positions(&self) -> &[usize] {
        &self.positions
    }
}

impl Model {
    /// What the layers share when they read `len` tokens of each row after `start` others.
    pub(crate) fn pass(&self, len: usize, start: usize) -> Result<Pass, RuntimeError> {
        let expected = self.positions();
        match start.checked_add(len) {
            Some(end) if len > 0 && end <= expected => {}
            end => return Err(RuntimeError::Positions { expected, found: end.unwrap_or(usize::MAX) }),
        }
        let positions: Vec<usize> = (start..start + len).collect();
        let mut ropes: Vec<Rope> = Vec::with_capacity(self.n_layers());
        for (i, spec) in self.specs.iter().enumerate() {
            let alike = self.specs[..i].iter().position(|other| other.rotary == spec.rotary);
            ropes.push(match alike {
                Some(j) => ropes[j].clone(),
                None => Rope::new(spec.rotary.as_ref(), &positions, &self.device)?,
            });
        }
        // Whoever looks at everything reaches as far as the most, with another mask.
        let causal = self.specs.iter().filter(|spec| spec.mask != Mask::Whole);
        let masks = causal.map(|spec| (spec.mask.reach(), KeptMask::default())).collect();
        Ok(Pass { positions, ropes, masks })
    }
}
