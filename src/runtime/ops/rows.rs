use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, D, DType, InplaceOp2, Layout, Result, Shape, Tensor,
};
use rayon::prelude::*;

use super::numbers;

/// Numbers that a thread takes at a time, in whole rows.
const PART: usize = 1 << 14;

fn rows_of(width: usize) -> usize {
    (PART / width.max(1)).max(1) * width.max(1)
}

/// Rows (N, d) times a number each, (N, 1).
pub(crate) fn weighed(rows: &Tensor, weights: &Tensor) -> Result<Tensor> {
    if rows.device().is_cpu() {
        return rows.contiguous()?.apply_op2_no_bwd(&weights.contiguous()?, &Weighed);
    }
    if is_much(rows) { by_rows(rows, weights) } else { rows.broadcast_mul(weights) }
}

/// Numbers from which to repeat one for each row takes a GPU longer than a dozen launches.
pub(super) const FEW: usize = 1 << 21;

/// Whether rows (N, d) are so many.
fn is_much(rows: &Tensor) -> bool {
    rows.rank() == 2 && rows.elem_count() > FEW
}

/// [`weighed`], where a product with ones repeats the numbers.
fn by_rows(rows: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones((4, rows.dim(1)?), rows.dtype(), rows.device())?;
    rows * in_parts(weights)?.matmul(&ones)?
}

/// Rows (N, d) times a number for each column, (d), which a product with ones repeats.
fn by_columns(rows: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones((rows.dim(0)?, 4), rows.dtype(), rows.device())?;
    rows * ones.matmul(&in_parts(&weights.unsqueeze(1)?)?.t()?)?
}

/// Numbers (…, 1) as sums of rows, (…, 4): products of a GPU round their factors to 11 bits, so two parts keep them; rows of a multiple
/// of 4 lie as products want them.
pub(super) fn in_parts(numbers: &Tensor) -> Result<Tensor> {
    let most = numbers.to_dtype(DType::BF16)?.to_dtype(numbers.dtype())?;
    let (rest, nothing) = ((numbers - &most)?, most.zeros_like()?);
    Tensor::cat(&[&most, &rest, &nothing, &nothing], D::Minus1)
}

struct Weighed;

impl CustomOp2 for Weighed {
    fn name(&self) -> &'static str {
        "weighed"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of_x: &Layout,
        w: &CpuStorage,
        of_w: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, w, (n, d)) = (numbers(x, of_x)?, numbers(w, of_w)?, of_x.shape().dims2()?);
        if w.len() != n {
            candle_core::bail!("{n} rows cannot be weighed by {} numbers", w.len());
        }
        let mut made = vec![0.0; x.len()];
        let part = rows_of(d);
        made.par_chunks_mut(part).zip(x.par_chunks(part).zip(w.par_chunks(part / d.max(1)))).for_each(
            |(made, (x, w))| {
                for ((made, x), w) in made.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(w) {
                    made.iter_mut().zip(x).for_each(|(made, x)| *made = x * w);
                }
            },
        );
        Ok((CpuStorage::F32(made), of_x.shape().clone()))
    }
}

/// Numbers times a factor.
pub(crate) fn times(x: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(x);
    }
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        return x.contiguous()?.apply_op1_no_bwd(&Scaled(factor as f32));
    }
    x.affine(factor, 0.0)
}

struct Scaled(f32);

impl CustomOp1 for Scaled {
    fn name(&self) -> &'static str {
        "scaled"
    }

    fn cpu_fwd(&self, x: &CpuStorage, of_x: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = numbers(x, of_x)?;
        let mut made = vec![0.0; x.len()];
        made.par_chunks_mut(PART).zip(x.par_chunks(PART)).for_each(|(made, x)| {
            made.iter_mut().zip(x).for_each(|(made, x)| *made = x * self.0);
        });
        Ok((CpuStorage::F32(made), of_x.shape().clone()))
    }
}

/// Squared lengths of rows, (N, d) → (N, 1).
pub(crate) fn squared_lengths(rows: &Tensor) -> Result<Tensor> {
    if rows.device().is_cpu() {
        return rows.contiguous()?.apply_op1_no_bwd(&SquaredLengths);
    }
    rows.sqr()?.sum_keepdim(D::Minus1)
}

struct SquaredLengths;

impl CustomOp1 for SquaredLengths {
    fn name(&self) -> &'static str {
        "squared-lengths"
    }

    fn cpu_fwd(&self, x: &CpuStorage, of_x: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, (n, d)) = (numbers(x, of_x)?, of_x.shape().dims2()?);
        let made = x.par_chunks_exact(d).map(|row| dot(row, row)).collect();
        Ok((CpuStorage::F32(made), Shape::from((n, 1))))
    }
}

/// Adds a vector to every row of (…, d), in place.
pub(in crate::runtime) fn add_to_rows(rows: Tensor, vector: &Tensor) -> Result<Tensor> {
    if rows.device().is_cpu() && rows.is_contiguous() {
        rows.inplace_op2(&vector.contiguous()?, &AddToRows)?;
        return Ok(rows);
    }
    rows.broadcast_add(vector)
}

struct AddToRows;

impl InplaceOp2 for AddToRows {
    fn name(&self) -> &'static str {
        "add-to-rows"
    }

    fn cpu_fwd(&self, rows: &mut CpuStorage, at: &Layout, vector: &CpuStorage, of: &Layout) -> Result<()> {
        let vector = numbers(vector, of)?;
        let (CpuStorage::F32(rows), Some((from, to))) = (rows, at.contiguous_offsets()) else {
            candle_core::bail!("rows must be contiguous and f32");
        };
        rows[from..to].par_chunks_mut(rows_of(vector.len())).for_each(|rows| {
            for row in rows.chunks_exact_mut(vector.len()) {
                row.iter_mut().zip(vector).for_each(|(number, more)| *number += more);
            }
        });
        Ok(())
    }
}

