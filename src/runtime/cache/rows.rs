//! Keys and values at rest: each row in as many bits as it was given.

use half::f16;
use half::slice::HalfFloatSliceExt;
use ndarray::{Array2, ArrayView2, ArrayView3};

use super::Kept;
use crate::error::{Error, Result};
use crate::spec::Spec;

/// Bits of a number at rest unless said: what servers hold.
pub(super) const BITS: u8 = 16;

/// The setting `bits` of a policy.
pub(super) fn bits_of(spec: &Spec, unless: u8) -> Result<u8> {
    let bits = spec.count("bits")?.unwrap_or(unless.into());
    match bits {
        1..=8 | 16 | 32 => Ok(bits as u8),
        _ => Err(Error::setting("bits", bits, "1 to 8, 16 or 32")),
    }
}

/// Numbers in some bits each: 32, 16, or fewer, as whole steps above the least.
#[derive(Debug, Clone)]
enum Row {
    Exact(Box<[f32]>),
    Half(Box<[f16]>),
    Steps { bits: u8, least: f16, step: f16, codes: Box<[u8]>, outliers: Box<[(u16, f16)]> },
}

/// Near, and finite.
fn half(x: f32) -> f16 {
    let half = f16::from_f32(x);
    if half.is_finite() { half } else { f16::MAX.copysign(half) }
}

impl Row {
    fn bits(&self) -> u8 {
        match self {
            Self::Exact(_) => 32,
            Self::Half(_) => 16,
            Self::Steps { bits, .. } => *bits,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Exact(numbers) => size_of_val(&**numbers),
            Self::Half(numbers) => size_of_val(&**numbers),
            Self::Steps { codes, outliers, .. } => {
                2 * size_of::<f16>() + codes.len() + outliers.len() * (size_of::<u16>() + size_of::<f16>())
            }
        }
    }

    /// In `bits` a number, with the numbers farthest from the mean, so many, apart from the others in 16.
    fn rounded(numbers: &[f32], bits: u8, outliers: usize) -> Self {
        match bits {
            32 => Self::Exact(numbers.into()),
            16 => Self::Half(numbers.iter().map(|&x| half(x)).collect()),
            _ => Self::steps(numbers, bits, outliers),
        }
    }

    fn steps(numbers: &[f32], bits: u8, outliers: usize) -> Self {
        let mean = numbers.iter().sum::<f32>() / numbers.len().max(1) as f32;
        let mut order: Vec<usize> = (0..numbers.len()).collect();
        if outliers > 0 {
            order.sort_by(|&a, &b| {
                (numbers[b] - mean).abs().total_cmp(&(numbers[a] - mean).abs()).then(a.cmp(&b))
            });
        }
        let (apart, inside) = order.split_at(outliers.min(numbers.len()));
        let mut apart: Vec<(u16, f16)> = apart.iter().map(|&i| (i as u16, half(numbers[i]))).collect();
        apart.sort_by_key(|&(i, _)| i);
        let bound =
            |start: f32, most: fn(f32, f32) -> f32| inside.iter().map(|&i| numbers[i]).fold(start, most);
        let (low, high) = (bound(f32::INFINITY, f32::min), bound(f32::NEG_INFINITY, f32::max));
        let least = half(if inside.is_empty() { 0.0 } else { low });
        let levels = f32::from((1u16 << bits) - 1);
        let step = half(if inside.is_empty() { 0.0 } else { (high - least.to_f32()) / levels }.max(0.0));
        let code = |&x: &f32| match step.to_f32() {
            0.0 => 0,
            step => ((x - least.to_f32()) / step).round().clamp(0.0, levels) as u32,
        };
        let mut codes = vec![0u8; (numbers.len() * usize::from(bits)).div_ceil(8)];
        for (i, code) in numbers.iter().map(code).enumerate() {
            let at = i * usize::from(bits);
            let placed = code << (at % 8);
            codes[at / 8] |= placed as u8;
            if placed > 0xff {
                codes[at / 8 + 1] |= (placed >> 8) as u8;
            }
        }
        Self::Steps { bits, least, step, codes: codes.into(), outliers: apart.into() }
    }

    /// The numbers that it stands for.
    fn read_into(&self, numbers: &mut [f32]) {
        match self {
            Self::Exact(exact) => numbers.copy_from_slice(exact),
            Self::Half(halves) => halves.convert_to_f32_slice(numbers),
            Self::Steps { bits, least, step, codes, outliers } => {
                let (bits, least, step) = (usize::from(*bits), least.to_f32(), step.to_f32());
                let mask = (1u32 << bits) - 1;
                for (i, x) in numbers.iter_mut().enumerate() {
                    let at = i * bits;
                    let next = codes.get(at / 8 + 1).copied().unwrap_or(0);
                    let pair = u32::from(codes[at / 8]) | u32::from(next) << 8;
                    *x = least + ((pair >> (at % 8)) & mask) as f32 * step;
                }
                outliers.iter().for_each(|&(i, x)| numbers[usize::from(i)] = x.to_f32());
            }
        }
    }

    /// In fewer bits, where these are fewer.
    fn lower(&mut self, bits: u8, outliers: usize, width: usize) {
        if bits < self.bits() {
            let mut numbers = vec![0.0; width];
            self.read_into(&mut numbers);
            *self = Self::rounded(&numbers, bits, outliers);
        }
    }
}

