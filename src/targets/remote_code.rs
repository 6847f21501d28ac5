use serde_json::{Map, json};

use super::expanded::Expanded;
use super::padded::{filled, places};
use crate::budget::Limits;
use crate::checkpoint::Checkpoint;
use crate::families::{by_layer, takes_queries_by_layer};
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::Architecture;
use crate::output::{OutputModel, Target};
use crate::partition::SearchSpace;
use crate::plan::Plan;

/// A directory for transformers with a short model file beside the weights (`trust_remote_code=True`), for any plan: every layer has
/// its own number of KV heads and caches no more; within a layer query heads of zeros fill groups up to the largest.
///
/// config.json keeps its type and numbers, and lists the heads of each layer under a key that this crate reads again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RemoteCode;

/// The model file, of which the name of the stock class is to be put in.
const MODEL_FILE: &str = include_str!("modeling_qcqa.py");

impl Target for RemoteCode {
    fn name(&self) -> &'static str {
        "remote-code"
    }

    /// Any plan; those with equal groups of models with a norm over all heads of a token, as zeros would change the norm, and of those
    /// whose layers do not take other numbers of query heads.
    fn limits(&self, model: &Architecture) -> Limits {
        let any = Expanded.limits(model);
        if takes_queries_by_layer(model) { any } else { Limits { space: SearchSpace::equal(), ..any } }
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let model = source.architecture();
        let places = |layer: usize| places(model, plan, layer);
        let heads = |layer: usize| {
            let k = plan.layers[layer].groups.n_groups();
            [k * places(layer), k]
        };
        let heads: Vec<_> = (0..model.n_layers()).map(heads).collect();
        let laid =
            OutputModel::from_slots(model, Map::new(), |layer| filled(model, plan, layer, places(layer)))?;
        let (mut config, class) = by_layer(model, source.config().raw(), &heads)?;
        config.insert("architectures".to_string(), json!(["QcqaForCausalLM"]));
        let place = json!({ "AutoModelForCausalLM": "modeling_qcqa.QcqaForCausalLM" });
        config.insert("auto_map".to_string(), place);
        let file = MODEL_FILE.replace("StockForCausalLM", class).into_bytes();
        Ok(OutputModel { config, files: vec![("modeling_qcqa.py".into(), file)], ..laid })
    }
}
