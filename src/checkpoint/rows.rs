use std::path::Path;

use super::Dtype;
use crate::error::Result;
use crate::files::FileError;
use crate::heads::{HeadRows, read_across};
use crate::model::{Axis, Stored};

/// The keys and values of a layer as rows, decoded from the mapped file piece by piece.
///
/// Row i is head i's key weights, value weights, key bias and value bias, as those of [`Heads`](crate::heads::Heads);
/// nothing the size of a layer is allocated. NaN and infinities pass through: `check_finite` names their tensor.
#[derive(Debug)]
pub(super) struct LayerRows<'a> {
    pub(super) n_heads: usize,
    pub(super) head_dim: usize,
    pub(super) parts: Vec<RowPart<'a>>,
}

/// One stored tensor, of which each head has `head_dim · width` numbers.
#[derive(Debug)]
pub(super) struct RowPart<'a> {
    pub(super) stored: &'a Stored,
    pub(super) tensor: &'a str,
    pub(super) file: &'a Path,
    pub(super) bytes: &'a [u8],
    pub(super) dtype: Dtype,
    /// Inputs; 1 for a bias.
    pub(super) width: usize,
}

impl RowPart<'_> {
    /// Numbers of head `head` from `start` on.
    fn read(&self, head: usize, start: usize, out: &mut [f32]) {
        let (size, first) = (self.dtype.bytes(), self.stored.first + head * self.stored.stride);
        // A bias lies along its only dimension, whatever the matrix does.
        if self.width == 1 || self.stored.axis == Axis::Rows {
            let at = (first * self.width + start) * size;
            return self.dtype.decode(&self.bytes[at..][..out.len() * size], out);
        }
        for (i, number) in (start..).zip(out) {
            let (row, column) = (i / self.width, i % self.width);
            let at = (column * self.stored.extent + first + row) * size;
            self.dtype.decode(&self.bytes[at..][..size], std::slice::from_mut(number));
        }
    }
}

impl HeadRows for LayerRows<'_> {
    fn n_heads(&self) -> usize {
        self.n_heads
    }

    fn row_len(&self) -> usize {
        self.parts.iter().map(|part| self.head_dim * part.width).sum()
    }

    fn read(&self, head: usize, start: usize, out: &mut [f32]) {
        let parts = self.parts.iter().map(|part| (part, self.head_dim * part.width));
        read_across(parts, start, out, |part, _, start, out| part.read(head, start, out));
    }

    fn check_finite(&self) -> Result<()> {
        let mut block = [0.0; 1024];
        for part in &self.parts {
            for bytes in part.bytes.chunks(block.len() * part.dtype.bytes()) {
                let block = &mut block[..bytes.len() / part.dtype.bytes()];
                part.dtype.decode(bytes, block);
                if !block.iter().all(|v| v.is_finite()) {
                    let (path, tensor) = (part.file.to_path_buf(), part.tensor.to_string());
                    return Err(FileError::NotFinite { path, tensor }.into());
                }
            }
        }
        Ok(())
    }
}
