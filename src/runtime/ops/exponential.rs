//! Exponentials of whole rows: of operations that a compiler makes vectors of, where the system's `expf` takes one number at a
//! time.

/// log₂ e; and ln 2 in two parts, of which the first is short enough that whole multiples of it are exact.
const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// Added to a number of moderate size, it leaves only the whole part: 1.5 · 2²³.
const WHOLE: f32 = 12_582_912.0;
/// Beyond these the power of two is no normal number.
const RANGE: [f32; 2] = [-87.0, 88.0];
/// 1/n!: the series of e^r for |r| ≤ ln 2 / 2 ends at 5e-9.
const SERIES: [f32; 8] = [1.0, 1.0, 0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0];
/// Sums that go on side by side.
const LANES: usize = 16;

/// eˣ to 2e-7 of itself for −87 ≤ x ≤ 88; outside, that of the nearer end. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let x = x.clamp(RANGE[0], RANGE[1]);
    let shifted = x * LOG2_E + WHOLE;
    let n = shifted - WHOLE;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let series = SERIES.iter().rev().fold(0.0, |sum, &c| sum * r + c);
    // The low bits of `shifted` are n: moved into the exponent they are 2ⁿ.
    series * f32::from_bits(shifted.to_bits().wrapping_add(127) << 23)
}

/// The largest number of a row; −∞ of none.
pub(crate) fn largest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let whole = row.chunks_exact(LANES);
    let rest = whole.remainder();
    for numbers in whole {
        lanes.iter_mut().zip(numbers).for_each(|(most, &x)| *most = if x > *most { x } else { *most });
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// Numbers of a long row that are summed in f32 before they go into a sum in f64.
const PART: usize = 256;

/// `Σ exp(x − most)` of a long row.
pub(crate) fn sum_of_exp(row: &[f32], most: f32) -> f64 {
    let mut held = [0.0; PART];
    let part = |numbers: &[f32]| {
        let held = &mut held[..numbers.len()];
        held.iter_mut().zip(numbers).for_each(|(held, &x)| *held = exp(x - most));
        f64::from(sum(held))
    };
    row.chunks(PART).map(part).sum()
}

/// `Σ exp(p − most) (p − q)` of two long rows.
pub(crate) fn sum_of_exp_apart(p: &[f32], most: f32, q: &[f32]) -> f64 {
    let mut held = [0.0; PART];
    let part = |(p, q): (&[f32], &[f32])| {
        let held = &mut held[..p.len()];
        for ((held, &p), &q) in held.iter_mut().zip(p).zip(q) {
            *held = exp(p - most) * (p - q);
        }
        f64::from(sum(held))
    };
    p.chunks(PART).zip(q.chunks(PART)).map(part).sum()
}

/// Sum of a row.
pub(crate) fn sum(row: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let whole = row.chunks_exact(LANES);
    let rest = whole.remainder();
    for numbers in whole {
        lanes.iter_mut().zip(numbers).for_each(|(sum, &x)| *sum += x);
    }
    lanes.iter().sum::<f32>() + rest.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn exponentials_are_those_of_f64(x in -87.0f32..88.0) {
            let exact = f64::from(x).exp();
            prop_assert!((f64::from(exp(x)) - exact).abs() <= 2e-7 * exact, "{} at {x}", exp(x));
        }

        #[test]
        fn rows_are_summed_and_searched_whole(row in prop::collection::vec(-9.0f32..9.0, 1..70)) {
            prop_assert_eq!(largest(&row), row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let exact: f64 = row.iter().map(|&x| f64::from(x)).sum();
            prop_assert!((f64::from(sum(&row)) - exact).abs() < 1e-4);
        }
    }

    #[test]
    fn the_ends_hold() {
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!([exp(f32::NEG_INFINITY), exp(f32::INFINITY)], [exp(-87.0), exp(88.0)]);
        assert!(exp(-87.0) < 2e-38 && exp(88.0).is_finite());
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
    }
}
