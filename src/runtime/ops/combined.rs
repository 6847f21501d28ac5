use candle_core::{CpuStorage, CustomOp2, DType, InplaceOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::{numbers, times};

/// Numbers that a thread takes at a time.
const PART: usize = 1 << 14;

/// `share_x x + share_y y` of two tensors of one shape: on the CPU, in f32, in one pass.
pub(crate) fn combined(x: &Tensor, share_x: f64, y: &Tensor, share_y: f64) -> Result<Tensor> {
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        return x
            .contiguous()?
            .apply_op2_no_bwd(&y.contiguous()?, &Combined([share_x as f32, share_y as f32]));
    }
    let x = times(x.clone(), share_x)?;
    if share_y == -1.0 { x - y } else { x + times(y.clone(), share_y)? }
}

struct Combined([f32; 2]);

impl CustomOp2 for Combined {
    fn name(&self) -> &'static str {
        "combined"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of_x: &Layout,
        y: &CpuStorage,
        of_y: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if of_x.shape() != of_y.shape() {
            candle_core::bail!("{:?} and {:?} cannot be combined", of_x.shape(), of_y.shape());
        }
        let (x, y, [a, b]) = (numbers(x, of_x)?, numbers(y, of_y)?, self.0);
        let mut made = vec![0.0; x.len()];
        made.par_chunks_mut(PART).zip(x.par_chunks(PART).zip(y.par_chunks(PART))).for_each(
            |(made, (x, y))| {
                made.iter_mut().zip(x).zip(y).for_each(|((made, x), y)| *made = a * x + b * y);
            },
        );
        Ok((CpuStorage::F32(made), of_x.shape().clone()))
    }
}

/// A sum in f64 and x in f32 more, of one shape: on the CPU in place and in one pass; nobody else may have the sum.
pub(crate) fn added(sum: Tensor, x: &Tensor) -> Result<Tensor> {
    if sum.device().is_cpu() {
        sum.inplace_op2(&x.contiguous()?, &Added)?;
        return Ok(sum);
    }
    sum + x.to_dtype(DType::F64)?
}

struct Added;

impl InplaceOp2 for Added {
    fn name(&self) -> &'static str {
        "added"
    }

    fn cpu_fwd(&self, sum: &mut CpuStorage, at: &Layout, x: &CpuStorage, of: &Layout) -> Result<()> {
        let (CpuStorage::F64(sum), Some((from, to))) = (sum, at.contiguous_offsets()) else {
            candle_core::bail!("a sum must be contiguous and f64");
        };
        if at.shape() != of.shape() {
            candle_core::bail!("{:?} cannot be added to {:?}", of.shape(), at.shape());
        }
        sum[from..to].par_chunks_mut(PART).zip(numbers(x, of)?.par_chunks(PART)).for_each(|(sum, x)| {
            sum.iter_mut().zip(x).for_each(|(sum, &x)| *sum += f64::from(x));
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn numbers_are_combined_however_they_lie() {
        let x = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap().reshape((2, 3)).unwrap();
        let y = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap().reshape((3, 2)).unwrap().t().unwrap();
        let found: Vec<Vec<f32>> = combined(&x, 2.0, &y, -1.0).unwrap().to_vec2().unwrap();
        assert_eq!(found, [[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]]);
        assert!(combined(&x, 1.0, &x.t().unwrap(), 1.0).is_err());
    }

    #[test]
    fn sums_are_wide_and_in_place() {
        let of = |seed: f32| (Tensor::arange(seed, seed + 40_000.0, &Device::Cpu).unwrap() / 3.0).unwrap();
        let (first, x) =
            (of(1.0).reshape((200, 200)).unwrap(), of(7.0).reshape((200, 200)).unwrap().t().unwrap());
        let sum = first.to_dtype(DType::F64).unwrap();
        let expected: Vec<Vec<f64>> = (&sum + x.to_dtype(DType::F64).unwrap()).unwrap().to_vec2().unwrap();
        let found = added(sum, &x).unwrap();
        assert_eq!(found.to_vec2::<f64>().unwrap(), expected);
        assert!(added(found, &of(0.0)).is_err());
    }
}
