//! Outputs in the source's own tensors, with their heads in other places.

use serde_json::{Map, Value};

use super::{Content, OutputModel, OutputTensor, Slot};
use crate::error::{Error, Result};
use crate::model::{Architecture, AttentionSpec, NormOver, Part, Stored, StoredHeads};

impl OutputModel {
    /// An output in the source's tensors, with other heads in them: `slots` gives the KV heads and the query
    /// heads of a layer, in their new order.
    ///
    /// Query position p reads KV slot p / (queries / KV heads) and must find its own group there. Heads that
    /// lie alone or in a row are laid out anew, as many as there are; where they lie among others, one of
    /// each kind in turn, their number must stay.
    ///
    /// # Errors
    /// [`Error::Limits`] for another number of heads that lie among others, for a tensor that holds more than
    /// heads, and for a layer whose tensors are not known.
    pub fn from_slots(
        model: &Architecture,
        config: Map<String, Value>,
        slots: impl Fn(usize) -> (Vec<Slot>, Vec<Slot>),
    ) -> Result<Self> {
        let mut output = Self::new(config, Vec::new());
        for (layer, attention) in model.layers.iter().enumerate() {
            let stored = attention.stored.as_ref().ok_or_else(|| {
                let expected =
                    "an output keeps heads in the tensors in which its source has them".to_string();
                Error::Limits { layer, found: "has no named tensors".to_string(), expected }
            })?;
            let (kv, query) = slots(layer);
            let new = Relaid { layer, attention, stored, kv: &kv, query: &query };
            for name in stored.tensors() {
                output.tensors.push(OutputTensor::new(name, new.tensor(name)?));
            }
            for (part, slots) in [(Part::Query, &query), (Part::Key, &kv)] {
                output.lay_norms(layer, attention, part, slots)?;
            }
            if let Some(like) = attention.sinks.clone() {
                let (name, slots) = (like.clone(), query.clone());
                output.tensors.push(OutputTensor::new(name, Content::Sinks { like, layer, slots }));
            }
            output.kv_heads.push(kv.len());
        }
        Ok(output)
    }
}

impl OutputModel {
    /// Adds the norms of queries or keys of a layer whose weights belong to single heads.
    fn lay_norms(
        &mut self,
        layer: usize,
        attention: &AttentionSpec,
        part: Part,
        slots: &[Slot],
    ) -> Result<()> {
        let norm = attention.norms[part as usize].as_ref().filter(|norm| norm.over != NormOver::Head);
        let Some(norm) = norm else { return Ok(()) };
        let mut add = |name: &str, like: &[String], slots: &[Slot]| {
            let content = Content::HeadNorm { like: like.to_vec(), layer, part, slots: slots.to_vec() };
            self.tensors.push(OutputTensor::new(name, content));
        };
        if slots.len() > norm.heads.len() && !norm.heads.is_empty() {
            let found = format!("would have {} {part:?} heads", slots.len());
            let expected = "no more than before where the norm of each has a tensor of its own".to_string();
            return Err(Error::Limits { layer, found, expected });
        }
        for (name, slot) in norm.heads.iter().zip(slots) {
            add(name, &norm.heads, &[*slot]);
        }
        for name in norm.norm.tensors() {
            add(name, &[name.to_string()], slots);
        }
        self.left_out.extend(norm.heads.iter().skip(slots.len()).cloned());
        Ok(())
    }
}

/// A layer whose heads get other places in the source's tensors.
struct Relaid<'a> {
    layer: usize,
    attention: &'a AttentionSpec,
    stored: &'a StoredHeads,
    kv: &'a [Slot],
    query: &'a [Slot],
}

impl Relaid<'_> {
    /// What is in a tensor that holds heads or biases.
    fn tensor(&self, name: &str) -> Result<Content> {
        let parts = || Part::ALL.into_iter().map(|part| (part, self.stored.part(part)));
        let weights: Vec<_> = parts().filter(|(_, stored)| stored.tensor == name).collect();
        if let Some((_, stored)) = weights.first() {
            let axis = Some(stored.axis);
            return Ok(Content::heads(name, self.layer, axis, self.pieces(name, &weights)?));
        }
        let biases: Vec<_> = parts().filter(|(_, stored)| stored.bias.as_deref() == Some(name)).collect();
        match biases[..] {
            [(Part::Output, _)] => Ok(Content::OutputBias(self.layer)),
            _ => Ok(Content::heads(name, self.layer, None, self.pieces(name, &biases)?)),
        }
    }

    /// The new heads of a tensor, in the order in which the parts in it lie.
    fn pieces(&self, name: &str, parts: &[(Part, &Stored)]) -> Result<Vec<(Part, Slot)>> {
        let h = self.attention.head_dim;
        let refused = |found: String, expected: &str| {
            Err(Error::Limits { layer: self.layer, found, expected: expected.to_string() })
        };
        let mut places: Vec<(usize, Part, usize)> = Vec::new();
        for &(part, stored) in parts {
            let place = |head| (stored.first + head * stored.stride, part, head);
            places.extend((0..self.attention.heads(part)).map(place));
        }
        places.sort_by_key(|&(place, ..)| place);
        let extent = parts.iter().map(|(_, stored)| stored.extent).max().unwrap_or(0);
        if !places.iter().map(|&(place, ..)| place).eq((0..extent).step_by(h)) || places.len() * h != extent {
            return refused(format!("has more than heads in {name}"), "only heads can be laid out anew");
        }
        let mut pieces = Vec::with_capacity(places.len());
        for (_, part, head) in places {
            let new = match part {
                Part::Key | Part::Value => self.kv,
                Part::Query | Part::Output => self.query,
            };
            if self.stored.part(part).stride == h {
                // All of the new ones, where the first of the old ones lies.
                let all = if head == 0 { new } else { &[] };
                pieces.extend(all.iter().map(|&slot| (part, slot)));
            } else if new.len() == self.attention.heads(part) {
                pieces.push((part, new[head]));
            } else {
                let found = format!("would have {} {part:?} heads in {name}", new.len());
                return refused(found, "where heads lie among others their number cannot change");
            }
        }
        Ok(pieces)
    }
}
