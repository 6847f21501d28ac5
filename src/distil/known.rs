//! What the source gives for windows that are trained on more than once.

use std::collections::BTreeMap;

use candle_core::{Result as Candle, Tensor};

/// What the source's last layer gives for windows, (T, d) each.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// By how many windows were computed as one, since rounding may depend on that, and the window's number.
    windows: BTreeMap<[usize; 2], Tensor>,
    /// Numbers of further ones.
    room: usize,
}

impl Known {
    pub(super) fn new(room: usize) -> Self {
        Self { room, ..Self::default() }
    }

    /// Of windows that are computed as one, one below the other, where all are known.
    pub(super) fn of(&self, numbers: &[usize]) -> Candle<Option<Tensor>> {
        let known = numbers.iter().map(|&number| self.windows.get(&[numbers.len(), number]));
        known.collect::<Option<Vec<_>>>().map(|known| Tensor::cat(&known, 0)).transpose()
    }

    /// Keeps of windows that were computed as one those for which there is room.
    pub(super) fn keep(&mut self, numbers: &[usize], theirs: &Tensor) -> Candle<()> {
        let length = theirs.dim(0)? / numbers.len().max(1);
        for (i, &number) in numbers.iter().enumerate() {
            let (key, size) = ([numbers.len(), number], theirs.elem_count() / numbers.len());
            if size > self.room || self.windows.contains_key(&key) {
                continue;
            }
            let own = theirs.narrow(0, i * length, length)?;
            // A part would hold the whole.
            let own = if numbers.len() > 1 { own.force_contiguous()? } else { own };
            self.room -= size;
            self.windows.insert(key, own);
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.windows.len()
    }

    #[cfg(test)]
    pub(super) fn room(&self) -> usize {
        self.room
    }
}
