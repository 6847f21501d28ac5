use std::path::Path;

use super::{Dtype, FileError};
use crate::HeadRows;
use crate::fitness::read_across;

/// The keys and values of a layer as rows, decoded from the mapped file piece by piece.
///
/// Row i is head i's key weights, value weights, key bias and value bias, as in
/// [`Heads`](crate::Heads); nothing the size of a layer is allocated. NaN and infinities pass through:
/// [`LayerRows::check_finite`] names their tensor.
#[derive(Debug)]
pub struct LayerRows<'a> {
    n_heads: usize,
    parts: Vec<RowPart<'a>>,
}

/// One stored tensor: an equal share of it for each head, one after the other.
#[derive(Debug)]
pub(super) struct RowPart<'a> {
    pub(super) tensor: String,
    pub(super) file: &'a Path,
    pub(super) bytes: &'a [u8],
    pub(super) dtype: Dtype,
}

impl<'a> LayerRows<'a> {
    pub(super) fn new(n_heads: usize, parts: Vec<RowPart<'a>>) -> Self {
        Self { n_heads, parts }
    }

    /// Reads all rows once, to say which tensor holds a NaN or an infinity.
    ///
    /// # Errors
    /// [`FileError::NotFinite`].
    pub fn check_finite(&self) -> Result<(), FileError> {
        let mut block = [0.0; 1024];
        for part in &self.parts {
            for bytes in part.bytes.chunks(block.len() * part.dtype.bytes()) {
                let block = &mut block[..bytes.len() / part.dtype.bytes()];
                part.dtype.decode(bytes, block);
                if !block.iter().all(|v| v.is_finite()) {
                    let (path, tensor) = (part.file.to_path_buf(), part.tensor.clone());
                    return Err(FileError::NotFinite { path, tensor });
                }
            }
        }
        Ok(())
    }

    /// The bytes behind the rows, as they are stored: key weights, value weights, key bias, value bias.
    pub fn stored(&self) -> impl Iterator<Item = &'a [u8]> {
        self.parts.iter().map(|part| part.bytes)
    }

    /// Numbers of a head in this part.
    fn share(&self, part: &RowPart<'_>) -> usize {
        part.bytes.len() / part.dtype.bytes() / self.n_heads
    }
}

impl HeadRows for LayerRows<'_> {
    fn n_heads(&self) -> usize {
        self.n_heads
    }

    fn row_len(&self) -> usize {
        self.parts.iter().map(|part| self.share(part)).sum()
    }

    fn read(&self, head: usize, start: usize, out: &mut [f32]) {
        let parts = self.parts.iter().map(|part| (part, self.share(part)));
        read_across(parts, start, out, |part, share, start, out| {
            let size = part.dtype.bytes();
            part.dtype.decode(&part.bytes[(head * share + start) * size..][..out.len() * size], out);
        });
    }
}
