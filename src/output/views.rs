//! The tensors of an output, made one by one while a file is written.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};

use ndarray::{Array2, ArrayD, ArrayView1, ArrayView2, Axis as Dimension};
use safetensors::View;

use super::{Make, Slot};
use crate::checkpoint::{Checkpoint, Dtype, Entry, columns_of};
use crate::error::{Error, Result};
use crate::files::FileError;
use crate::heads::{HeadSource, Heads, Pooled, Projection};
use crate::model::{Axis, Part};
use crate::plan::SharedHeads;
use crate::run::Run;

/// Bytes of a tensor from which on those before it are given back.
const LARGE: usize = 1 << 20;

/// What all tensors of a conversion share.
pub(super) struct Job<'a> {
    source: &'a Checkpoint,
    shared: &'a SharedHeads<'a>,
    run: Run<'a>,
    /// Tensors and other files, written and in all.
    done: Cell<u64>,
    total: u64,
    /// The layer made last. Files are written tensor by tensor in the order of names, which keeps a layer's
    /// tensors together: one layer at a time is decoded.
    layer: RefCell<Option<(usize, Heads, Pooled)>>,
    /// What stopped the work; from then on tensors come out empty.
    stopped: RefCell<Option<FileError>>,
}

impl<'a> Job<'a> {
    pub(super) fn new(source: &'a Checkpoint, shared: &'a SharedHeads<'a>, total: u64, run: Run<'a>) -> Self {
        let (done, layer, stopped) = (Cell::new(0), RefCell::new(None), RefCell::new(None));
        Self { source, shared, run, done, total, layer, stopped }
    }

    /// Says that nothing is written yet.
    pub(super) fn start(&self) -> Result<()> {
        self.run.step("write", 0, self.total)
    }

    /// Counts one tensor or file.
    pub(super) fn step(&self) -> Result<()> {
        self.done.set(self.done.get() + 1);
        self.run.step("write", self.done.get(), self.total)
    }

    /// What stopped the work, if anything did.
    pub(super) fn outcome(&self) -> Result<(), FileError> {
        self.stopped.borrow_mut().take().map_or(Ok(()), Err)
    }

    fn with_layer<T>(
        &self,
        layer: usize,
        f: impl FnOnce(&Heads, &Pooled) -> Result<T, FileError>,
    ) -> Result<T, FileError> {
        let mut cache = self.layer.borrow_mut();
        let made = match cache.take() {
            Some(cached) if cached.0 == layer => cached,
            old => {
                drop(old);
                let (heads, pooled) = self.shared.layer(layer)?;
                (layer, heads, pooled)
            }
        };
        let (_, heads, pooled) = cache.insert(made);
        f(heads, pooled)
    }
}

/// One tensor of an output.
pub(super) struct Tensor<'a> {
    pub(super) job: &'a Job<'a>,
    pub(super) name: &'a str,
    pub(super) shape: Vec<usize>,
    pub(super) dtype: safetensors::Dtype,
    pub(super) numbers: Numbers<'a>,
}

/// Where the numbers of a tensor come from.
pub(super) enum Numbers<'a> {
    /// From this tensor of the source, bit for bit where types agree.
    Stored(&'a str, &'a Entry),
    /// Of these norms of the source, or these sinks, for queries or keys of a layer in these slots, stored as this type.
    Norm(Dtype, usize, &'a [String], Part, &'a [Slot]),
    /// Made from a layer, and stored as this type.
    Made(Dtype, usize, Made<'a>),
}

/// What is made from a layer.
pub(super) enum Made<'a> {
    /// Heads, one after the other; their biases where there is no axis. Rows of a head in this order, where one is given.
    Heads(Option<Axis>, &'a [(Part, Slot)], Option<&'a [usize]>),
    /// The bias of the output projection.
    OutputBias,
    /// Whatever a target makes.
    By(&'a Make),
}

