//! Norms, by their names.

use super::decoder::Decoder;
use crate::files::FileError;
use crate::model::{HeadNorm, Norm, NormKind, NormOver};

/// How norms are.
#[derive(Debug, Clone, Copy)]
pub(super) struct NormRule {
    pub(super) kind: NormKind,
    /// Key of ε, if it has one, and its value where that is missing.
    pub(super) epsilon: (&'static str, f64),
    /// What is added to stored weights.
    pub(super) offset: f64,
}

impl Decoder<'_> {
    /// The norm of this name; its bias where that is stored.
    pub(super) fn norm(&self, name: &str) -> Result<Norm, FileError> {
        let (key, otherwise) = self.norms.epsilon;
        let epsilon = match self.config.get(key) {
            None => otherwise,
            Some(value) => match value.as_f64().filter(|&e| e > 0.0 && e < 1.0) {
                Some(epsilon) => epsilon,
                None => return Err(self.config.wrong(key, "between 0 and 1", value)),
            },
        };
        // The first names of the two, which old files have and which are renamed when they are loaded.
        let old = self.tensors.shape(&format!("{name}.gamma")).is_some();
        let [weight, bias] = if old { ["gamma", "beta"] } else { ["weight", "bias"] };
        let bias = self.tensors.existing(format!("{name}.{bias}"));
        // As the norm computes: in f32.
        let norm =
            Norm::new(format!("{name}.{weight}"), f64::from(epsilon as f32)).with_kind(self.norms.kind);
        if self.bare_norms {
            return Ok(Norm { weight: None, ..norm });
        }
        let biased = self.norms.kind == NormKind::Layer && !self.biases.no_norms;
        Ok(norm.with_offset(self.norms.offset).with_bias(bias.filter(|_| biased)))
    }

    /// The norm of this name of so many queries or keys.
    pub(super) fn head_norm(
        &self,
        layer: usize,
        name: &str,
        over: NormOver,
        heads: usize,
    ) -> Result<HeadNorm, FileError> {
        let name = self.of_layer(layer, &format!("{}.{name}", self.names.attention));
        let norm = self.norm(&name)?;
        if over != NormOver::OwnHead {
            return Ok(HeadNorm::new(norm, over));
        }
        if name.ends_with(".norms") {
            let each = |head: usize| format!("{name}.{head}.weight");
            // However many heads config.json claims, no more than there are tensors.
            let stored = heads.min(self.tensors.names().count());
            return Ok(HeadNorm::of_heads(norm, (0..stored).map(each).collect()));
        }
        Ok(HeadNorm::new(Norm { bias: None, ..norm }, over))
    }
}
