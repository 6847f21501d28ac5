use crate::error::{Error, Result};

/// How a text goes into a cache: most of it as a prompt, in pieces, then token by token.
///
/// ```
/// use qcqa::runtime::Steps;
///
/// assert_eq!(Steps::new(4, 2)?.lengths(11), [4, 4, 1, 1, 1]);
/// assert_eq!(Steps::new(64, 0)?.lengths(11), [11]);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    chunk: usize,
    decoded: usize,
}

impl Default for Steps {
    /// Pieces of 64 tokens, and the last 16 one by one.
    fn default() -> Self {
        Self { chunk: 64, decoded: 16 }
    }
}

impl Steps {
    /// Pieces of `chunk` tokens, and the last `decoded` ones one by one.
    ///
    /// # Errors
    /// [`Error::Setting`] for pieces of 0 tokens.
    pub fn new(chunk: usize, decoded: usize) -> Result<Self> {
        if chunk == 0 {
            return Err(Error::setting("chunk", chunk, "at least 1 token"));
        }
        Ok(Self { chunk, decoded })
    }

    /// Tokens of each step over a text of `len`: the last piece of the prompt may be shorter.
    pub fn lengths(&self, len: usize) -> Vec<usize> {
        let decoded = self.decoded.min(len.saturating_sub(1));
        let prompt = len - decoded;
        let pieces = (0..prompt).step_by(self.chunk).map(|from| self.chunk.min(prompt - from));
        pieces.chain(std::iter::repeat_n(1, decoded)).collect()
    }
}
