//! Attention some queries at a time: what none of them may look at is not computed.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use super::ops::{CausalSoftmax, combined};

/// Queries of a tile on a CPU.
const QUERIES: usize = 128;

/// Queries that are computed together, and the keys that any of them may look at.
#[derive(Debug)]
pub(super) struct Tile {
    /// Of all T tokens.
    queries: Range<usize>,
    tokens: usize,
    /// Of all S keys.
    pub(super) keys: Range<usize>,
    pub(super) softmax: CausalSoftmax,
}

impl Tile {
    /// What a softmax is computed in: on a CPU some queries each; elsewhere all at once, for there it is launches that cost.
    pub(super) fn all(softmax: CausalSoftmax, device: &Device) -> Vec<Self> {
        let tokens = softmax.visible.len();
        if !device.is_cpu() || tokens <= QUERIES {
            return vec![Self { queries: 0..tokens, tokens, keys: 0..softmax.keys, softmax }];
        }
        let tile = |(i, visible): (usize, &[Range<usize>])| {
            let ends = |of: fn(&Range<usize>) -> usize| visible.iter().map(of);
            let (first, last) = (ends(|r| r.start).min().unwrap_or(0), ends(|r| r.end).max().unwrap_or(0));
            let own = visible.iter().map(|range| range.start - first..range.end - first).collect();
            let softmax = CausalSoftmax { visible: own, keys: last - first, kept: None };
            let begin = i * QUERIES;
            Self { queries: begin..begin + visible.len(), tokens, keys: first..last, softmax }
        };
        softmax.visible.chunks(QUERIES).enumerate().map(tile).collect()
    }

    /// Its part of what belongs to queries, (B, groups, r·T, h) → (B, groups, r·t, h).
    pub(super) fn of_queries(&self, all: &Tensor) -> Result<Tensor> {
        if self.queries.len() == self.tokens {
            return Ok(all.clone());
        }
        let (batch, groups, rows, h) = all.dims4()?;
        let apart = all.reshape((batch, groups, rows / self.tokens, self.tokens, h))?;
        let own = apart.narrow(3, self.queries.start, self.queries.len())?.contiguous()?;
        own.reshape((batch, groups, (), h))
    }

    /// Its part of what belongs to keys, (B, groups, S, h) → (B, groups, s, h).
    pub(super) fn of_keys(&self, all: &Tensor) -> Result<Tensor> {
        all.narrow(2, self.keys.start, self.keys.len())
    }

    /// From what the queries of every tile have, (B, groups, r·t, h), to what all have by query head, (B, groups·r, T, h).
    pub(super) fn joined(tiles: &[Self], parts: &[Tensor]) -> Result<Tensor> {
        let part = |(tile, part): (&Self, &Tensor)| {
            let (batch, _, _, h) = part.dims4()?;
            part.reshape((batch, (), tile.queries.len(), h))
        };
        let parts = tiles.iter().zip(parts).map(part).collect::<Result<Vec<_>>>()?;
        if let [one] = &parts[..] { Ok(one.clone()) } else { Tensor::cat(&parts, 2) }
    }

    /// The sum over tiles of what each gives its keys, (B, groups, s, h) → (B, groups, S, h).
    pub(super) fn summed(tiles: &[Self], parts: &[Tensor], keys: usize) -> Result<Tensor> {
        let mut all = tiles.iter().zip(parts).map(|(tile, part)| {
            let Range { start, end } = tile.keys;
            if end - start == keys { Ok(part.clone()) } else { part.pad_with_zeros(2, start, keys - end) }
        });
        let first = all.next().unwrap_or_else(|| candle_core::bail!("attention of no query"))?;
        all.try_fold(first, |sum, part| combined(&sum, 1.0, &part?, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::ops::visible;
    use super::*;

    fn numbers(shape: (usize, usize, usize, usize), seed: usize) -> Tensor {
        let (a, b, c, d) = shape;
        let values: Vec<f32> =
            (0..a * b * c * d).map(|i| ((i * 7919 + seed * 31) % 401) as f32 / 200.0 - 1.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Attention, and what it gives its keys of a gradient that is its output.
    fn through(tiles: &[Tile], [query, keys, values]: [&Tensor; 3]) -> Result<[Tensor; 2]> {
        let (mut read, mut given) = (Vec::new(), Vec::new());
        for tile in tiles {
            let (q, k, v) = (tile.of_queries(query)?, tile.of_keys(keys)?, tile.of_keys(values)?);
            let weights = tile.softmax.of(q.matmul(&k.t()?)?, &[])?;
            read.push(weights.matmul(&v)?);
            given.push(weights.t()?.matmul(&read[read.len() - 1])?);
        }
        Ok([Tile::joined(tiles, &read)?, Tile::summed(tiles, &given, keys.dim(2)?)?])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Tiles together are the whole, whatever reaches how far.
        #[test]
        fn tiles_are_the_whole(
            t in 1usize..3 * QUERIES, before in 0usize..70, reach in prop_oneof![1usize..300, Just(usize::MAX)], batch in 1usize..3,
            groups in 1usize..3, r in 1usize..3,
        ) {
            let seen: Vec<usize> = (0..before + t).collect();
            let softmax = || CausalSoftmax { visible: visible(&seen[before..], &seen, reach), keys: seen.len(), kept: None };
            let whole = vec![Tile { queries: 0..t, tokens: t, keys: 0..seen.len(), softmax: softmax() }];
            let tiles = Tile::all(softmax(), &Device::Cpu);
            prop_assert_eq!(tiles.len(), t.div_ceil(QUERIES));
            let query = numbers((batch, groups, r * t, 4), 1);
            let [keys, values] = [2, 3].map(|seed| numbers((batch, groups, seen.len(), 4), seed));
            let of = |tiles: &[Tile]| through(tiles, [&query, &keys, &values]).unwrap();
            for (one, other) in of(&whole).iter().zip(&of(&tiles)) {
                let apart = (one - other).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                prop_assert!(apart < 1e-4, "{apart}");
            }
        }
    }
}
