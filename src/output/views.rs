//! The tensors of a converted model, made one by one while a file is written.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};

use safetensors::View;

use super::families::Part;
use super::shards::Entry;
use super::targets::Layout;
use super::{Checkpoint, Dtype, FileError};
use crate::{Plan, PoolLayer, Pooled, Projection, Run};

/// What all tensors of a conversion share.
pub(super) struct Job<'a> {
    pub(super) source: &'a Checkpoint,
    pub(super) plan: &'a Plan,
    pub(super) pool: &'a PoolLayer<'a>,
    pub(super) layouts: &'a [Layout],
    pub(super) run: Run<'a>,
    /// Tensors and other files, written and in all.
    pub(super) done: Cell<u64>,
    pub(super) total: u64,
    /// The layer pooled last. Files are written tensor by tensor in the order of names, which keeps a layer's
    /// tensors together: one layer at a time is decoded.
    pooled: RefCell<Option<(usize, Pooled)>>,
    /// What stopped the work; from then on tensors come out empty.
    stopped: RefCell<Option<FileError>>,
}

impl<'a> Job<'a> {
    pub(super) fn new(
        source: &'a Checkpoint,
        plan: &'a Plan,
        pool: &'a PoolLayer<'a>,
        layouts: &'a [Layout],
        total: u64,
        run: Run<'a>,
    ) -> Self {
        let (done, pooled, stopped) = (Cell::new(0), RefCell::new(None), RefCell::new(None));
        Self { source, plan, pool, layouts, run, done, total, pooled, stopped }
    }

    /// Counts one tensor or file.
    pub(super) fn step(&self) -> Result<(), FileError> {
        self.done.set(self.done.get() + 1);
        Ok(self.run.step("write", self.done.get(), self.total)?)
    }

    /// What stopped the work, if anything did.
    pub(super) fn outcome(&self) -> Result<(), FileError> {
        self.stopped.borrow_mut().take().map_or(Ok(()), Err)
    }

    fn with_pooled<T>(
        &self,
        layer: usize,
        f: impl FnOnce(&Pooled) -> Result<T, FileError>,
    ) -> Result<T, FileError> {
        let mut cache = self.pooled.borrow_mut();
        match &*cache {
            Some((cached, pooled)) if *cached == layer => f(pooled),
            _ => {
                *cache = None;
                let groups = &self.plan.layers[layer].groups;
                let heads = self.source.layer(layer)?;
                let pooled = (self.pool)(layer, &heads)?;
                pooled.check(&heads, groups)?;
                f(&cache.insert((layer, pooled)).1)
            }
        }
    }
}

/// Whose rows or columns a tensor holds.
#[derive(Debug, Clone, Copy)]
pub(super) struct HeadsOf {
    pub(super) layer: usize,
    pub(super) part: Part,
    pub(super) bias: bool,
}

/// One tensor of the output.
pub(super) struct Tensor<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) name: &'a str,
    pub(super) entry: &'a Entry,
    /// `None`: passed on as it is, bit for bit.
    pub(super) heads: Option<HeadsOf>,
    pub(super) shape: Vec<usize>,
}

impl View for Tensor<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.entry.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The writer sizes the file beforehand and takes whatever comes: an empty tensor leaves a hole, and the
    /// file is thrown away by whoever asks [`Job::outcome`].
    fn data(&self) -> Cow<'_, [u8]> {
        if self.job.stopped.borrow().is_some() {
            return Cow::Borrowed(&[]);
        }
        self.bytes().and_then(|bytes| self.job.step().map(|()| bytes)).unwrap_or_else(|error| {
            *self.job.stopped.borrow_mut() = Some(error);
            Cow::Borrowed(&[])
        })
    }

    fn data_len(&self) -> usize {
        // Cannot overflow: the source's tensors are mapped, and a layout has no more KV heads than query heads.
        self.shape.iter().product::<usize>() * self.entry.dtype.bitsize() / 8
    }
}

impl Tensor<'_> {
    fn bytes(&self) -> Result<Cow<'_, [u8]>, FileError> {
        let source = self.job.source;
        let stored = Cow::Borrowed(source.files().bytes(self.entry));
        let Some(HeadsOf { layer, part, bias }) = self.heads else { return Ok(stored) };
        let dtype = source.float(self.name, self.entry)?;
        let Layout { kv_rows, query_order } = &self.job.layouts[layer];
        let (h, d) = (source.config().head_dim, source.config().hidden);
        self.job.with_pooled(layer, |pooled| match part {
            Part::Key => self.encode(dtype, rows(&pooled.key, bias, kv_rows)),
            Part::Value => self.encode(dtype, rows(&pooled.value, bias, kv_rows)),
            Part::Query => {
                let all: Vec<usize> = (0..query_order.len()).collect();
                let changed = pooled.query.as_ref().map(|q| self.encode(dtype, rows(q, bias, &all)));
                let block = if bias { h } else { h * d } * dtype.bytes();
                Ok(permute(changed.unwrap_or(Ok(stored))?, query_order, block))
            }
            Part::Output if bias => {
                let changed = pooled.output_bias.as_ref().map(|b| self.encode(dtype, b.iter().copied()));
                changed.unwrap_or(Ok(stored))
            }
            Part::Output => {
                // (H·r, d, h) → (d, H·r, h), as it is stored.
                let stored_order = |o: &ndarray::Array3<f32>| {
                    self.encode(dtype, o.view().permuted_axes([1, 0, 2]).iter().copied())
                };
                let changed = pooled.output.as_ref().map(stored_order);
                Ok(permute(changed.unwrap_or(Ok(stored))?, query_order, h * dtype.bytes()))
            }
        })
    }

    fn encode(
        &self,
        dtype: Dtype,
        values: impl Iterator<Item = f32>,
    ) -> Result<Cow<'static, [u8]>, FileError> {
        let mut bytes = Vec::with_capacity(self.data_len());
        dtype.encode(values, &mut bytes).map_err(|value| {
            let (tensor, dtype) = (self.name.to_string(), dtype.name());
            FileError::Overflow { tensor, dtype, value }
        })?;
        Ok(Cow::Owned(bytes))
    }
}

/// The weights or biases of the heads `order` of a projection, one after the other.
fn rows<'a>(projection: &'a Projection, bias: bool, order: &'a [usize]) -> impl Iterator<Item = f32> + 'a {
    let all = if bias { projection.bias_slice().unwrap_or(&[]) } else { projection.weight_slice() };
    let len = all.len() / projection.n_heads();
    order.iter().flat_map(move |&head| all[head * len..][..len].iter().copied())
}

/// Reorders blocks of bytes within each row of `order.len()` of them.
fn permute<'a>(bytes: Cow<'a, [u8]>, order: &[usize], block: usize) -> Cow<'a, [u8]> {
    if order.iter().copied().eq(0..order.len()) {
        return bytes;
    }
    let mut permuted = Vec::with_capacity(bytes.len());
    for row in bytes.chunks_exact(order.len() * block) {
        for &i in order {
            permuted.extend_from_slice(&row[i * block..][..block]);
        }
    }
    Cow::Owned(permuted)
}
