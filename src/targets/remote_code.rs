use serde_json::{Map, json};

use super::expanded::Expanded;
use super::padded::{filled, places};
use crate::budget::Limits;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::families::{by_layer, takes_queries_by_layer};
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::Architecture;
use crate::output::{OutputModel, Slot, Target};
use crate::partition::SearchSpace;
use crate::plan::{Below, Plan};

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

    /// Those too of which a layer reads the cache of the one below: it has no keys and values then, in files and in the cache.
    fn holds_pairs(&self) -> bool {
        true
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let (model, kept) = (source.architecture(), plan.group_counts());
        let places = |layer: usize| places(model, plan, layer);
        let below = |layer: usize| plan.layers[layer].below.as_ref().map(Below::heads);
        let heads = |layer: usize| {
            let k = below(layer).map_or(kept[layer], <[usize]>::len);
            [k * places(layer), k]
        };
        let heads: Vec<_> = (0..model.n_layers()).map(heads).collect();
        let below: Vec<_> = (0..model.n_layers()).map(below).collect();
        let mut laid = OutputModel::from_slots(model, Map::new(), |layer| {
            let (_, mut queries) = filled(model, plan, layer, places(layer));
            queries.resize(heads[layer][0], Slot::Zero);
            ((0..kept[layer]).map(Slot::Head).collect(), queries)
        })?;
        leave_out(&mut laid, model, &below)?;
        let (mut config, class) = by_layer(model, source.config().raw(), &heads, &below)?;
        config.insert("architectures".to_string(), json!(["QcqaForCausalLM"]));
        let place = json!({ "AutoModelForCausalLM": "modeling_qcqa.QcqaForCausalLM" });
        config.insert("auto_map".to_string(), place);
        let file = MODEL_FILE.replace("StockForCausalLM", class).into_bytes();
        Ok(OutputModel { config, files: vec![("modeling_qcqa.py".into(), file)], ..laid })
    }
}

/// Leaves out the keys and values of layers that have none.
fn leave_out(laid: &mut OutputModel, model: &Architecture, below: &[Option<&[usize]>]) -> Result<()> {
    let stored = model
        .layers
        .iter()
        .zip(below)
        .map(|(layer, below)| layer.stored.as_ref().filter(|_| below.is_some()));
    for (layer, stored) in stored.enumerate() {
        let Some(stored) = stored else { continue };
        let own = [&stored.key, &stored.value];
        if own.iter().any(|own| own.tensor == stored.query.tensor) {
            let found = format!("has queries, keys and values in one tensor, {}", stored.query.tensor);
            let expected = "a layer that reads the one below leaves keys and values out".to_string();
            return Err(Error::Limits { layer, found, expected });
        }
        laid.left_out
            .extend(own.iter().flat_map(|own| [Some(own.tensor.clone()), own.bias.clone()]).flatten());
    }
    laid.tensors.retain(|tensor| !laid.left_out.contains(&tensor.name));
    Ok(())
}
