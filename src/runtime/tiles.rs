//! Attention some queries at a time: what none of them may look at is not computed.

use std::ops::Range;

use candle_core::{Result, Tensor};

use super::ops::{CausalSoftmax, combined};

/// Queries of a tile.
const QUERIES: usize = 128;
/// And on a GPU as many tiles at most, of scores so many that not to compute some pays for the launches.
const GPU_TILES: usize = 4;
const GPU_SCORES: usize = 1 << 24;

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
    /// What the softmax of queries (B, n_q, T, h) is computed in: on a CPU some queries each; elsewhere, where it is launches that cost,
    /// all at once unless there are many.
    pub(super) fn all(softmax: CausalSoftmax, query: &Tensor) -> Vec<Self> {
        let tokens = softmax.visible.len();
        let scores = query.dims()[..2].iter().product::<usize>() * tokens * softmax.keys;
        let queries = match (query.device().is_cpu(), scores >= GPU_SCORES) {
            (true, _) => QUERIES,
            (false, true) => QUERIES.max(tokens.div_ceil(GPU_TILES)),
            (false, false) => tokens,
        };
        Self::of_each(softmax, queries)
    }

    /// Tiles of so many queries.
    fn of_each(softmax: CausalSoftmax, queries: usize) -> Vec<Self> {
        let tokens = softmax.visible.len();
        if tokens <= queries {
            return vec![Self { queries: 0..tokens, tokens, keys: 0..softmax.keys, softmax }];
        }
        let tile = |(i, visible): (usize, &[Range<usize>])| {
            let ends = |of: fn(&Range<usize>) -> usize| visible.iter().map(of);
            let (first, last) = (ends(|r| r.start).min().unwrap_or(0), ends(|r| r.end).max().unwrap_or(0));
            let own = visible.iter().map(|range| range.start - first..range.end - first).collect();
            let begin = i * queries;
            let kept = softmax.kept.as_ref().map(|(kept, before)| (kept.clone(), before + begin));
            let softmax = CausalSoftmax { visible: own, keys: last - first, kept };
            Self { queries: begin..begin + visible.len(), tokens, keys: first..last, softmax }
        };
        softmax.visible.chunks(queries).enumerate().map(tile).collect()
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
    use candle_core::Device;
    use proptest::prelude::*;

    use super::super::ops::{KeptMasks, visible};
    use super::*;

    fn numbers(shape: (usize, usize, usize, usize), seed: usize) -> Tensor {
        let (a, b, c, d) = shape;
        let values: Vec<f32> =
            (0..a * b * c * d).map(|i| ((i * 7919 + seed * 31) % 401) as f32 / 200.0 - 1.0).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }

    /// Attention, on the CPU or as elsewhere, and what it gives its keys of a gradient that is its output.
    fn through(tiles: &[Tile], elsewhere: bool, [query, keys, values]: [&Tensor; 3]) -> Result<[Tensor; 2]> {
        let (mut read, mut given) = (Vec::new(), Vec::new());
        for tile in tiles {
            let (q, k, v) = (tile.of_queries(query)?, tile.of_keys(keys)?, tile.of_keys(values)?);
            let scores = q.matmul(&k.t()?)?;
            let weights =
                if elsewhere { tile.softmax.by_mask(&scores, &[])? } else { tile.softmax.of(scores, &[])? };
            read.push(weights.matmul(&v)?);
            given.push(weights.t()?.matmul(&read[read.len() - 1])?);
        }
        Ok([Tile::joined(tiles, &read)?, Tile::summed(tiles, &given, keys.dim(2)?)?])
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// Tiles together are the whole, whatever reaches how far, here and elsewhere, and whoever kept a mask before.
        #[test]
        fn tiles_are_the_whole(
            t in 1usize..3 * QUERIES, before in 0usize..70, reach in prop_oneof![1usize..300, Just(usize::MAX)], batch in 1usize..3,
            groups in 1usize..3, r in 1usize..3, queries in 40usize..200,
        ) {
            let seen: Vec<usize> = (0..before + t).collect();
            let masks = KeptMasks::default();
            let softmax = |kept: bool| CausalSoftmax {
                visible: visible(&seen[before..], &seen, reach),
                keys: seen.len(),
                kept: kept.then(|| (masks.clone(), 0)),
            };
            let query = numbers((batch, groups, r * t, 4), 1);
            let [keys, values] = [2, 3].map(|seed| numbers((batch, groups, seen.len(), 4), seed));
            let of = |tiles: &[Tile], elsewhere| through(tiles, elsewhere, [&query, &keys, &values]).unwrap();
            let whole = of(&[Tile { queries: 0..t, tokens: t, keys: 0..seen.len(), softmax: softmax(false) }], false);
            let here = Tile::all(softmax(false), &query.reshape((batch, groups * r, t, 4)).unwrap());
            prop_assert_eq!(here.len(), t.div_ceil(QUERIES));
            for (tiles, elsewhere) in [
                (here, false),
                (Tile::of_each(softmax(true), t), true),
                (Tile::of_each(softmax(true), queries), true),
                (Tile::of_each(softmax(true), QUERIES), true),
            ] {
                for (one, other) in whole.iter().zip(&of(&tiles, elsewhere)) {
                    let apart = (one - other).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                    prop_assert!(apart < 1e-4, "{apart}");
                }
            }
        }
    }
}
