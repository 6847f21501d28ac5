//! The attention of a layer in a file, for as long as nobody runs it.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{DType, Device as Place, Tensor};

use super::attention::Attention;
use super::model::numbers;
use super::shelf::Shelf;
use super::{Model, RuntimeError};
use crate::files::{FileError, unnamed};

/// An attention that a model has in place of its checkpoint's.
#[derive(Debug, Clone)]
pub(super) enum Own {
    Held(Box<Attention>),
    Aside(Arc<Aside>),
}

impl From<Attention> for Own {
    fn from(attention: Attention) -> Self {
        Self::Held(Box::new(attention))
    }
}

impl Own {
    /// It, perhaps without its matrices.
    pub(super) fn known(&self) -> &Attention {
        match self {
            Self::Held(attention) => attention,
            Self::Aside(aside) => &aside.rest,
        }
    }
}

/// An attention whose matrices are in a file without a name, which is gone with it.
#[derive(Debug)]
pub(super) struct Aside {
    /// All else; its matrices are empty.
    rest: Attention,
    /// Rows and columns of the matrices.
    shapes: [(usize, usize); 2],
    file: Mutex<File>,
}

impl Aside {
    fn new(attention: &Attention) -> Result<Self, RuntimeError> {
        let mut file = unnamed().map_err(|error| failed("write", error))?;
        let matrices = [&attention.qkv, &attention.output];
        for matrix in matrices {
            let bytes: Vec<u8> = numbers(matrix)?.into_iter().flat_map(f32::to_le_bytes).collect();
            file.write_all(&bytes).map_err(|error| failed("write", error))?;
        }
        let shapes = [matrices[0].dims2()?, matrices[1].dims2()?];
        let none = Tensor::zeros((0, 0), DType::F32, &Place::Cpu)?;
        let mut rest = attention.clone();
        (rest.qkv, rest.output) = (none.clone(), none);
        Ok(Self { rest, shapes, file: Mutex::new(file) })
    }

    /// All of it, from the file.
    pub(super) fn whole(&self) -> Result<Attention, RuntimeError> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(0)).map_err(|error| failed("read", error))?;
        let mut matrix = |(rows, columns): (usize, usize)| {
            let mut bytes = vec![0; rows * columns * DType::F32.size_in_bytes()];
            file.read_exact(&mut bytes).map_err(|error| failed("read", error))?;
            Ok::<_, RuntimeError>(Tensor::from_raw_buffer(&bytes, DType::F32, &[rows, columns], &Place::Cpu)?)
        };
        let mut attention = self.rest.clone();
        (attention.qkv, attention.output) = (matrix(self.shapes[0])?, matrix(self.shapes[1])?);
        Ok(attention)
    }
}

fn failed(what: &'static str, error: io::Error) -> FileError {
    FileError::io(what, &std::env::temp_dir(), error)
}

impl Model {
    /// Takes what this model has of its own in layer `i` out of memory, where its weights stay in files, too.
    pub(crate) fn lay_aside(&mut self, i: usize) -> Result<(), RuntimeError> {
        if let (Shelf::Stored { .. }, Some(Own::Held(attention))) = (&*self.shelf, &self.attention[i]) {
            self.attention[i] = Some(Own::Aside(Arc::new(Aside::new(attention)?)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;
    use crate::checkpoint::Checkpoint;

    /// What was laid aside comes back bit for bit, and is read by the models that share it.
    #[test]
    fn what_is_laid_aside_comes_back() -> Result<(), Box<dyn Error>> {
        let mut model = Model::open_by_layers(&Checkpoint::open("tests/data/novels-1m")?)?;
        let tokens: Vec<u32> = (0..24).map(|t| t * 37 % 1021).collect();
        let pass = model.pass(24, 0)?;
        for i in 0..2 {
            let weights = model.attention_weights(i)?;
            let changed = weights.map(|w| w.affine(1.5, 0.01))?;
            model.set_weights(i, &changed)?;
        }
        let ran = |model: &Model| -> Result<Vec<f32>, RuntimeError> {
            numbers(&model.through(0, vec![model.embed(&tokens, &pass)?], &pass)?[0])
        };
        let (before, held) = (ran(&model)?, model.clone());
        model.lay_aside(0)?;
        model.lay_aside(1)?;
        let other = held.with_layer_of(&model, 1);
        assert!(matches!(&model.attention[..2], [Some(Own::Aside(_)), Some(Own::Aside(_))]));
        assert!(matches!(&other.attention[..2], [Some(Own::Held(_)), Some(Own::Aside(_))]));
        for model in [&model, &other, &held] {
            assert_eq!(ran(model)?, before);
            assert_eq!(model.kv_heads(), held.kv_heads());
        }
        // Who holds all of its weights holds these, too.
        let mut whole = Model::load(&Checkpoint::open("tests/data/novels-1m")?)?;
        whole.set_weights(0, &held.attention_weights(0)?)?;
        whole.lay_aside(0)?;
        assert!(matches!(whole.attention[0], Some(Own::Held(_))));
        Ok(())
    }
}