/// Of `w ⊙ x / √(mean x² + ε)`: x and the gradient (N, d) → (N, d).
pub(in crate::runtime) fn rms_norm_backward(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    gradient: &Tensor,
) -> Result<Tensor> {
    if x.device().is_cpu() {
        let [x, weight, gradient] = [x, weight, gradient].map(Tensor::contiguous);
        return x?.apply_op3_no_bwd(&weight?, &gradient?, &RmsNormBackward(epsilon));
    }
    rms_norm_backward_by_tensors(x, weight, epsilon, gradient)
}

fn rms_norm_backward_by_tensors(
    x: &Tensor,
    weight: &Tensor,
    epsilon: f32,
    gradient: &Tensor,
) -> Result<Tensor> {
    let scaled =
        if is_much(gradient) { by_columns(gradient, weight)? } else { gradient.broadcast_mul(weight)? };
    let share = (x.sqr()?.mean_keepdim(D::Minus1)? + f64::from(epsilon))?.powf(-0.5)?;
    let along = ((&scaled * x)?.mean_keepdim(D::Minus1)? * share.powf(3.0)?)?;
    weighed(&scaled, &share)? - weighed(x, &along)?
}

struct RmsNormBackward(f32);

impl CustomOp3 for RmsNormBackward {
    fn name(&self) -> &'static str {
        "rms-norm-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of_x: &Layout,
        weight: &CpuStorage,
        of_weight: &Layout,
        gradient: &CpuStorage,
        of_gradient: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, weight, gradient) =
            (numbers(x, of_x)?, numbers(weight, of_weight)?, numbers(gradient, of_gradient)?);
        let d = weight.len();
        if x.len() != gradient.len() || of_x.dims().last() != Some(&d) {
            candle_core::bail!(
                "{:?}, {d} weights and {:?} are of no norm",
                of_x.shape(),
                of_gradient.shape()
            );
        }
        let mut made = vec![0.0; x.len()];
        let part = rows_of(d);
        made.par_chunks_mut(part).zip(x.par_chunks(part).zip(gradient.par_chunks(part))).for_each(
            |(made, (x, gradient))| {
                let rows = x.chunks_exact(d).zip(gradient.chunks_exact(d));
                for (made, (x, gradient)) in made.chunks_exact_mut(d).zip(rows) {
                    made.iter_mut().zip(gradient).zip(weight).for_each(|((made, g), w)| *made = g * w);
                    let share = (dot(x, x) / d as f32 + self.0).sqrt().recip();
                    let along = dot(made, x) / d as f32 * share * share * share;
                    made.iter_mut().zip(x).for_each(|(made, x)| *made = *made * share - x * along);
                }
            },
        );
        Ok((CpuStorage::F32(made), of_x.shape().clone()))
    }
}

/// Sums side by side, which a processor adds at once.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0.0f32; LANES];
    let (parts, others) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f32 = parts.remainder().iter().zip(others.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in parts.zip(others) {
        sums.iter_mut().zip(x).zip(y).for_each(|((sum, x), y)| *sum += x * y);
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    fn numbers(n: usize, d: usize, seed: usize) -> Tensor {
        let values: Vec<f32> =
            (0..n * d).map(|i| ((i * 7919 + seed * 31) % 401) as f32 / 100.0 - 2.0).collect();
        Tensor::from_vec(values, (n, d), &Device::Cpu).unwrap()
    }

    fn apart(one: &Tensor, other: &Tensor) -> f32 {
        (one - other).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
    }

    proptest! {
        /// In one pass what candle's operations make in several, for rows of any number and length.
        #[test]
        fn one_pass_is_several(n in 1usize..90, d in 1usize..700, seed in 0usize..1000) {
            let (x, gradient, weights) = (numbers(n, d, seed), numbers(n, d, seed + 1), numbers(n, 1, seed + 2));
            prop_assert_eq!(apart(&weighed(&x, &weights).unwrap(), &x.broadcast_mul(&weights).unwrap()), 0.0);
            prop_assert_eq!(apart(&times(x.clone(), 0.3).unwrap(), &x.affine(0.3, 0.0).unwrap()), 0.0);
            let squares = x.sqr().unwrap().sum_keepdim(1).unwrap();
            prop_assert!(apart(&(squared_lengths(&x).unwrap() / d as f64).unwrap(), &(squares / d as f64).unwrap()) < 1e-5);
            let vector = numbers(1, d, seed + 3).squeeze(0).unwrap();
            let added = add_to_rows(x.copy().unwrap(), &vector).unwrap();
            prop_assert_eq!(apart(&added, &x.broadcast_add(&vector).unwrap()), 0.0);
            let by_product = (by_rows(&x, &weights).unwrap(), by_columns(&x, &vector).unwrap());
            prop_assert!(apart(&by_product.0, &x.broadcast_mul(&weights).unwrap()) < 1e-5);
            prop_assert!(apart(&by_product.1, &x.broadcast_mul(&vector).unwrap()) < 1e-5);
            let found = rms_norm_backward(&x, &vector, 1e-3, &gradient).unwrap();
            let expected = rms_norm_backward_by_tensors(&x, &vector, 1e-3, &gradient).unwrap();
            let most = expected.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            prop_assert!(apart(&found, &expected) < 1e-5 * (1.0 + most));
        }
    }
}
