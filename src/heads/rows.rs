use super::Heads;
use crate::error::Result;

/// The heads of a layer as H long rows: whatever can be read in pieces can be compared.
///
/// [`Heads`] is one; a checkpoint's mapped tensors are another, decoded piece by piece.
pub trait HeadRows: Send + Sync {
    /// Number of rows, H.
    fn n_heads(&self) -> usize;

    /// Length of a row.
    fn row_len(&self) -> usize;

    /// Writes the elements of row `head` from `start` on into `out`.
    ///
    /// # Panics
    /// When there is no such head or `start + out.len()` exceeds the row.
    fn read(&self, head: usize, start: usize, out: &mut [f32]);

    /// Says which tensor holds NaN or an infinity, where rows can hold any.
    ///
    /// # Errors
    /// [`Error::NotFinite`](crate::Error::NotFinite), or another that names the tensor.
    fn check_finite(&self) -> Result<()> {
        Ok(())
    }
}

/// Key weights, value weights, key bias and value bias of a head, one after the other.
impl HeadRows for Heads {
    fn n_heads(&self) -> usize {
        self.key().n_heads()
    }

    fn row_len(&self) -> usize {
        parts(self).map(|part| part.len() / self.n_heads()).sum()
    }

    fn read(&self, head: usize, start: usize, out: &mut [f32]) {
        let parts = parts(self).map(|part| (part, part.len() / self.n_heads()));
        read_across(parts, start, out, |part, len, start, out| {
            out.copy_from_slice(&part[head * len + start..][..out.len()]);
        });
    }
}

/// Reads a row that lies in several parts, each with its length: `copy(part, length, start, out)` for every piece.
pub(crate) fn read_across<P>(
    parts: impl Iterator<Item = (P, usize)>,
    mut start: usize,
    mut out: &mut [f32],
    copy: impl Fn(P, usize, usize, &mut [f32]),
) {
    for (part, len) in parts {
        if start < len && !out.is_empty() {
            let (now, rest) = out.split_at_mut(out.len().min(len - start));
            copy(part, len, start, now);
            out = rest;
            start = len;
        }
        start -= len.min(start);
    }
    assert!(out.is_empty(), "read past the end of a head");
}

/// The contiguous arrays that make up the rows, each (H, something).
fn parts(heads: &Heads) -> impl Iterator<Item = &[f32]> {
    let (k, v) = (heads.key(), heads.value());
    [Some(k.weight_slice()), Some(v.weight_slice()), k.bias_slice(), v.bias_slice()].into_iter().flatten()
}
