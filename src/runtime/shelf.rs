use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device as Place, Tensor};

use super::aside::{Aside, Own};
use super::attention::Attention;
use super::layer::{Layer, Weights};
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::heads::HeadSource;
use crate::model::Block;
use crate::run::map_ordered;
use crate::text::{RuntimeError, forward_of};

/// Layers that are read side by side; as many are in memory in f32 on their way to a device.
const ABREAST: usize = 4;

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
    /// In the files of the checkpoint. One layer, or some of the output embedding, is in memory at a time, and of what models have
    /// laid aside one attention.
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
    /// Of the output embedding.
    Rows(Range<usize>, Tensor),
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

    /// Rows of the output embedding, (n, d); none of an encoder. Who asks for what was read the last has it.
    pub(super) fn head(&self, rows: Range<usize>) -> Result<Tensor, RuntimeError> {
        let (checkpoint, place, recent) = match self {
            Self::Held { head, .. } => {
                let head = head.as_ref().ok_or(RuntimeError::NoPredictions)?;
                return Ok(head.narrow(0, rows.start, rows.len())?);
            }
            Self::Stored { checkpoint, place, recent, .. } => (checkpoint, place, recent),
        };
        let mut recent = recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Recent::Rows(known, head)) = &*recent {
            if *known == rows {
                return Ok(head.clone());
            }
        }
        // Behind the last layer comes the first again: nobody asks for what was read before now.
        *recent = None;
        let head = forward_of(checkpoint)?.head.as_ref().ok_or(RuntimeError::NoPredictions)?;
        let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
        let numbers = checkpoint.rows_of(head, &ids)?;
        let head = Tensor::from_vec(numbers, (rows.len(), checkpoint.architecture().hidden), place)?;
        *recent = Some(Recent::Rows(rows, head.clone()));
        Ok(head)
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
    fn rows_of_an_output_embedding_are_rows_of_the_whole() -> Result<(), RuntimeError> {
        let checkpoint = Checkpoint::open("tests/data/novels-1m")?;
        let (held, read) = (Model::load(&checkpoint)?, Model::open_by_layers(&checkpoint)?);
        let all = held.vocabulary();
        let whole = held.shelf.head(0..all)?.to_vec2::<f32>()?;
        for rows in [0..all, 0..1, 3..70, 3..70, all - 1..all] {
            assert_eq!(read.shelf.head(rows.clone())?.to_vec2::<f32>()?, whole[rows.clone()], "{rows:?}");
        }
        Ok(())
    }
}
