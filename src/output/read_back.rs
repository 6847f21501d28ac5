//! Shared heads, read back from what was written.

use std::path::Path;

use ndarray::{Array1, Array2, Array3, s};
use serde::Deserialize;
use serde_json::Value;

use super::conversion::checked;
use super::copy::PROVENANCE;
use super::{Content, OutputModel, OutputTensor, Slot, Target};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::files::{FileError, is_there, read_bounded, without_mark};
use crate::heads::{HeadSource, Pooled, Projection};
use crate::model::{AttentionSpec, Axis, Block, Part};
use crate::plan::{Others, PLAN_LIMIT, Plan, SharedHeads, Trained, parse_plan};

/// What a converted directory says of how it was made.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Provenance {
    /// The plan, with what was done.
    pub plan: Plan,
    /// Name of the target.
    pub target: String,
}

impl Provenance {
    /// Reads `qcqa.json` of a converted directory.
    ///
    /// # Errors
    /// [`FileError::NotConverted`]; as [`read_plan`](crate::plan::read_plan).
    pub fn read(directory: &Path) -> Result<Self, FileError> {
        #[derive(Deserialize)]
        struct Stored {
            target: String,
            plan: Value,
        }
        let path = directory.join(PROVENANCE);
        if directory.is_dir() && !is_there(&path)? {
            return Err(FileError::NotConverted { path: directory.to_path_buf() });
        }
        let text = read_bounded(&path, PLAN_LIMIT)?;
        let text = without_mark(&text);
        let stored = serde_json::from_slice(text);
        let Stored { target, plan } = stored.map_err(|source| FileError::json(&path, text, source))?;
        let plan = serde_json::to_vec(&plan).map_err(|source| FileError::unwritten(&path, source))?;
        Ok(Self { plan: parse_plan(&path, &plan)?, target })
    }
}

/// The shared heads in `written`, which [`convert`](super::convert) made of `source` by this plan in the form of `target`:
/// to be distilled, or written in another form.
///
/// # Errors
/// [`Error::PlanSource`] and those of [`check_plan`](super::check_plan); [`FileError::TensorMissing`] and
/// [`FileError::TensorShape`] where it does not hold what the target writes.
pub fn read_back<'a>(
    source: &'a Checkpoint,
    written: &Checkpoint,
    plan: &Plan,
    target: &dyn Target,
) -> Result<SharedHeads<'a>, FileError> {
    plan.no_pairs("reading shared heads back")?;
    let output = checked(source, plan, target)?;
    let mut layers = Vec::with_capacity(plan.layers.len());
    for (i, planned) in plan.layers.iter().enumerate() {
        let mut layer = Layer::new(
            &source.architecture().layers[i],
            planned.groups.n_groups(),
            source.architecture().hidden,
        );
        for OutputTensor { name, content } in &output.tensors {
            match content {
                Content::Heads { layer: of, axis, pieces, .. } if *of == i => {
                    layer.take(written, name, *axis, pieces)?;
                }
                Content::OutputBias(of) if *of == i => {
                    let bias = written.tensor_of(name, &[layer.width])?;
                    layer.output_bias = Some(Array1::from_iter(bias));
                }
                _ => {}
            }
        }
        layers.push(layer.pooled()?);
    }
    let others = match plan.pooling.distilled.as_ref().map(|distilled| distilled.trained) {
        Some(Trained::All) => Some(others(source, written, &output)?),
        _ => None,
    };
    Ok(SharedHeads::made(plan, source, layers)?.with_others(others))
}

/// What has become of the tensors beside the heads that a distillation of all weights trains.
fn others(source: &Checkpoint, written: &Checkpoint, output: &OutputModel) -> Result<Others, FileError> {
    let blocks = source.architecture().forward.iter().flat_map(|forward| &forward.blocks);
    let mut others = Others::new();
    for name in blocks.flat_map(Block::own_tensors) {
        let copy = output
            .tensors
            .iter()
            .find(|tensor| matches!(&tensor.content, Content::Copied(from) if from == name));
        let shape = source.tensors().shape(name).unwrap_or_default();
        let numbers = written.tensor_of(copy.map_or(name, |copy| &copy.name), shape)?;
        others.insert(name.to_string(), numbers.into_raw_vec_and_offset().0);
    }
    Ok(others)
}

/// The heads of one layer on their way back, of each part (n, h, d), and their biases (n, h).
struct Layer {
    h: usize,
    width: usize,
    heads: [Array3<f32>; 4],
    biases: [Option<Array2<f32>>; 4],
    output_bias: Option<Array1<f32>>,
}

impl Layer {
    fn new(attention: &AttentionSpec, groups: usize, width: usize) -> Self {
        let h = attention.head_dim;
        let heads = Part::ALL.map(|part| match part {
            Part::Key | Part::Value => Array3::zeros((groups, h, width)),
            Part::Query | Part::Output => Array3::zeros((attention.query_heads, h, width)),
        });
        Self { h, width, heads, biases: [None, None, None, None], output_bias: None }
    }

    /// Takes the heads in a tensor, or their biases where there is no axis.
    fn take(
        &mut self,
        written: &Checkpoint,
        name: &str,
        axis: Option<Axis>,
        pieces: &[(Part, Slot)],
    ) -> Result<(), FileError> {
        let (h, width, extent) = (self.h, self.width, pieces.len() * self.h);
        let shape = match axis {
            Some(Axis::Rows) => vec![extent, width],
            Some(Axis::Columns) => vec![width, extent],
            None => vec![extent, 1],
        };
        let stored = if axis.is_some() { &shape[..] } else { &shape[..1] };
        let numbers = written.tensor_of(name, stored)?.into_raw_vec_and_offset().0;
        let mut rows = Array2::from_shape_vec((shape[0], shape[1]), numbers).map_err(Error::plugin)?;
        if axis == Some(Axis::Columns) {
            rows = rows.reversed_axes();
        }
        for (place, &(part, slot)) in pieces.iter().enumerate() {
            let Slot::Head(head) = slot else { continue };
            let own = rows.slice(s![place * h..(place + 1) * h, ..]);
            let part = part as usize;
            if axis.is_some() {
                self.heads[part].slice_mut(s![head, .., ..]).assign(&own);
            } else {
                let n = self.heads[part].dim().0;
                let biases = self.biases[part].get_or_insert_with(|| Array2::zeros((n, h)));
                biases.row_mut(head).assign(&own.column(0));
            }
        }
        Ok(())
    }

    fn pooled(self) -> Result<Pooled> {
        let ([query, key, value, output], [of_query, of_key, of_value, _]) = (self.heads, self.biases);
        let output = output.permuted_axes([0, 2, 1]).as_standard_layout().into_owned();
        let pooled = Pooled::new(Projection::new(key, of_key)?, Projection::new(value, of_value)?);
        let mut pooled = pooled.with_queries(Projection::new(query, of_query)?, output);
        pooled.output_bias = self.output_bias;
        Ok(pooled)
    }
}
