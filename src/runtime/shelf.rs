use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device as Place, Tensor};

use super::aside::{Aside, Own};
use super::attention::Attention;
use super::layer::{Layer, Weights, linear};
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::heads::HeadSource;
use crate::model::{Block, Forward};
use crate::run::map_ordered;
use crate::text::{RuntimeError, forward_of};

/// Layers that are read side by side; as many are in memory in f32 on their way to a device.
const ABREAST: usize = 4;
/// Numbers of an output embedding that are in memory at a time where it is in files.
const PART: usize = 1 << 23;

/// Where the weights of a model are while it runs.
#[derive(Debug)]
pub(super) enum Shelf {
    /// In memory.
    Held {
        layers: Vec<Layer>,
        /// (vocabulary, d).
        embedding: Tensor,
        /// (vocabulary, d), of a model that predicts.
        head: Option<Tensor>,
    },
    /// In the files of the checkpoint. One layer, or the output embedding, is in memory at a time, and of what models have laid
    /// aside one attention.
    Stored {
        checkpoint: Box<Checkpoint>,
        place: Place,
        recent: Mutex<Option<Recent>>,
        aside: Mutex<Option<(Arc<Aside>, Arc<Attention>)>>,
    },
}

/// What was read the last.
#[derive(Debug)]
pub(super) enum Recent {
    Layer(usize, Arc<Layer>),
    Head(Tensor),
}

impl Shelf {
    /// All weights of a checkpoint, in memory.
    pub(super) fn held(checkpoint: &Checkpoint, place: &Place) -> Result<Self, RuntimeError> {
        let (forward, weights) = (forward_of(checkpoint)?, Weights::of(checkpoint, place));
        let mut layers = Vec::with_capacity(forward.blocks.len());
        for (first, blocks) in forward.blocks.chunks(ABREAST).enumerate() {
            let load = |n: usize| Layer::load(&weights, &blocks[n], first * ABREAST + n);
            layers.extend(map_ordered(blocks.len(), load).into_iter().collect::<Result<Vec<_>, _>>()?);
        }
        let shape = [forward.vocabulary, weights.width];
        let embedding = weights.take(&forward.embedding, &shape)?;
        let head = forward.head.as_ref().map(|head| match *head == forward.embedding {
            true => Ok(embedding.clone()),
            false => weights.take(head, &shape),
        });
        let head = head.transpose()?;
        Ok(Self::Held { layers, embedding, head })
    }

    /// The weights of a checkpoint, which are all there.
    pub(super) fn stored(checkpoint: &Checkpoint, place: &Place) -> Result<Self, RuntimeError> {
        let (forward, weights) = (forward_of(checkpoint)?, Weights::of(checkpoint, place));
        for (i, block) in forward.blocks.iter().enumerate() {
            Layer::check(&weights, block, i)?;
        }
        for name in [&forward.embedding].into_iter().chain(&forward.head) {
            checkpoint.check_tensor(name, &[forward.vocabulary, weights.width])?;
        }
        let checkpoint = Box::new(checkpoint.clone());
        Ok(Self::from_files(checkpoint, place))
    }

    fn from_files(checkpoint: Box<Checkpoint>, place: &Place) -> Self {
        let (recent, aside) = (Mutex::new(None), Mutex::new(None));
        Self::Stored { checkpoint, place: place.clone(), recent, aside }
    }

    /// These weights, where those in 16 bits round what they are multiplied with.
    pub(super) fn rounding(&self) -> Self {
        match self {
            Self::Held { layers, embedding, head } => {
                let layers =
                    layers.iter().cloned().map(|layer| Layer { rest: layer.rest.rounding(), ..layer });
                Self::Held { layers: layers.collect(), embedding: embedding.clone(), head: head.clone() }
            }
            // Read for every use, and on the CPU: nothing is held in 16 bits.
            Self::Stored { checkpoint, place, .. } => Self::from_files(checkpoint.clone(), place),
        }
    }

