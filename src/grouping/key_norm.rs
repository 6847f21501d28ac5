use crate::error::{Error, Result};
use crate::grouping::Grouping;
use crate::heads::Heads;
use crate::partition::Partition;
use crate::spec::Spec;

/// Neighbouring heads in groups whose sizes follow the norms of their key heads: the static form of key-driven
/// grouping (Khan et al. 2024, arXiv 2408.08454), which gives a KV head as many query heads as the norm of its key
/// deserves.
///
/// The heads are cut into k nearly equal runs of neighbours, from head `⌊g·H/k⌋` on (those of
/// [`UniformGqa`](super::UniformGqa) where k divides H). Run g weighs the sum of the Frobenius norms of its key
/// heads (bias included); the H heads are shared out in proportion to those weights by largest remainder, ties to the
/// earlier run; a run that would get none takes one from the largest. The groups are runs of neighbours of those
/// sizes. Keys of norm 0
/// throughout count as equal. There is a partition for every k.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyNorm;

impl KeyNorm {
    /// The partition of heads with these key norms.
    ///
    /// # Errors
    /// [`Error::GroupCount`] for k outside `1..=H`, [`Error::HeadCount`], [`Error::NotFinite`] for a norm that is
    /// NaN, infinite or negative.
    pub fn partition(norms: &[f64], k: usize) -> Result<Partition> {
        let n_heads = norms.len();
        if !(1..=n_heads).contains(&k) {
            return Err(Error::GroupCount { k, n_heads });
        }
        if !norms.iter().all(|n| n.is_finite() && *n >= 0.0) {
            return Err(Error::NotFinite { what: "key norms".to_string() });
        }
        let run = |g: usize| g * n_heads / k..(g + 1) * n_heads / k;
        let weight = |g: usize| norms[run(g)].iter().sum::<f64>();
        let weights: Vec<f64> = (0..k).map(weight).collect();
        let mut sizes = largest_remainder(&weights, n_heads);
        while let Some(empty) = sizes.iter().position(|&size| size == 0) {
            let largest = (0..k).rev().max_by_key(|&run| sizes[run]).unwrap_or(0);
            sizes[largest] -= 1;
            sizes[empty] += 1;
        }
        let labels = sizes.iter().enumerate().flat_map(|(group, &size)| vec![group; size]);
        Partition::from_labels(&labels.collect::<Vec<_>>())
    }
}

impl Grouping for KeyNorm {
    fn spec(&self) -> Spec {
        Spec::new("key-norm")
    }

    fn group(&self, heads: &Heads, k: usize) -> Result<Option<Partition>> {
        let (weight, bias) = (heads.key().weight(), heads.key().bias());
        let squares = |head: usize| {
            let row = weight.index_axis(ndarray::Axis(0), head);
            let square = |v: &f32| f64::from(*v) * f64::from(*v);
            row.iter().map(square).sum::<f64>() + bias.map_or(0.0, |b| b.row(head).iter().map(square).sum())
        };
        let norms: Vec<f64> = (0..heads.n_heads()).map(|head| squares(head).sqrt()).collect();
        Self::partition(&norms, k).map(Some)
    }
}

/// `total` shared out in proportion to the weights, in whole numbers (Hamilton's method).
fn largest_remainder(weights: &[f64], total: usize) -> Vec<usize> {
    // Relative to the largest, so that no sum overflows.
    let largest = weights.iter().copied().fold(0.0, f64::max);
    let relative = |w: f64| if largest > 0.0 { w / largest } else { 1.0 };
    let sum: f64 = weights.iter().map(|&w| relative(w)).sum();
    let shares: Vec<f64> = weights.iter().map(|&w| relative(w) / sum * total as f64).collect();
    let mut missing = total;
    let mut sizes = vec![0; weights.len()];
    for (size, share) in sizes.iter_mut().zip(&shares) {
        *size = (share.floor() as usize).min(missing);
        missing -= *size;
    }
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| shares[b].fract().total_cmp(&shares[a].fract()).then(a.cmp(&b)));
    order.iter().cycle().take(missing).for_each(|&run| sizes[run] += 1);
    sizes
}
