//! The contracts of the traits, for the tests of plugins: one function a trait, that fails with a sentence.
//!
//! Every plugin of this crate goes through them (tests/conformance.rs), and any other can.
//!
//! ```
//! use qcqa::optimizer::Exact;
//! use qcqa::testing::check_optimizer;
//!
//! check_optimizer(&Exact::default()).unwrap();
//! ```

mod layers;
mod searches;

use ndarray::Axis;

pub use layers::{heads, layer};
pub use searches::{check_fitness, check_grouping, check_optimizer};

use crate::allocator::{Allocator, LayerCosts};
use crate::error::{Error, Result};
use crate::heads::{HeadSource, Heads, Pooled, Projection};
use crate::partition::Partition;
use crate::pooler::KvPooler;
use crate::run::Run;

/// What a contract says of a plugin: nothing, or the first rule that it breaks.
pub type Verdict = std::result::Result<(), String>;

/// A rule with its sentence.
fn rule(holds: bool, sentence: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(sentence()) }
}

/// An error where none may be.
fn unexpected<T>(what: &str, result: Result<T>) -> std::result::Result<T, String> {
    result.map_err(|error| format!("{what} failed: {error}"))
}

/// An [`Allocator`]: one k a layer, each to be had, within the budget; the same seed gives the same choice; a budget below
/// everything is refused.
///
/// # Errors
/// The first rule that is broken.
pub fn check_allocator(allocator: &dyn Allocator) -> Verdict {
    // Layers of different sizes, with gaps, and a fixed one.
    let row = |layer: usize, n: usize| -> Vec<Option<f64>> {
        let cost = |k: usize| ((layer + 2) * (n - k)) as f64;
        (1..=n).map(|k| ((k + layer) % 4 != 3 || k == n).then(|| cost(k))).collect()
    };
    let fixed = vec![None, Some(3.0), None, None];
    let table = vec![row(0, 8), row(1, 6), fixed, row(3, 8)];
    let costs = unexpected("a table of costs", LayerCosts::from_table(table, false))?;
    let all: usize = (0..costs.n_layers()).map(|layer| costs.n_heads(layer)).sum();
    let least: usize =
        (0..costs.n_layers()).filter_map(|layer| costs.choices(layer).next()).map(|(k, _)| k).sum();
    for kv_heads in least..=all {
        let ks = match allocator.allocate(&costs, kv_heads, Run::new(3)) {
            Ok(ks) => ks,
            // A rule that knows fewer choices may find none this small.
            Err(Error::BudgetUnreachable { .. }) => continue,
            Err(error) => return Err(format!("allocating {kv_heads} heads failed: {error}")),
        };
        rule(ks.len() == costs.n_layers(), || format!("{} numbers of groups for 4 layers", ks.len()))?;
        rule(costs.total(&ks).is_some(), || format!("{ks:?} holds a k that is not to be had"))?;
        let total: usize = ks.iter().sum();
        rule(total <= kv_heads, || format!("{ks:?} takes {total} heads of {kv_heads}"))?;
        let again = unexpected("a second run", allocator.allocate(&costs, kv_heads, Run::new(3)))?;
        rule(again == ks, || format!("one seed gave {ks:?} and {again:?}"))?;
    }
    let whole = unexpected("the whole budget", allocator.allocate(&costs, all, Run::new(0)))?;
    rule(costs.total(&whole).is_some(), || format!("{whole:?} holds a k that is not to be had"))?;
    match allocator.allocate(&costs, least - 1, Run::new(0)) {
        Err(Error::BudgetUnreachable { .. }) => Ok(()),
        other => Err(format!("{} heads cannot be had, but it said {other:?}", least - 1)),
    }
}