    /// Layer `i`. Who asks for one that is being read waits for it.
    pub(super) fn layer(&self, i: usize) -> Result<Layer, RuntimeError> {
        let (checkpoint, place, recent) = match self {
            Self::Held { layers, .. } => return Ok(layers[i].clone()),
            Self::Stored { checkpoint, place, recent, .. } => (checkpoint, place, recent),
        };
        let mut recent = recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Recent::Layer(n, layer)) = &*recent {
            if *n == i {
                return Ok(Layer::clone(layer));
            }
        }
        // Before the next is read: two are never there.
        *recent = None;
        let block: Option<&Block> = forward_of(checkpoint)?.blocks.get(i);
        let block = block.ok_or(Error::NoLayer { layer: i, layers: checkpoint.architecture().n_layers() })?;
        let layer = Arc::new(Layer::load(&Weights::of(checkpoint, place), block, i)?);
        *recent = Some(Recent::Layer(i, Arc::clone(&layer)));
        Ok(Layer::clone(&layer))
    }

    /// An attention that a model has of its own. Who asks for one that is being read waits for it.
    pub(super) fn attention(&self, own: &Own) -> Result<Attention, RuntimeError> {
        let (asked, aside) = match (own, self) {
            (Own::Held(attention), _) => return Ok(Attention::clone(attention)),
            (Own::Aside(asked), Self::Held { .. }) => return asked.whole(),
            (Own::Aside(asked), Self::Stored { aside, .. }) => (asked, aside),
        };
        let mut recent = aside.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, attention)) = &*recent {
            if Arc::ptr_eq(known, asked) {
                return Ok(Attention::clone(attention));
            }
        }
        *recent = None;
        let attention = Arc::new(asked.whole()?);
        *recent = Some((Arc::clone(asked), Arc::clone(&attention)));
        Ok(Attention::clone(&attention))
    }

    /// The output embedding, (vocabulary, d); none of an encoder.
    pub(super) fn head(&self) -> Result<Tensor, RuntimeError> {
        let (checkpoint, place, recent) = match self {
            Self::Held { head, .. } => return head.clone().ok_or(RuntimeError::NoPredictions),
            Self::Stored { checkpoint, place, recent, .. } => (checkpoint, place, recent),
        };
        let mut recent = recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Recent::Head(head)) = &*recent {
            return Ok(head.clone());
        }
        *recent = None;
        let Forward { vocabulary, head, .. } = forward_of(checkpoint)?;
        let weights = Weights::of(checkpoint, place);
        let head = head.as_ref().ok_or(RuntimeError::NoPredictions)?;
        let head = weights.take(head, &[*vocabulary, weights.width])?;
        *recent = Some(Recent::Head(head.clone()));
        Ok(head)
    }

    /// What the output embedding makes of what it reads, (N, d) → (N, vocabulary); a part of it is in memory at a time where it is in
    /// files.
    pub(super) fn predicted(&self, x: &Tensor) -> Result<Tensor, RuntimeError> {
        self.predicted_in_parts(x, PART)
    }

    /// As [`Shelf::predicted`], in parts of at most so many numbers, or of one row.
    fn predicted_in_parts(&self, x: &Tensor, most: usize) -> Result<Tensor, RuntimeError> {
        let (checkpoint, place, recent) = match self {
            Self::Held { .. } => return Ok(linear(x, &self.head()?, &None)?),
            Self::Stored { checkpoint, place, recent, .. } => (checkpoint, place, recent),
        };
        // Behind the last layer comes the first again: nobody asks for that one now.
        recent
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take_if(|held| matches!(held, Recent::Layer(..)));
        let Forward { vocabulary, head, .. } = forward_of(checkpoint)?;
        let head = head.as_ref().ok_or(RuntimeError::NoPredictions)?;
        let (n, width) = x.dims2()?;
        let made = Tensor::zeros((n, *vocabulary), x.dtype(), place)?;
        let most = (most / width.max(1)).max(1);
        for first in (0..*vocabulary).step_by(most) {
            let rows: Vec<u32> = (first as u32..(first + most).min(*vocabulary) as u32).collect();
            let part = Tensor::from_vec(checkpoint.rows_of(head, &rows)?, (rows.len(), width), place)?;
            made.slice_set(&linear(x, &part, &None)?, 1, first)?;
        }
        Ok(made)
    }

    /// The input embeddings of tokens, all of which are of the vocabulary: (N, d).
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Tensor, RuntimeError> {
        match self {
            Self::Held { embedding, .. } => {
                let ids = Tensor::from_slice(tokens, tokens.len(), embedding.device())?;
                Ok(embedding.index_select(&ids, 0)?)
            }
            Self::Stored { checkpoint, place, .. } => {
                let rows = checkpoint.rows_of(&forward_of(checkpoint)?.embedding, tokens)?;
                let width = checkpoint.architecture().hidden;
                Ok(Tensor::from_vec(rows, (tokens.len(), width), place)?)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Model;

    #[test]
    fn parts_of_an_output_embedding_are_the_whole_of_it() -> Result<(), RuntimeError> {
        let checkpoint = Checkpoint::open("tests/data/novels-1m")?;
        let (held, read) = (Model::load(&checkpoint)?, Model::open_by_layers(&checkpoint)?);
        let x = Tensor::randn(0f32, 1.0, (3, held.width()), &Place::Cpu)?;
        let whole = held.shelf.predicted(&x)?.to_vec2::<f32>()?;
        for rows in [1, 7, held.vocabulary() - 1, held.vocabulary(), 2 * held.vocabulary()] {
            let parts = read.shelf.predicted_in_parts(&x, rows * held.width())?;
            for (whole, part) in whole.iter().flatten().zip(parts.to_vec2::<f32>()?.iter().flatten()) {
                assert!((whole - part).abs() < 1e-5 * (1.0 + whole.abs()), "{rows}");
            }
        }
        Ok(())
    }
}
