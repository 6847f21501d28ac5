use super::expanded::Expanded;
use super::form::Form;
use super::padded::{Padded, filled, places};
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

/// A directory for vLLM's `DeciLMForCausalLM` (Nemotron-NAS), of Llamas, Mistrals and Qwen2: groups of any size, whose number may
/// differ from layer to layer.
///
/// That model has one number of query heads for all layers; `block_configs` say how many share a KV head. So groups are filled up
/// with query heads of zeros to the least number that the groups of every layer divide, of at most [`Padded::MOST`] percent of the
/// source's. Where queries, keys and values have biases, the outputs get biases of zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Deci;

const CONFIGURATION: &str = include_str!("configuration_decilm.py");

impl Target for Deci {
    fn name(&self) -> &'static str {
        "deci"
    }

    /// What each layer alone must keep to, at most [`Padded::MOST`] percent of its query heads. That all layers can have one number of
    /// them `output` checks.
    fn limits(&self, model: &Architecture) -> Limits {
        let space = SearchSpace { max_filled: Some(Padded::MOST), ..Expanded.limits(model).space };
        Limits { space, ..Limits::default() }
    }

    /// One number of query heads, that with which layers can have the most numbers of groups, up to all heads kept: where it is the
    /// source's groups are equal.
    fn search_limits(&self, model: &Architecture) -> Limits {
        let space = Expanded.limits(model).space;
        match queries(model).map(|own| (own, roomiest(model, own))) {
            Ok((own, all)) if all > own => Limits {
                space: SearchSpace { max_filled: Some(100 * all / own), ..space },
                dividing: Some(all),
                ..Limits::default()
            },
            _ => Limits { space: SearchSpace::equal(), ..Limits::default() },
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
        let own = queries(model)?;
        let ks = plan.group_counts();
        let holds = |&all: &usize| {
            ks.iter().enumerate().all(|(layer, k)| all % k == 0 && all / k >= places(model, plan, layer))
        };
        let all = (own..=most(own)).find(holds).ok_or_else(|| {
            let reason = format!(
                "vLLM's DeciLM has one number of query heads for all layers, and none up to {} ({}% of {own}) holds layers of {ks:?} \
                 groups as large as these; another target may",
                most(own),
                Padded::MOST
            );
            refused(reason)
        })?;
        let config = by_block(model, source.config().raw(), all, &ks, &form.widths(source)?)?;
        let mut laid =
            OutputModel::from_slots(model, config, |layer| filled(model, plan, layer, all / ks[layer]))?;
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

/// The most query heads where the source has so many.
fn most(own: usize) -> usize {
    own * Padded::MOST / 100
}

/// The number of query heads under which layers can have the most numbers of groups, the least of equals. All heads of a layer can be
/// kept under it, and every k that divides it can have groups as equal as can be.
fn roomiest(model: &Architecture, own: usize) -> usize {
    let layers = || model.layers.iter().map(|layer| (layer.kv_heads, layer.queries_per_head()));
    let equal: usize = layers().map(|(heads, _)| (1..=heads).filter(|k| heads % k == 0).count()).sum();
    let (mut best, mut choices) = (own, equal);
    for all in (own + 1..=most(own)).filter(|all| layers().all(|(heads, _)| all % heads == 0)) {
        let ks = |heads| (1..=heads).filter(|k| all % k == 0);
        let room = |(heads, r): (usize, usize)| ks(heads).all(|k| k * heads.div_ceil(k) * r <= all);
        let found: usize = layers().map(|(heads, _)| ks(heads).count()).sum();
        if found > choices && layers().all(room) {
            (best, choices) = (all, found);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::AttentionSpec;

    #[test]
    fn the_roomiest_number_of_query_heads() {
        for (queries, heads, expected, dividing) in [
            (9, 3, 12, Some(12)),
            (32, 8, 48, Some(48)),
            // Six heads cannot be kept under nine.
            (6, 6, 6, None),
            (8, 8, 8, None),
            // Under 36 three groups of four heads would want 42 places.
            (28, 4, 28, None),
        ] {
            let layers = vec![AttentionSpec::new(queries, heads, 4); 2];
            let model = Architecture::new("raw", 12, layers);
            assert_eq!(roomiest(&model, queries), expected, "{queries} on {heads}");
            let limits = Deci.search_limits(&model);
            assert_eq!(limits.dividing, dividing);
            assert_eq!(limits.space == SearchSpace::equal(), dividing.is_none());
            // Whatever is found can be written: every k has room for its largest group.
            for k in limits.space.group_counts(heads).unwrap() {
                let size = limits.space.size_at_most(heads, k);
                let held = k == heads
                    || limits.dividing.is_none_or(|all| all % k != 0 || k * size * (queries / heads) <= all);
                assert!(held, "{k} groups of {size} among {queries} on {heads}");
            }
        }
    }
}