impl View for Tensor<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        self.dtype
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
        let counted = self.bytes().and_then(|bytes| Ok(self.job.step().map(|()| bytes)?));
        counted.unwrap_or_else(|error| {
            *self.job.stopped.borrow_mut() = Some(error);
            Cow::Borrowed(&[])
        })
    }

    fn data_len(&self) -> usize {
        // Does not overflow: checked when the tensor was planned.
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

impl Tensor<'_> {
    /// Stores its numbers as this type.
    pub(super) fn store_as(&mut self, dtype: Dtype) {
        self.dtype = dtype.stored();
        match &mut self.numbers {
            Numbers::Stored(..) => {}
            Numbers::Norm(stored, ..) | Numbers::Made(stored, ..) => *stored = dtype,
        }
    }

    fn bytes(&self) -> Result<Cow<'_, [u8]>, FileError> {
        let (dtype, layer, made) = match &self.numbers {
            Numbers::Stored(name, entry) => {
                let files = self.job.source.files();
                if self.data_len() > LARGE {
                    // Those before are written.
                    files.forget_all();
                }
                let other = self.job.shared.others().and_then(|others| others.get(*name));
                if other.is_none() && entry.dtype == self.dtype {
                    return Ok(Cow::Borrowed(files.bytes(entry)));
                }
                let dtype = Dtype::from_stored(self.dtype).unwrap_or(self.job.source.float(name, entry)?);
                let bytes = match other {
                    Some(numbers) => self.encode(dtype, numbers.iter().copied())?,
                    None => self.encode(dtype, self.job.source.tensor(name)?.into_iter())?,
                };
                return self.sized(dtype, bytes);
            }
            &Numbers::Norm(dtype, layer, like, part, slots) => {
                return Ok(Cow::Owned(self.encode(dtype, self.norm(layer, like, part, slots)?.into_iter())?));
            }
            Numbers::Made(dtype, layer, made) => (*dtype, *layer, made),
        };
        let bytes = self.job.with_layer(layer, |heads, pooled| {
            let layer =
                Layer { heads, pooled, zeros: Array2::zeros((heads.key().head_dim(), heads.key().inputs())) };
            match *made {
                Made::Heads(axis, pieces, rows) => {
                    let at = |r: usize| rows.map_or(r, |rows| rows[r]);
                    let h = heads.key().head_dim();
                    match axis {
                        Some(Axis::Rows) => {
                            let heads = layer.weights(pieces)?;
                            let rows = heads.iter().flat_map(|head| (0..h).map(move |r| head.row(at(r))));
                            self.encode(dtype, rows.flat_map(|row| row.to_vec()))
                        }
                        Some(Axis::Columns) => self.encode(dtype, columns_of(&layer.weights(pieces)?)),
                        None => {
                            let heads = layer.biases(pieces)?;
                            let all = heads.iter().flat_map(|head| (0..h).map(move |r| head[at(r)]));
                            self.encode(dtype, all)
                        }
                    }
                }
                Made::OutputBias => {
                    let bias = pooled.output_bias.as_ref().map(|b| b.view()).or(heads.output_bias());
                    self.encode(dtype, bias.ok_or(Error::NoQueries)?.iter().copied())
                }
                Made::By(make) => self.encode(dtype, self.checked(make(heads, pooled)?)?.iter().copied()),
            }
        })?;
        self.sized(dtype, bytes)
    }

    /// What was encoded as this type, if it is as long as was said: more or fewer would move all tensors behind it.
    fn sized(&self, dtype: Dtype, bytes: Vec<u8>) -> Result<Cow<'_, [u8]>, FileError> {
        if bytes.len() != self.data_len() {
            let [expected, found] = [self.data_len(), bytes.len()].map(|len| len / dtype.bytes());
            return Err(Error::shape(self.name, &[expected], &[found]).into());
        }
        Ok(Cow::Owned(bytes))
    }

    /// Weights of norms, or sinks, for the heads in these slots.
    fn norm(&self, layer: usize, like: &[String], part: Part, slots: &[Slot]) -> Result<Vec<f32>, FileError> {
        let mut own = Vec::new();
        for name in like {
            own.extend(self.job.source.tensor(name)?);
        }
        let (heads, groups) =
            (self.job.source.architecture().layers[layer].heads(part), self.job.shared.groups(layer));
        let h = own.len() / heads;
        let of = |slot: &Slot| match *slot {
            Slot::Zero => vec![0.0; h],
            Slot::Head(head) if part == Part::Query => own[head * h..(head + 1) * h].to_vec(),
            Slot::Head(group) => {
                let members: Vec<usize> = (0..heads).filter(|&head| groups.group_of(head) == group).collect();
                let mean = |r: usize| members.iter().map(|head| own[head * h + r]).sum::<f32>();
                (0..h).map(|r| mean(r) / members.len() as f32).collect()
            }
        };
        Ok(slots.iter().flat_map(of).collect())
    }

    /// Numbers of the shape that was said, all finite.
    fn checked(&self, numbers: ArrayD<f32>) -> Result<ArrayD<f32>> {
        if numbers.shape() != self.shape {
            return Err(Error::shape(self.name, &self.shape, numbers.shape()));
        }
        if !numbers.iter().all(|v| v.is_finite()) {
            return Err(Error::NotFinite { what: self.name.to_string() });
        }
        Ok(numbers)
    }

    fn encode(&self, dtype: Dtype, values: impl Iterator<Item = f32>) -> Result<Vec<u8>, FileError> {
        let mut bytes = Vec::with_capacity(self.data_len());
        dtype.encode(values, &mut bytes).map_err(|value| {
            let (tensor, dtype) = (self.name.to_string(), dtype.name());
            FileError::Overflow { tensor, dtype, value }
        })?;
        Ok(bytes)
    }
}

/// A layer of the source, and its shared heads.
struct Layer<'a> {
    heads: &'a Heads,
    pooled: &'a Pooled,
    /// A head that is not there, (h, d).
    zeros: Array2<f32>,
}

impl Layer<'_> {
    /// Weights of heads, each (h, d).
    fn weights(&self, pieces: &[(Part, Slot)]) -> Result<Vec<ArrayView2<'_, f32>>> {
        let weights = |&(part, slot): &(Part, Slot)| {
            let Slot::Head(head) = slot else { return Ok(self.zeros.view()) };
            if part != Part::Output {
                return Ok(self.projection(part)?.weight().index_axis_move(Dimension(0), head));
            }
            let output = self.pooled.output.as_ref().map(|o| o.view()).or(self.heads.output());
            // From (d, h).
            Ok(output.ok_or(Error::NoQueries)?.index_axis_move(Dimension(0), head).reversed_axes())
        };
        pieces.iter().map(weights).collect()
    }

    /// Biases of heads, each (h).
    fn biases(&self, pieces: &[(Part, Slot)]) -> Result<Vec<ArrayView1<'_, f32>>> {
        let biases = |&(part, slot): &(Part, Slot)| match (slot, self.projection(part)?.bias()) {
            (Slot::Head(head), Some(bias)) => Ok(bias.index_axis_move(Dimension(0), head)),
            _ => Ok(self.zeros.column(0)),
        };
        pieces.iter().map(biases).collect()
    }

    /// Heads of queries, keys or values.
    fn projection(&self, part: Part) -> Result<&Projection> {
        match part {
            Part::Key => Ok(&self.pooled.key),
            Part::Value => Ok(&self.pooled.value),
            Part::Query | Part::Output => {
                self.pooled.query.as_ref().or(self.heads.query()).ok_or(Error::NoQueries)
            }
        }
    }
}
