//! One file for llama.cpp.

mod description;
mod tokenizer;

use crate::budget::Limits;
use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::Error;
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::{Architecture, Axis, Part, Rotary, Rotation};
use crate::output::{Container, Content, OutputModel, OutputTensor, Slot, Target};
use crate::plan::Plan;

use super::form::Form;
use super::padded::{filled, one_k, places};

/// A [GGUF](https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) file for llama.cpp, with the tokenizer in it, for any plan of a model
/// that computes as a Llama does: every layer caches its own number of heads (architecture `deci`; `llama` where layers are alike). With norms of
/// queries and keys by head (Qwen3) groups may differ in size, but all layers have as many.
///
/// Whether a model fits is read from its [`Architecture`], not from its type. Query heads of zeros fill groups up, within a layer to its
/// largest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Gguf {
    /// The type of matrices; `None`: as they are. With bf16 llama.cpp rounds what matrices are multiplied by to bf16, too; with f16 to f16,
    /// which is eight times as fine.
    pub dtype: Option<Dtype>,
}

impl Gguf {
    /// Name of the file.
    pub const FILE: &str = "model.gguf";
}

impl Target for Gguf {
    fn name(&self) -> &'static str {
        match self.dtype {
            None => "gguf",
            Some(Dtype::F16) => "gguf-f16",
            Some(Dtype::F32) => "gguf-f32",
            Some(Dtype::Bf16) => "gguf-bf16",
        }
    }

    fn limits(&self, model: &Architecture) -> Limits {
        match Form::of(model) {
            Ok(form) if form.one_k => one_k(model),
            _ => Limits::default(),
        }
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let model = source.architecture();
        let form = Form::of(model).map_err(|found| {
            let reason = format!("llama.cpp's Llama does not have {found}; another target may hold it");
            Error::NoForm { model: model.model_type.clone(), reason }
        })?;
        let own = |layer: usize| places(model, plan, layer);
        let most = (0..model.n_layers()).map(own).max().unwrap_or(1);
        let of = |layer| if form.one_k { most } else { own(layer) };

        let mut output = OutputModel::new(source.config().raw().clone(), Vec::new());
        let mut heads = Vec::with_capacity(model.n_layers());
        for layer in 0..model.n_layers() {
            let (kv, queries) = filled(model, plan, layer, of(layer));
            heads.push([queries.len(), kv.len()]);
            lay(&mut output, model, &form, layer, &kv, &queries);
            output.kv_heads.push(kv.len());
        }
        form.rest(|name, like| {
            output.tensors.push(OutputTensor::new(name, Content::Copied(like.to_string())))
        });
        let base = base(form.rotary);
        if base.is_none() {
            let factors = factors(form.rotary);
            let made = Content::made(0, &[factors.len()], Dtype::F32, move |_, _| {
                Ok(ndarray::Array1::from(factors.clone()).into_dyn())
            });
            output.tensors.push(OutputTensor::new("rope_freqs.weight", made));
        }
        let mut metadata =
            form.described(&heads, base.unwrap_or(PLAIN), self.dtype.unwrap_or(source.dtype()), source)?;
        metadata.extend(tokenizer::metadata(source, form.forward.vocabulary)?);
        output.container = Container::Gguf { file: Self::FILE.to_string(), matrices: self.dtype, metadata };
        Ok(output)
    }
}

/// Lays out the heads of a layer.
fn lay(
    output: &mut OutputModel,
    model: &Architecture,
    form: &Form<'_>,
    layer: usize,
    kv: &[Slot],
    queries: &[Slot],
) {
    let attention = &model.layers[layer];
    let Some(stored) = &attention.stored else { return };
    output.left_out.extend(stored.tensors().into_iter().map(str::to_string));
    let turned = side_by_side(form, attention.rotation());
    for (part, name, slots) in [
        (Part::Query, "attn_q", queries),
        (Part::Key, "attn_k", kv),
        (Part::Value, "attn_v", kv),
        (Part::Output, "attn_output", queries),
    ] {
        let (of, pieces) = (stored.part(part), || slots.iter().map(|&slot| (part, slot)).collect());
        let rows = matches!(part, Part::Query | Part::Key).then(|| turned.clone()).flatten();
        let axis = if part == Part::Output { Axis::Columns } else { Axis::Rows };
        let name = |kind: &str| format!("blk.{layer}.{name}.{kind}");
        let weight = Content::heads(&of.tensor, layer, Some(axis), pieces()).with_rows(rows.clone());
        output.tensors.push(OutputTensor::new(name("weight"), weight));
        let bias = of.bias.as_ref().map(|bias| match part {
            Part::Output => Content::OutputBias(layer),
            _ => Content::heads(bias, layer, None, pieces()).with_rows(rows),
        });
        output.tensors.extend(bias.map(|bias| OutputTensor::new(name("bias"), bias)));
    }
}

/// The rows of a head such that dimensions that turn together lie side by side, where the form wants them so and they do not.
fn side_by_side(form: &Form<'_>, rotation: Rotation) -> Option<Vec<usize>> {
    let halves = matches!(rotation, Rotation::HalfSplit { .. });
    (form.pairs && halves).then(|| rotation.pairs().flat_map(|(a, b)| [a, b]).collect())
}

/// The base against which frequencies are given where they are not powers of one.
const PLAIN: f64 = 10_000.0;

/// θ, where the frequencies are `θ^(−2f/ρ)`.
fn base(rotary: &Rotary) -> Option<f64> {
    let dims = rotary.rotation.dims() as f64;
    let last = rotary.frequencies.len().checked_sub(1).filter(|&last| last > 0)?;
    let theta = f64::from(rotary.frequencies[last]).powf(-dims / (2.0 * last as f64));
    // Bases are round numbers; frequencies are f32.
    let theta = if (theta - theta.round()).abs() < 1e-4 * theta { theta.round() } else { theta };
    let of = Rotary::from_theta(rotary.rotation, theta);
    let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-6 * b;
    of.frequencies.iter().zip(&rotary.frequencies).all(near).then_some(theta)
}

/// What the frequencies of the plain base are divided by.
fn factors(rotary: &Rotary) -> Vec<f32> {
    let plain = Rotary::from_theta(rotary.rotation, PLAIN).frequencies;
    plain.iter().zip(&rotary.frequencies).map(|(plain, own)| plain / own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any frequencies are those of a base, divided by factors.
    #[test]
    fn frequencies() {
        let rotation = Rotation::HalfSplit { dims: 64 };
        for theta in [10_000.0, 500_000.0, 1e6, 1234.5] {
            let found = base(&Rotary::from_theta(rotation, theta)).unwrap();
            assert!((found / theta - 1.0).abs() < 1e-4, "{found} for {theta}");
        }
        let mut scaled = Rotary::from_theta(rotation, 500_000.0);
        scaled.frequencies[20..].iter_mut().for_each(|f| *f /= 8.0);
        assert_eq!(base(&scaled), None);
        let plain = Rotary::from_theta(rotation, PLAIN).frequencies;
        for ((plain, factor), own) in plain.iter().zip(factors(&scaled)).zip(&scaled.frequencies) {
            assert!((plain / factor / own - 1.0).abs() < 1e-6);
        }
    }
}
