use crate::budget::Limits;
use crate::checkpoint::Checkpoint;
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::{Architecture, AttentionSpec, NormOver};
use crate::output::{OutputModel, Slot, Target};
use crate::partition::SearchSpace;
use crate::plan::Plan;

/// The shape of the source, with each group's shared head copied to all its members: loads wherever the source
/// does and holds any plan, but **saves no memory**. For evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expanded;

impl Target for Expanded {
    fn name(&self) -> &'static str {
        "expanded"
    }

    /// Any plan; of models with a norm over all keys of a token those with equal groups, in which copies do not change it.
    fn limits(&self, model: &Architecture) -> Limits {
        let wide =
            |layer: &AttentionSpec| layer.norms[1].as_ref().is_some_and(|norm| norm.over == NormOver::Width);
        match model.layers.iter().any(wide) {
            true => Limits { space: SearchSpace::equal(), ..Limits::default() },
            false => Limits::default(),
        }
    }

    fn output(&self, source: &Checkpoint, plan: &Plan) -> Result<OutputModel, FileError> {
        let model = source.architecture();
        let laid = OutputModel::from_slots(model, source.config().raw().clone(), |layer| {
            let groups = &plan.layers[layer].groups;
            let copies = groups.labels().iter().map(|&group| Slot::Head(group.into()));
            (copies.collect(), (0..model.layers[layer].query_heads).map(Slot::Head).collect())
        })?;
        Ok(laid)
    }
}
