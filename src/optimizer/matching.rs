//! Heads in pairs: minimum-weight perfect matching (Edmonds 1965, doi:10.4153/CJM-1965-045-4).

use ndarray::ArrayView2;

/// Heads above which the O(H³) time and O(H²) memory of a matching are not worth it.
#[cfg(feature = "matching")]
const MAX_HEADS: usize = 512;

/// Labels 0…H/2−1 of the partition into pairs with the least `Σ D_ij`; `None` for odd H, for too many heads
/// and without the feature `matching`.
///
/// Exact but for weights that differ by less than 2⁻⁹⁶ of the largest: D is scaled to integers of 96 bits.
#[cfg(feature = "matching")]
pub(crate) fn pairs(distances: ArrayView2<'_, f64>) -> Option<Vec<u16>> {
    let n = distances.nrows();
    if n % 2 != 0 || n > MAX_HEADS {
        return None;
    }
    let largest = distances.iter().copied().fold(0.0, f64::max);
    // A power of two, so that scaling rounds nothing but what falls below 1. Two steps: 2^96 / 1e-308
    // overflows.
    let exponent = if largest > 0.0 { largest.log2().ceil() } else { 0.0 };
    let scaled = |d: &f64| (d * (-exponent / 2.0).exp2() * (-exponent / 2.0).exp2() * 96f64.exp2()) as i128;
    let costs: Vec<i128> = distances.iter().map(scaled).collect();
    let mates = integer_blossom::min_weight_perfect_matching(&costs, n);
    let mut labels = vec![0; n];
    let firsts = (0..n).filter(|&head| head < mates[head]);
    for (label, head) in firsts.enumerate() {
        labels[head] = label as u16;
        labels[mates[head]] = label as u16;
    }
    Some(labels)
}

#[cfg(not(feature = "matching"))]
pub(crate) fn pairs(_distances: ArrayView2<'_, f64>) -> Option<Vec<u16>> {
    None
}
