//! What a target says of an output, held against the one rule that all runtimes share.

use std::collections::BTreeSet;
use std::path::{Component, Path};

use super::copy::PROVENANCE;
use super::{Content, OutputModel, Slot};
use crate::checkpoint::{CONFIG, Checkpoint, INDEX};
use crate::files::FileError;
use crate::heads::HeadSource;
use crate::model::{AttentionSpec, Part, StoredHeads};
use crate::plan::{LayerPlan, Plan};

/// Checks that an output of a source holds all of its heads where they are looked for.
pub(super) fn check(
    source: &Checkpoint,
    plan: &Plan,
    target: &'static str,
    output: &OutputModel,
) -> Result<(), FileError> {
    let invalid = |found: String| FileError::TargetOutput { target, found };
    let layers = &source.architecture().layers;
    if output.kv_heads.len() != layers.len() {
        let found =
            format!("it has {} numbers of cached heads for {} layers", output.kv_heads.len(), layers.len());
        return Err(invalid(found));
    }
    check_files(source, output).map_err(invalid)?;

    let (mut laid, mut names) = (Vec::new(), BTreeSet::new());
    laid.resize_with(layers.len(), Laid::default);
    for tensor in &output.tensors {
        if !names.insert(tensor.name.as_str()) || output.left_out.contains(&tensor.name) {
            return Err(invalid(format!("it says two things of the tensor {}", tensor.name)));
        }
        let layer = match &tensor.content {
            Content::Copied(_) => continue,
            Content::Heads { layer, .. }
            | Content::OutputBias(layer)
            | Content::HeadNorm { layer, .. }
            | Content::Sinks { layer, .. }
            | Content::Made { layer, .. } => *layer,
        };
        let of = laid.get_mut(layer);
        let of = of.ok_or_else(|| invalid(format!("the tensor {} is of layer {layer}", tensor.name)))?;
        match &tensor.content {
            Content::Heads { axis, pieces, .. } => {
                for &(part, slot) in pieces {
                    let slots = if axis.is_some() { &mut of.weights } else { &mut of.biases };
                    slots[part as usize].push(slot);
                }
            }
            Content::Made { .. } => of.made = true,
            _ => {}
        }
    }
    let copied: BTreeSet<&str> = (output.tensors.iter())
        .filter_map(
            |tensor| if let Content::Copied(from) = &tensor.content { Some(from.as_str()) } else { None },
        )
        .collect();
    let kept = plan.group_counts();
    for (layer, (laid, attention)) in laid.iter().zip(layers).enumerate() {
        let wrong = |found| FileError::Layout { target, layer, found };
        let stored = source.stored(layer)?;
        for name in stored.tensors() {
            if copied.contains(name) || !(names.contains(name) || output.left_out.contains(name)) {
                return Err(wrong(format!("the tensor {name} holds heads and is copied as it is")));
            }
        }
        laid.check(attention, stored, &plan.layers[layer], [output.kv_heads[layer], kept[layer]])
            .map_err(wrong)?;
    }
    Ok(())
}

/// Checks that the files of an output lie in it, and not in the place of weights.
fn check_files(source: &Checkpoint, output: &OutputModel) -> Result<(), String> {
    let shards = source.files().files.iter().map(|shard| shard.file.as_str());
    let mut taken: BTreeSet<&Path> = shards.chain([CONFIG, INDEX, PROVENANCE]).map(Path::new).collect();
    for (path, _) in &output.files {
        let inside =
            path.components().all(|c| matches!(c, Component::Normal(_))) && path.file_name().is_some();
        if !inside {
            return Err(format!("the file {} is not in it", path.display()));
        }
        if !taken.insert(path) {
            return Err(format!("the file {} is another's", path.display()));
        }
    }
    Ok(())
}

/// The heads of a layer in the order in which an output has them, by part.
#[derive(Debug, Default)]
struct Laid {
    weights: [Vec<Slot>; 4],
    biases: [Vec<Slot>; 4],
    /// Whether tensors are made from its shared heads, maybe in the place of them.
    made: bool,
}

impl Laid {
    /// Query head q reads KV head q / (query heads / KV heads), and must find its own group there. The
    /// message says what is wrong.
    fn check(
        &self,
        attention: &AttentionSpec,
        stored: &StoredHeads,
        planned: &LayerPlan,
        [kv_heads, kept]: [usize; 2],
    ) -> Result<(), String> {
        let groups = &planned.groups;
        for part in Part::ALL {
            let biased = part != Part::Output && stored.part(part).bias.is_some();
            let expected = if biased { &self.weights[part as usize][..] } else { &[] };
            if self.biases[part as usize] != expected {
                return Err(format!("the biases of {part:?} heads do not lie as the heads do"));
            }
        }
        let [query, key, value, output] = &self.weights;
        for (one, other, names) in [(key, value, "keys and values"), (query, output, "queries and outputs")] {
            if one != other {
                return Err(format!("{names} lie in different orders"));
            }
        }
        if self.made && (query.is_empty() || key.is_empty()) {
            return Ok(());
        }
        let (readers, query_heads) = (attention.queries_per_head(), attention.query_heads);
        let heads = |slot: &Slot| if let Slot::Head(head) = slot { Some(*head) } else { None };
        let mut seen: Vec<usize> = query.iter().filter_map(heads).collect();
        seen.sort_unstable();
        if !seen.into_iter().eq(0..query_heads) {
            return Err(format!("the query order is no permutation of {query_heads} query heads"));
        }
        // A layer that reads the one below finds one head there for each of its groups, in their order.
        let below: Vec<Slot> = (0..groups.n_groups()).map(Slot::Head).collect();
        let key = match planned.below {
            Some(_) if kv_heads > 0 || !key.is_empty() => {
                return Err(
                    "it reads the layer below, and has heads of its own laid out or cached".to_string()
                );
            }
            Some(_) => &below,
            None => key,
        };
        let (queries, keys) = (query.len(), key.len());
        if keys == 0 || queries % keys != 0 {
            return Err(format!("{queries} query heads cannot be shared evenly by {keys} KV heads"));
        }
        if keys != kv_heads && planned.below.is_none() {
            return Err(format!("{keys} KV heads are laid out, and {kv_heads} cached"));
        }
        if let Some(group) =
            key.iter().filter_map(heads).find(|&group| planned.below.is_none() && group >= kept)
        {
            return Err(format!("there is no group {group} of {kept}"));
        }
        for (position, slot) in query.iter().enumerate() {
            let Slot::Head(head) = *slot else { continue };
            let group = groups.group_of(head / readers);
            match key[position / (queries / keys)] {
                Slot::Head(found) if found == group => {}
                Slot::Head(found) => {
                    return Err(format!("query head {head} would read group {found} instead of {group}"));
                }
                Slot::Zero => {
                    return Err(format!("query head {head} would read zeros instead of group {group}"));
                }
            }
        }
        Ok(())
    }
}
