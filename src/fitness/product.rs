//! The product of a tile with its own transpose.

/// Columns multiplied at once: 32 heads of them are 64 KiB, which stays in the first caches, and the sums of so
/// few products are right to 1e-7 in f32.
pub(super) const TILE: usize = 512;

/// Rows of a tile come in fours; those without a head are zero.
pub(super) fn padded(n_heads: usize) -> usize {
    n_heads.next_multiple_of(4)
}

/// Adds `X Xᵀ` to the lower triangle of `sum` (n, n), for X (n, [`TILE`]) and n a multiple of four.
#[cfg(feature = "simd")]
pub(super) fn add_gram(tile: &[f32], sum: &mut [f64]) {
    pulp::Arch::new().dispatch(AddGram { tile, sum });
}

/// Adds `X Xᵀ` to `sum` through `ndarray`'s product, which knows nothing of symmetry and packs what need not be packed.
#[cfg(not(feature = "simd"))]
pub(super) fn add_gram(tile: &[f32], sum: &mut [f64]) {
    /// Its sums run one after the other, not in lanes: shorter ones keep their digits.
    const COLUMNS: usize = 128;
    let n = tile.len() / TILE;
    let tile = ndarray::ArrayView2::from_shape((n, TILE), tile).expect("n rows of a tile");
    for part in tile.axis_chunks_iter(ndarray::Axis(1), COLUMNS) {
        let product = part.dot(&part.t());
        sum.iter_mut().zip(&product).for_each(|(sum, &product)| *sum += f64::from(product));
    }
}

#[cfg(feature = "simd")]
struct AddGram<'a> {
    tile: &'a [f32],
    sum: &'a mut [f64],
}

#[cfg(feature = "simd")]
impl pulp::WithSimd for AddGram<'_> {
    type Output = ();

    /// Blocks of 4 × 2 dot products: eight sums and six rows are what sixteen registers hold. No closures: they
    /// would be compiled for the plainest processor.
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) {
        let n = self.tile.len() / TILE;
        let tile = S::as_simd_f32s(self.tile).0;
        let len = TILE / S::F32_LANES;
        for i in (0..n).step_by(4) {
            let rows = &tile[i * len..][..4 * len];
            let (a0, rows) = rows.split_at(len);
            let (a1, rows) = rows.split_at(len);
            let (a2, a3) = rows.split_at(len);
            for j in (0..i + 4).step_by(2) {
                let (b0, b1) = tile[j * len..][..2 * len].split_at(len);
                let mut sums = [[simd.splat_f32s(0.0); 2]; 4];
                for ((((&a0, &a1), (&a2, &a3)), &b0), &b1) in
                    a0.iter().zip(a1).zip(a2.iter().zip(a3)).zip(b0).zip(b1)
                {
                    for (sums, a) in sums.iter_mut().zip([a0, a1, a2, a3]) {
                        sums[0] = simd.mul_add_f32s(a, b0, sums[0]);
                        sums[1] = simd.mul_add_f32s(a, b1, sums[1]);
                    }
                }
                for (row, sums) in sums.into_iter().enumerate() {
                    let out = &mut self.sum[(i + row) * n + j..][..2];
                    out[0] += f64::from(simd.reduce_sum_f32s(sums[0]));
                    out[1] += f64::from(simd.reduce_sum_f32s(sums[1]));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_multiplied_exactly() {
        for n in [4, 8, 12] {
            let tile: Vec<f32> = (0..n * TILE).map(|i| (i * i % 13) as f32 - 6.0).collect();
            let mut sum = vec![1.0; n * n];
            add_gram(&tile, &mut sum);
            for i in 0..n {
                for j in 0..=i {
                    let rows = [i, j].map(|row| &tile[row * TILE..][..TILE]);
                    let dot: f64 = rows[0].iter().zip(rows[1]).map(|(&a, &b)| f64::from(a * b)).sum();
                    assert_eq!(sum[i * n + j], 1.0 + dot, "{n} rows, {i} {j}");
                }
            }
        }
    }
}
