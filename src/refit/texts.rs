//! A text on its way through a source and the model that is made of it.

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use crate::error::Result;
use crate::runtime::{Model, Pass};
use crate::text::{RuntimeError, Windows};

/// Bytes of streams in f32 from which on they are held in bf16.
const WIDE: usize = 1 << 30;

/// The windows of a text before one layer: the streams of both models.
#[derive(Debug)]
pub(super) struct Texts {
    pub(super) pass: Pass,
    held: DType,
    windows: Vec<Window>,
}

/// One window, (T, d) each; once a layer is entered, `source` is the stream after its attention.
#[derive(Debug)]
struct Window {
    source: Tensor,
    merged: Tensor,
}

/// A text as a layer's attention meets it: what it reads and should add, (N, d), and what each token counts, (N, 1).
#[derive(Debug)]
pub(super) struct Text {
    pub(super) input: Tensor,
    pub(super) target: Tensor,
    pub(super) weight: Tensor,
}

impl Texts {
    /// The windows before the first layer.
    pub(super) fn new(model: &Model, windows: &Windows) -> Result<Self, RuntimeError> {
        let bytes = 2 * windows.tokens().len() * model.width() * DType::F32.size_in_bytes();
        let held = if bytes > WIDE { DType::BF16 } else { DType::F32 };
        let pass = model.pass(windows.length(), 0)?;
        let window = |tokens: &[u32]| {
            let stream = model.embed(tokens)?.to_dtype(held)?;
            Ok(Window { source: stream.clone(), merged: stream })
        };
        let windows = windows.batches(1).map(window).collect::<Result<_, RuntimeError>>()?;
        Ok(Self { pass, held, windows })
    }

    /// Windows.
    pub(super) fn count(&self) -> usize {
        self.windows.len()
    }

    /// Lets the source's stream go on to after the attention of layer `i`.
    pub(super) fn enter(&mut self, model: &Model, i: usize) -> Result<(), RuntimeError> {
        self.each(model, |window, pass, held| {
            let source = joined(window.iter(), |w| &w.source)?;
            let after = (&source + model.attend(i, &model.attention_input(i, &source)?, pass)?)?;
            part(window, held, &after, |w| &mut w.source)
        })
    }

    /// Goes through the rest of layer `i` of both models; `entered` as the source has gone through its attention already.
    pub(super) fn leave(
        &mut self,
        model: &Model,
        merged: &Model,
        i: usize,
        entered: bool,
    ) -> Result<(), RuntimeError> {
        self.each(model, |window, pass, held| {
            let source = joined(window.iter(), |w| &w.source)?;
            if !entered {
                let after = model.layer(i, &source, pass)?;
                part(window, held, &after, |w| &mut w.source)?;
                return part(window, held, &after, |w| &mut w.merged);
            }
            let stream = merged.layer(i, &joined(window.iter(), |w| &w.merged)?, pass)?;
            part(window, held, &stream, |w| &mut w.merged)?;
            part(window, held, &model.feed_forward(i, &source)?, |w| &mut w.source)
        })
    }

    /// Changes all windows, some at a time.
    fn each(
        &mut self,
        model: &Model,
        change: impl Fn(&mut [Window], &Pass, DType) -> Result<(), RuntimeError> + Sync,
    ) -> Result<(), RuntimeError> {
        let (pass, held, abreast) = (&self.pass, self.held, model.abreast(self.pass.positions().len()));
        self.windows.par_chunks_mut(abreast).try_for_each(|windows| change(windows, pass, held))
    }

    /// What is made of each of the windows with these numbers as layer `i`, which was entered, meets them; some at a time, in
    /// their order.
    pub(super) fn map<T: Send>(
        &self,
        model: &Model,
        i: usize,
        windows: &[usize],
        make: impl Fn(&Text) -> Result<T, RuntimeError> + Sync,
    ) -> Result<Vec<T>, RuntimeError> {
        let text = |chosen: &[usize]| {
            let chosen: Vec<&Window> = chosen.iter().map(|&n| &self.windows[n]).collect();
            let cat = |of: fn(&Window) -> &Tensor| joined(chosen.iter().copied(), of);
            let (after, stream) = (cat(|w| &w.source)?, cat(|w| &w.merged)?);
            let weight = after.sqr()?.sum_keepdim(D::Minus1)?.recip()?;
            make(&Text { input: model.attention_input(i, &stream)?, target: (after - stream)?, weight })
        };
        windows.par_chunks(model.abreast(self.pass.positions().len())).map(text).collect()
    }

    /// The error of the attention output of layer `i`, as a share of the energy of what it should be, by the weights of the
    /// tokens.
    pub(super) fn error(&self, model: &Model, i: usize) -> Result<f64, RuntimeError> {
        let all: Vec<usize> = (0..self.count()).collect();
        let parts = self.map(model, i, &all, |text| {
            let off = (model.attend(i, &text.input, &self.pass)? - &text.target)?;
            let energy = |t: &Tensor| -> Result<f64, RuntimeError> {
                let tokens = t.sqr()?.broadcast_mul(&text.weight)?.sum(D::Minus1)?.to_vec1::<f32>()?;
                Ok(tokens.into_iter().map(f64::from).sum())
            };
            Ok([energy(&off)?, energy(&text.target)?])
        })?;
        let [off, whole] = parts.into_iter().fold([0.0; 2], |[a, b], [off, whole]| [a + off, b + whole]);
        Ok(if whole > 0.0 { off / whole } else { 0.0 })
    }
}

/// A tensor of some windows, one after the other, in f32.
fn joined<'w>(
    windows: impl Iterator<Item = &'w Window>,
    of: fn(&Window) -> &Tensor,
) -> Result<Tensor, RuntimeError> {
    let tensors: Vec<&Tensor> = windows.map(of).collect();
    Ok(Tensor::cat(&tensors, 0)?.to_dtype(DType::F32)?)
}

/// Gives each of some windows its part.
fn part(
    windows: &mut [Window],
    held: DType,
    all: &Tensor,
    of: impl Fn(&mut Window) -> &mut Tensor,
) -> Result<(), RuntimeError> {
    let (n, held_tensor) = (windows.len(), all.to_dtype(held)?);
    let len = held_tensor.dim(0)? / n;
    for (k, window) in windows.iter_mut().enumerate() {
        *of(window) = held_tensor.narrow(0, k * len, len)?;
    }
    Ok(())
}
