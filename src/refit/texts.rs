//! A text on its way through a source and the model that is made of it.

use candle_core::{DType, Tensor};

use crate::error::Result;
use crate::runtime::{Joint, Model, Pass, combined, squared_lengths, weighed};
use crate::text::{RuntimeError, Windows};

/// Bytes of streams in f32 from which on they are held in bf16.
const WIDE: usize = 1 << 29;
/// Windows, spaced over all, on which a layer is judged before and after: a fraction of a pass over the text.
const JUDGED: usize = 32;

/// The windows of a text before one layer: the streams of both models.
#[derive(Debug)]
pub(super) struct Texts {
    pub(super) pass: Pass,
    held: DType,
    windows: Vec<Window>,
}

/// One window, (T, d) each. Once a layer is entered, `source` is the stream after its attention where nothing else needs the
/// one before; else what its attention gives is in `attended`.
#[derive(Debug)]
struct Window {
    source: Tensor,
    merged: Tensor,
    attended: Option<Tensor>,
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
            let stream = model.embed(tokens, &pass)?.to_dtype(held)?;
            Ok(Window { source: stream.clone(), merged: stream, attended: None })
        };
        let windows = windows.batches(1).map(window).collect::<Result<_, RuntimeError>>()?;
        Ok(Self { pass, held, windows })
    }

    /// Windows.
    pub(super) fn count(&self) -> usize {
        self.windows.len()
    }

    /// The numbers of all windows, in parts of as many as are computed at once.
    pub(super) fn parts(&self, model: &Model) -> impl Iterator<Item = Vec<usize>> + use<> {
        let abreast = model.abreast(self.pass.positions().len());
        let texts = if model.shares_out() { rayon::current_num_threads() } else { 1 };
        let (at_once, count) = (abreast * texts, self.count());
        (0..count).step_by(at_once).map(move |first| (first..count.min(first + at_once)).collect())
    }

    /// Lets the source go through the attention of layer `i`.
    pub(super) fn enter(&mut self, model: &Model, i: usize) -> Result<(), RuntimeError> {
        let joint = model.joint(i)?;
        self.each(model, |window, pass, held| {
            let source = joined(window.iter().map(|w| &w.source))?;
            let attended = model.attend(i, &model.attention_input(i, &source)?, pass)?;
            match joint {
                Joint::Added(share) => {
                    part(window, held, &combined(&source, 1.0, &attended, share)?, |w, own| w.source = own)
                }
                _ => part(window, held, &attended, |w, own| w.attended = Some(own)),
            }
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
            let source = joined(window.iter().map(|w| &w.source))?;
            if !entered {
                let after = model.layer(i, &source, pass)?;
                return part(window, held, &after, |w, own| (w.source, w.merged) = (own.clone(), own));
            }
            let stream = merged.layer(i, &joined(window.iter().map(|w| &w.merged))?, pass)?;
            part(window, held, &stream, |w, own| w.merged = own)?;
            let attended = window.iter().map(|w| w.attended.as_ref()).collect::<Option<Vec<_>>>();
            let attended = attended.map(|attended| joined(attended.into_iter())).transpose()?;
            let after = model.finish(i, &source, attended.as_ref())?;
            part(window, held, &after, |w, own| (w.source, w.attended) = (own, None))
        })
    }

    /// Changes all windows, as many as one as are computed abreast.
    fn each(
        &mut self,
        model: &Model,
        change: impl Fn(&mut [Window], &Pass, DType) -> Result<(), RuntimeError> + Sync + Send,
    ) -> Result<(), RuntimeError> {
        let (pass, held, abreast) = (&self.pass, self.held, model.abreast(self.pass.positions().len()));
        let mut texts: Vec<&mut [Window]> = self.windows.chunks_mut(abreast).collect();
        model.share_out(&mut texts, |windows| change(windows, pass, held))
    }

    /// What is made of each of the windows with these numbers as layer `i`, which was entered, meets them; in their order.
    pub(super) fn map<T: Send>(
        &self,
        model: &Model,
        i: usize,
        windows: &[usize],
        make: impl Fn(&Text) -> Result<T, RuntimeError> + Sync + Send,
    ) -> Result<Vec<T>, RuntimeError> {
        let joint = model.joint(i)?;
        let text = |chosen: &&[usize]| {
            let chosen: Vec<&Window> = chosen.iter().map(|&n| &self.windows[n]).collect();
            let (source, stream) =
                (joined(chosen.iter().map(|w| &w.source))?, joined(chosen.iter().map(|w| &w.merged))?);
            let attended = chosen.iter().filter_map(|w| w.attended.as_ref());
            // What should come into the stream, and what decides how much an error there matters.
            let (target, size) = match joint {
                Joint::Added(share) => (combined(&source, share.recip(), &stream, -share.recip())?, source),
                Joint::Parallel(share) => {
                    let after = combined(&source, 1.0, &joined(attended)?, share)?;
                    (combined(&after, share.recip(), &stream, -share.recip())?, after)
                }
                // Its length goes in the norm: what layers below lost cannot be made up for here.
                Joint::Normed => {
                    let attended = joined(attended)?;
                    (attended.clone(), attended)
                }
            };
            let weight = squared_lengths(&size)?.recip()?;
            make(&Text { input: model.attention_input(i, &stream)?, target, weight })
        };
        let abreast = model.abreast(self.pass.positions().len());
        model.each(&windows.chunks(abreast).collect::<Vec<_>>(), text)
    }

    /// The error of the attention output of layer `i` on at most [`JUDGED`] windows, as a share of the energy of what it should be, by the
    /// weights of the tokens.
    pub(super) fn error(&self, model: &Model, i: usize) -> Result<f64, RuntimeError> {
        let (all, n) = (self.count(), self.count().min(JUDGED));
        let judged: Vec<usize> = (0..n).map(|k| k * all / n).collect();
        let parts = self.map(model, i, &judged, |text| {
            let off = combined(&model.attend(i, &text.input, &self.pass)?, 1.0, &text.target, -1.0)?;
            let energy = |t: &Tensor| -> Result<f64, RuntimeError> {
                let tokens = weighed(&squared_lengths(t)?, &text.weight)?.flatten_all()?.to_vec1::<f32>()?;
                Ok(tokens.into_iter().map(f64::from).sum())
            };
            Ok([energy(&off)?, energy(&text.target)?])
        })?;
        let [off, whole] = parts.into_iter().fold([0.0; 2], |[a, b], [off, whole]| [a + off, b + whole]);
        Ok(if whole > 0.0 { off / whole } else { 0.0 })
    }
}

/// Tensors of some windows, one after the other, in f32.
fn joined<'w>(tensors: impl Iterator<Item = &'w Tensor>) -> Result<Tensor, RuntimeError> {
    Ok(Tensor::cat(&tensors.collect::<Vec<_>>(), 0)?.to_dtype(DType::F32)?)
}

/// Gives each of some windows its part.
fn part(
    windows: &mut [Window],
    held: DType,
    all: &Tensor,
    give: impl Fn(&mut Window, Tensor),
) -> Result<(), RuntimeError> {
    let (n, held_tensor) = (windows.len(), all.to_dtype(held)?);
    let len = held_tensor.dim(0)? / n;
    for (k, window) in windows.iter_mut().enumerate() {
        give(window, held_tensor.narrow(0, k * len, len)?);
    }
    Ok(())
}