/// Keys and values of one KV head, token by token.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    width: usize,
    rows: Vec<[Row; 2]>,
    /// The last ones that came in this step, and are exact yet.
    fresh: usize,
}

impl Rows {
    pub(super) fn new(width: usize) -> Self {
        Self { width, rows: Vec::new(), fresh: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn append(&mut self, keys: ArrayView2<'_, f32>, values: ArrayView2<'_, f32>) {
        let exact = |row: ndarray::ArrayView1<'_, f32>| Row::Exact(row.iter().copied().collect());
        self.rows.extend(keys.outer_iter().zip(values.outer_iter()).map(|(k, v)| [exact(k), exact(v)]));
        self.fresh += keys.nrows();
    }

    /// Keys and values, (S, h) each.
    pub(super) fn read(&self) -> [Array2<f32>; 2] {
        [0, 1].map(|part| {
            let mut numbers = Array2::zeros((self.rows.len(), self.width));
            for (row, mut numbers) in self.rows.iter().zip(numbers.rows_mut()) {
                if let Some(numbers) = numbers.as_slice_mut() {
                    row[part].read_into(numbers);
                }
            }
            numbers
        })
    }

    /// What came in this step, in `bits` a number.
    pub(super) fn settle(&mut self, bits: u8) {
        let first = self.rows.len() - self.fresh.min(self.rows.len());
        (first..self.rows.len()).for_each(|i| self.lower(i, [bits, bits], 0));
        self.fresh = 0;
    }

    /// Key and value of a token in these bits, where they are fewer.
    pub(super) fn lower(&mut self, token: usize, [key, value]: [u8; 2], outliers: usize) {
        self.rows[token][0].lower(key, outliers, self.width);
        self.rows[token][1].lower(value, outliers, self.width);
    }

    /// Drops the tokens for which `keep` says no.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let mut token = 0..;
        self.rows.retain(|_| token.next().is_some_and(&mut keep));
        self.fresh = self.fresh.min(self.rows.len());
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.iter().flatten().map(Row::bytes).sum()
    }
}

/// The rows of all heads of a layer, where all keep what the others keep.
#[derive(Debug)]
pub(super) struct Alike {
    pub(super) heads: Vec<Rows>,
}

impl Alike {
    pub(super) fn new(kv_heads: usize, head_dim: usize) -> Self {
        Self { heads: vec![Rows::new(head_dim); kv_heads] }
    }

    pub(super) fn append(&mut self, keys: ArrayView3<'_, f32>, values: ArrayView3<'_, f32>) {
        for ((head, keys), values) in self.heads.iter_mut().zip(keys.outer_iter()).zip(values.outer_iter()) {
            head.append(keys, values);
        }
    }

    pub(super) fn read(&self, head: usize, positions: Vec<usize>) -> Kept {
        let [keys, values] = self.heads[head].read();
        Kept { keys, values, positions }
    }

    pub(super) fn bytes(&self) -> usize {
        self.heads.iter().map(Rows::bytes).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Packed rows are off by half a step at most, and as large as their codes; the numbers farthest out are kept.
        #[test]
        fn rows_stand_for_what_they_were(
            numbers in prop::collection::vec(-50.0f32..50.0, 1..70), bits in 1u8..=8, outliers in 0usize..4,
        ) {
            let row = Row::rounded(&numbers, bits, outliers);
            let mut read = vec![0.0; numbers.len()];
            row.read_into(&mut read);
            let Row::Steps { least, step, outliers: apart, .. } = &row else { panic!("packed") };
            prop_assert_eq!(apart.len(), outliers.min(numbers.len()));
            prop_assert_eq!(row.bytes(), 4 + (numbers.len() * usize::from(bits)).div_ceil(8) + 4 * apart.len());
            let (least, step) = (least.to_f32(), step.to_f32());
            for (i, (x, y)) in numbers.iter().zip(&read).enumerate() {
                let bound = match apart.iter().any(|&(at, _)| usize::from(at) == i) {
                    true => 0.02,
                    // f16 rounds the least number and the step, the latter once for every level.
                    false => step / 2.0 + least.abs() / 1024.0 + step * f32::from((1u16 << bits) - 1) / 1024.0,
                };
                prop_assert!((x - y).abs() <= bound + 1e-6, "{} for {}", y, x);
            }
        }

        /// Dropping rows leaves the others as they were.
        #[test]
        fn what_is_kept_stays(n in 1usize..20, mask in any::<u32>(), bits in prop::sample::select(vec![3u8, 16, 32])) {
            let numbers = |part: usize| Array2::from_shape_fn((n, 5), |(i, j)| ((i * 7 + j * 3 + part) % 11) as f32 - 4.0);
            let mut rows = Rows::new(5);
            rows.append(numbers(0).view(), numbers(1).view());
            rows.settle(bits);
            let (before, all) = (rows.read(), rows.bytes());
            rows.retain(|i| mask >> i & 1 == 1);
            let kept: Vec<usize> = (0..n).filter(|i| mask >> i & 1 == 1).collect();
            let after = rows.read();
            for part in 0..2 {
                prop_assert_eq!(&after[part], &before[part].select(ndarray::Axis(0), &kept));
            }
            prop_assert_eq!(rows.bytes() * n, all * kept.len());
        }
    }
}
