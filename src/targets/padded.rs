use super::expanded::Expanded;
use super::stock::Stock;
use crate::budget::Limits;
use crate::checkpoint::Checkpoint;
use crate::families::{takes_queries, with_heads};
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::Architecture;
use crate::output::{OutputModel, Slot, Target};
use crate::partition::SearchSpace;
use crate::plan::Plan;

/// An ordinary grouped-query model of groups that may differ in size, as many in every layer: query heads of zeros, in rows of
/// queries and columns of outputs, fill every group up to the largest one of the model. The cache is that of the plan; query and
/// output projections and scores are larger by what was filled up.
///
/// Written as the source's own type where its config.json takes the number of query heads, of a Llama else as a Mistral, which
/// computes the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Padded;

impl Padded {
    /// Percent of the source's query heads that a layer may have: what is computed and stored for queries and outputs grows by half at
    /// most, where sizes that are as equal as can be do not ask for more.
    pub const MOST: usize = 150;
}

impl Target for Padded {
    fn name(&self) -> &'static str {
        "padded"
    }

    /// One k in all layers, and no more than [`Padded::MOST`]; equal groups of models with a norm over all heads of a token, as zeros
    /// would change the norm, and of those that do not take other numbers of query heads.
    fn limits(&self, model: &Architecture) -> Limits {
        if takes_queries(model) { one_k(model) } else { Stock.limits(model) }
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let model = source.architecture();
        let places = (0..plan.layers.len()).map(|layer| places(model, plan, layer)).max().unwrap_or(1);
        let k = plan.layers.first().map_or(1, |layer| layer.groups.n_groups());
        let changed = with_heads(model, source.config().raw(), k * places, k)?;
        Ok(OutputModel::from_slots(model, changed, |layer| filled(model, plan, layer, places))?)
    }
}

/// What a model holds of which all layers have one k and one number of query heads, whatever its type.
pub(super) fn one_k(model: &Architecture) -> Limits {
    let space = SearchSpace { max_filled: Some(Padded::MOST), ..Expanded.limits(model).space };
    Limits { space, same_k: true, ..Limits::default() }
}

/// Query heads of the largest group of a layer.
pub(super) fn places(model: &Architecture, plan: &Plan, layer: usize) -> usize {
    let largest = plan.layers[layer].groups.sizes().into_iter().max().unwrap_or(1);
    largest * model.layers[layer].queries_per_head()
}

/// The shared heads of a layer, and its query heads group by group, each group filled up to so many.
pub(super) fn filled(
    model: &Architecture,
    plan: &Plan,
    layer: usize,
    places: usize,
) -> (Vec<Slot>, Vec<Slot>) {
    let (groups, r) = (plan.layers[layer].groups.groups(), model.layers[layer].queries_per_head());
    let queries = groups.iter().flat_map(|group| {
        let heads = group.iter().flat_map(|&head| (head * r..(head + 1) * r).map(Slot::Head));
        heads.chain(std::iter::repeat(Slot::Zero)).take(places)
    });
    ((0..groups.len()).map(Slot::Head).collect(), queries.collect())
}
