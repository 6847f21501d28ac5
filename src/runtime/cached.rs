//! Models that read through a cache; and attention over what a policy keeps, head by head, since each may keep other tokens.

use candle_core::{Result as Candle, Tensor};
use ndarray::{Array3, ArrayView2, ArrayView3, ArrayView4};

use super::attention::Attention;
use super::cache::{Kept, KvCache, LayerCache, Steps};
use super::handed::Handed;
use super::model::{Model, numbers};
use super::ops::numbers_on_cpu;
use super::pass::Pass;
use super::rope::Rope;
use crate::text::RuntimeError;

impl Model {
    /// Logits (B, T, vocabulary) of T more tokens of each of B rows, after those that `cache` holds; theirs are
    /// added to it. Start from `KvCache::default()`.
    ///
    /// # Errors
    /// As [`Model::logits`].
    pub fn extend(
        &self,
        cache: &mut KvCache,
        tokens: ArrayView2<'_, u32>,
    ) -> Result<Array3<f32>, RuntimeError> {
        let (batch, len) = tokens.dim();
        let flat: Vec<u32> = tokens.iter().copied().collect();
        let last = self.read(cache, &flat, batch)?;
        self.shaped(numbers(&self.head(&last)?)?, batch, len)
    }

    /// What the last layer gives for further tokens (B·T): (B·T, d).
    fn read(&self, cache: &mut KvCache, tokens: &[u32], batch: usize) -> Result<Tensor, RuntimeError> {
        let len = tokens.len().checked_div(batch).unwrap_or(0);
        if !self.predicts() {
            return Err(RuntimeError::NoPredictions);
        }
        let pass = self.pass(len, cache.tokens)?;
        let (mut x, mut below, kept) = (self.embed(tokens, &pass)?, None, self.kv_heads());
        for i in 0..self.n_layers() {
            // What two layers read is held once, by the lower one.
            let own = if self.reads_below(i) { i.saturating_sub(1) } else { i };
            let past = cache.of(own, batch, [kept[own], self.specs[own].head_dim])?;
            x = self.step(i, &x, &pass, Some(past), &mut below)?;
            if i + 1 == self.n_layers() || !self.reads_below(i + 1) {
                cache.settle(own);
            }
        }
        cache.tokens += len;
        Ok(x)
    }

    /// What the last layer gives for a text, (T, d), by way of an empty cache, which takes it in these steps. `held` is asked after each
    /// for what the cache holds.
    pub(crate) fn row_by_cache(
        &self,
        tokens: &[u32],
        steps: Steps,
        mut cache: KvCache,
        mut held: impl FnMut(usize),
    ) -> Result<Tensor, RuntimeError> {
        let (mut rest, mut parts) = (tokens, Vec::new());
        for len in steps.lengths(tokens.len()) {
            let (step, others) = rest.split_at(len);
            parts.push(self.read(&mut cache, step, 1)?);
            held(cache.bytes());
            rest = others;
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

impl Attention {
    /// Inputs (B·T, d) → outputs (B·T, d), where row b of the batch keeps what `rows[b]` does; of what was read this hands on no more than
    /// the new tokens, since the layer above reads those rows, too.
    pub(super) fn forward_through(
        &self,
        rows: &mut [Box<dyn LayerCache>],
        x: &Tensor,
        pass: &Pass,
        rope: &Rope,
        below: Option<&Handed>,
    ) -> Candle<(Tensor, Handed)> {
        let (query, handed) = self.read(x, pass, rope, None, below)?;
        let heads: Vec<usize> = match &self.below {
            Some(heads) => Handed::places(below, heads)?.1.iter().map(|&place| place as usize).collect(),
            None => (0..self.kv_heads).collect(),
        };
        let read = rows.iter_mut().enumerate().map(|(b, row)| {
            let own = |t: &Tensor| t.narrow(0, b, 1)?.contiguous();
            if self.below.is_none() {
                let [keys, values] = [own(&handed.keys)?, own(&handed.values)?];
                let positions = pass.positions();
                on_host(&keys, |keys| on_host(&values, |values| row.append(keys, values, positions)))??;
            }
            self.row_through(&mut **row, &own(&query)?, &heads, pass)
        });
        let read = Tensor::cat(&read.collect::<Candle<Vec<_>>>()?, 0)?;
        Ok((self.write(&read)?, handed))
    }

    /// What the query heads (1, n_q, T, h) of one row read, (T, n_q·h), where group i reads head `heads[i]` of the cache.
    fn row_through(
        &self,
        row: &mut dyn LayerCache,
        query: &Tensor,
        heads: &[usize],
        pass: &Pass,
    ) -> Candle<Tensor> {
        let len = pass.positions().len();
        let wants_weights = row.wants_weights();
        let mut outputs = Vec::with_capacity(heads.len());
        for (place, &head) in self.places().flat_map(|place| place.each()).zip(heads) {
            let Kept { keys, values, positions } = row.read(head);
            let (s, h) = (positions.len(), self.head_dim);
            if (keys.dim(), values.dim()) != ((s, h), (s, h)) || !positions.ends_with(pass.positions()) {
                candle_core::bail!(
                    "a cache gives head {head} {:?} keys and {:?} values of {s} positions: it has to give as many of each, of \
                     {h} numbers, and the tokens of the step among them",
                    keys.dim(),
                    values.dim()
                );
            }
            let tensor = |numbers: ndarray::Array2<f32>| {
                Tensor::from_vec(numbers.into_iter().collect(), (1, 1, s, h), query.device())
            };
            let (query, keys, values) = (place.queries(query)?, tensor(keys)?, tensor(values)?);
            let scores = self.scores(place, [&query, &keys], &positions)?;
            let weights = self.softmax(pass, &positions).of(scores, self.sinks(place))?;
            if wants_weights {
                on_host(&weights.reshape((1, (), len, s))?, |weights| row.attended(head, weights))?;
            }
            outputs.push(weights.matmul(&values));
        }
        self.side_by_side(outputs.into_iter(), len)
    }
}

/// Looks at the numbers of a tensor (1, a, b, c), wherever it is.
fn on_host<T>(tensor: &Tensor, look: impl FnOnce(ArrayView3<'_, f32>) -> T) -> Candle<T> {
    let shape = tensor.dims4()?;
    let tensor = tensor.to_device(&candle_core::Device::Cpu)?.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    let numbers = numbers_on_cpu(&storage, layout)?;
    let view = ArrayView4::from_shape(shape, numbers).map_err(candle_core::Error::wrap)?;
    Ok(look(view.index_axis_move(ndarray::Axis(0), 0)))
}