/// A [`KvPooler`]: shared heads of the right shapes, finite, single heads bit for bit, one group a head of the first where all
/// are equal, its own partition only, the same result twice. The pooler must take layers with and without biases, and with
/// queries and moments where it [needs](KvPooler::needs) them.
///
/// # Errors
/// The first rule that is broken.
pub fn check_pooler(pooler: &dyn KvPooler) -> Verdict {
    for bias in [false, true] {
        let heads = unexpected("a layer", heads(6, 4, 10, bias))?;
        let (mut partitions, mut alone) = (Vec::new(), Vec::new());
        for groups in
            [vec![0, 1, 0, 1, 0, 1], vec![0, 0, 0, 0, 0, 0], vec![0, 1, 2, 2, 3, 4], vec![0, 1, 2, 3, 4, 5]]
        {
            let partition = unexpected("a partition", Partition::from_labels(&groups))?;
            let pooled = unexpected("pooling", pooler.pool(&heads, &partition))?;
            unexpected("the check of what was pooled", pooled.check(&heads, &partition))?;
            single_heads(&heads, &partition, &pooled)?;
            let again = unexpected("pooling again", pooler.pool(&heads, &partition))?;
            rule(again == pooled, || format!("groups {groups:?} were pooled differently the second time"))?;
            partitions.push(partition);
            alone.push(pooled);
        }
        let each =
            unexpected("pooling each", pooler.pool_each(&heads, &partitions.iter().collect::<Vec<_>>()))?;
        rule(each == alone, || "several partitions at once were pooled differently".to_string())?;
        let other = unexpected("a partition", Partition::from_labels(&[0, 1, 0]))?;
        let refused =
            matches!(pooler.pool(&heads, &other), Err(Error::PartitionSize { expected: 6, found: 3 }));
        rule(refused, || "a partition of another number of heads was not refused as such".to_string())?;
    }
    Ok(())
}

/// Groups of one head are that head, and so is what reads it.
fn single_heads(heads: &Heads, partition: &Partition, pooled: &Pooled) -> Verdict {
    let same = |pooled: &Projection, group: usize, source: &Projection, head: usize| {
        let weight = |p: &Projection, i| p.weight().index_axis_move(Axis(0), i).to_owned();
        let bias = |p: &Projection, i| p.bias().map(|b| b.row(i).to_owned());
        weight(pooled, group) == weight(source, head) && bias(pooled, group) == bias(source, head)
    };
    for (group, members) in partition.groups().iter().enumerate() {
        let [head] = members[..] else { continue };
        let copied =
            same(&pooled.key, group, heads.key(), head) && same(&pooled.value, group, heads.value(), head);
        rule(copied, || format!("head {head} is alone in its group, but was changed"))?;
        let r = heads.queries_per_head();
        if let (Some(own), Some(source)) = (&pooled.query, heads.query()) {
            let kept = (head * r..(head + 1) * r).all(|q| same(own, q, source, q));
            rule(kept, || format!("head {head} is alone in its group, but its queries were changed"))?;
        }
    }
    Ok(())
}

/// A [`HeadSource`]: layers as its architecture says, each with its index; rows that are those of the heads, in pieces of any
/// size; no layer beyond the last; one identity.
///
/// # Errors
/// The first rule that is broken.
pub fn check_source(source: &dyn HeadSource) -> Verdict {
    let model = source.architecture();
    let id = unexpected("its identity", source.id())?;
    rule(unexpected("its identity", source.id())? == id, || "its identity changes".to_string())?;
    rule(id.layers.len() == model.n_layers(), || "its identity has another number of layers".to_string())?;
    for (layer, spec) in model.layers.iter().enumerate() {
        let heads = unexpected("a layer", source.heads(layer))?;
        rule(heads.layer() == layer, || format!("layer {layer} says that it is layer {}", heads.layer()))?;
        let dim = heads.key().weight().dim();
        rule(dim == (spec.kv_heads, spec.head_dim, model.hidden), || {
            format!("layer {layer} has keys {dim:?}")
        })?;
        rule(heads.rotation() == spec.rotation(), || {
            format!("layer {layer} turns in another way than it says")
        })?;
        rule(source.calibration().is_some() == heads.moment().is_some(), || {
            format!("layer {layer} has a moment where no calibration is named, or the other way round")
        })?;
        let rows = unexpected("the rows of a layer", source.rows(layer))?;
        let whole: &dyn crate::heads::HeadRows = &heads;
        rule((rows.n_heads(), rows.row_len()) == (whole.n_heads(), whole.row_len()), || {
            format!("layer {layer} has rows of another shape than its heads")
        })?;
        for head in 0..rows.n_heads() {
            let (mut from_rows, mut from_heads) = (vec![0.0; rows.row_len()], vec![0.0; rows.row_len()]);
            whole.read(head, 0, &mut from_heads);
            // Pieces that end nowhere in particular.
            let mut start = 0;
            for piece in from_rows.chunks_mut(7) {
                rows.read(head, start, piece);
                start += piece.len();
            }
            rule(from_rows == from_heads, || format!("layer {layer}, head {head}: rows differ from heads"))?;
        }
    }
    rule(source.heads(model.n_layers()).is_err(), || "it has a layer beyond its last".to_string())
}
