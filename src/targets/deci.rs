use super::expanded::Expanded;
use super::form::Form;
use super::padded::filled;
use super::stock::queries;
use crate::budget::Limits;
use crate::checkpoint::Checkpoint;
use crate::error::Error;
use crate::families::by_block;
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::Architecture;
use crate::output::{Content, OutputModel, OutputTensor, Target};
use crate::partition::SearchSpace;
use crate::plan::Plan;

/// A directory for vLLM's `DeciLMForCausalLM` (Nemotron-NAS), of Llamas, Mistrals and Qwen2: equal groups, whose number may differ from layer
/// to layer.
///
/// All layers have the source's query heads, as that model has one number for them; `block_configs` say how many share a KV head.
/// Where queries, keys and values have biases, the outputs get biases of zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Deci;

const CONFIGURATION: &str = include_str!("configuration_decilm.py");

impl Target for Deci {
    fn name(&self) -> &'static str {
        "deci"
    }

    fn limits(&self, model: &Architecture) -> Limits {
        Limits {
            space: SearchSpace {
                cardinality: SearchSpace::equal().cardinality,
                ..Expanded.limits(model).space
            },
            ..Limits::default()
        }
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let model = source.architecture();
        let refused = |reason| Error::NoForm { model: model.model_type.clone(), reason };
        let form = Form::of(model).map_err(|found| {
            refused(format!("vLLM's DeciLM does not have {found}; another target may hold it"))
        })?;
        if form.one_k {
            return Err(refused("vLLM's DeciLM has no norms of queries and keys".to_string()).into());
        }
        let queries = queries(model)?;
        let config = by_block(model, source.config().raw(), &plan.group_counts(), &form.widths(source)?)?;
        let mut laid = OutputModel::from_slots(model, config, |layer| {
            filled(model, plan, layer, queries / plan.layers[layer].groups.n_groups())
        })?;
        for (layer, stored) in
            model.layers.iter().enumerate().filter_map(|(i, layer)| Some((i, layer.stored.as_ref()?)))
        {
            if stored.key.bias.is_some() && stored.output.bias.is_none() {
                let name = stored.output.tensor.replace(".weight", ".bias");
                let width = model.hidden;
                let zeros = move |_: &_, _: &_| Ok(ndarray::Array1::zeros(width).into_dyn());
                laid.tensors
                    .push(OutputTensor::new(name, Content::made(layer, &[width], source.dtype(), zeros)));
            }
        }
        Ok(OutputModel { files: vec![("configuration_decilm.py".into(), CONFIGURATION.into())], ..laid })
    }
}
