//! Tokens of one KV head, each with a note on how it was attended to.

use ndarray::{ArrayView2, ArrayView3};

use super::Kept;
use super::rows::Rows;

/// What one KV head keeps: which tokens differs from head to head, so their positions are held, and a note on each.
#[derive(Debug, Clone)]
pub(super) struct Noted<N> {
    pub(super) rows: Rows,
    pub(super) positions: Vec<u32>,
    pub(super) notes: Vec<N>,
}

impl<N: Clone> Noted<N> {
    pub(super) fn new(head_dim: usize) -> Self {
        Self { rows: Rows::new(head_dim), positions: Vec::new(), notes: Vec::new() }
    }

    /// Adds tokens at these positions, with the note that `note` makes for each.
    pub(super) fn append(
        &mut self,
        keys: ArrayView2<'_, f32>,
        values: ArrayView2<'_, f32>,
        positions: &[usize],
        note: impl Fn(u32) -> N,
    ) {
        self.rows.append(keys, values);
        let positions = positions.iter().map(|&position| position as u32);
        self.notes.extend(positions.clone().map(note));
        self.positions.extend(positions);
    }

    pub(super) fn read(&self) -> Kept {
        let [keys, values] = self.rows.read();
        Kept { keys, values, positions: self.positions.iter().map(|&p| p as usize).collect() }
    }

    /// The position after the last token.
    pub(super) fn next(&self) -> u32 {
        self.positions.last().map_or(0, |last| last + 1)
    }

    /// Drops the tokens for which `keep`, asked with their number, says no.
    pub(super) fn retain(&mut self, keep: impl Fn(usize) -> bool) {
        self.rows.retain(&keep);
        let mut token = 0..;
        self.positions.retain(|_| token.next().is_some_and(&keep));
        let mut token = 0..;
        self.notes.retain(|_| token.next().is_some_and(&keep));
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.bytes() + size_of_val(&*self.positions) + size_of_val(&*self.notes)
    }
}

/// Adds the keys and values (k, T, h) of all heads.
pub(super) fn append_each<N: Clone>(
    heads: &mut [Noted<N>],
    keys: ArrayView3<'_, f32>,
    values: ArrayView3<'_, f32>,
    positions: &[usize],
    note: impl Fn(u32) -> N,
) {
    for ((head, keys), values) in heads.iter_mut().zip(keys.outer_iter()).zip(values.outer_iter()) {
        head.append(keys, values, positions, &note);
    }
}
