//! Sums of squares of a layer's inputs, where these are.

use candle_core::{DType, Tensor};
use faer::linalg::matmul::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, Mat, Par};
use ndarray::Array2;

use crate::text::RuntimeError;

/// `Σ x̃ x̃ᵀ` of inputs with a constant 1 appended, (d+1)², in f64.
#[derive(Debug)]
pub(super) enum Sum {
    /// In memory, its lower half.
    Here(Mat<f64>),
    /// On a GPU, where it is added up: it is fetched once.
    There(Tensor),
}

impl Sum {
    /// Of the first inputs, (N, d).
    pub(super) fn new(x: &Tensor) -> Result<Self, RuntimeError> {
        if x.device().is_cpu() {
            let size = x.dims2()?.1 + 1;
            let mut sum = Self::Here(Mat::zeros(size, size));
            sum.add(x)?;
            return Ok(sum);
        }
        Ok(Self::There(square(x)?))
    }

    /// More inputs, (N, d).
    pub(super) fn add(&mut self, x: &Tensor) -> Result<(), RuntimeError> {
        match self {
            Self::There(sum) => *sum = (&*sum + square(x)?)?,
            Self::Here(sum) => {
                let x = with_ones(x)?;
                let (half, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
                let par = Par::rayon(0);
                triangular::matmul(sum, half, Accum::Add, x.transpose(), whole, &x, whole, 1.0, par);
            }
        }
        Ok(())
    }

    /// Its mean over some tokens; `None` where it is not finite.
    pub(super) fn mean(self, tokens: usize) -> Result<Option<Array2<f64>>, RuntimeError> {
        let size = match &self {
            Self::Here(sum) => sum.nrows(),
            Self::There(sum) => sum.dims2()?.0,
        };
        let mean = match self {
            Self::Here(sum) => {
                Array2::from_shape_fn((size, size), |(j, k)| sum[(j.max(k), j.min(k))] / tokens as f64)
            }
            Self::There(sum) => {
                let sum = sum.flatten_all()?.to_vec1::<f64>()?;
                let at = |(j, k): (usize, usize)| sum[j.max(k) * size + j.min(k)] / tokens as f64;
                Array2::from_shape_fn((size, size), at)
            }
        };
        Ok(mean.iter().all(|v| v.is_finite()).then_some(mean))
    }
}

/// `Σ x̃ ỹᵀ` of the inputs of two layers at the same tokens with a constant 1 appended, (d+1)², in f64.
#[derive(Debug)]
pub(super) enum CrossSum {
    /// In memory.
    Here(Mat<f64>),
    /// On a GPU.
    There(Tensor),
}

impl CrossSum {
    /// Of the first inputs, (N, d) both.
    pub(super) fn new(x: &Tensor, y: &Tensor) -> Result<Self, RuntimeError> {
        if x.device().is_cpu() {
            let size = x.dims2()?.1 + 1;
            let mut sum = Self::Here(Mat::zeros(size, size));
            sum.add(x, y)?;
            return Ok(sum);
        }
        Ok(Self::There(product(x, y)?))
    }

    /// More inputs, (N, d) both.
    pub(super) fn add(&mut self, x: &Tensor, y: &Tensor) -> Result<(), RuntimeError> {
        match self {
            Self::There(sum) => *sum = (&*sum + product(x, y)?)?,
            Self::Here(sum) => {
                matmul(sum, Accum::Add, with_ones(x)?.transpose(), &with_ones(y)?, 1.0, Par::rayon(0))
            }
        }
        Ok(())
    }

    /// Its mean over some tokens.
    pub(super) fn mean(self, tokens: usize) -> Result<Array2<f64>, RuntimeError> {
        Ok(match self {
            Self::Here(sum) => {
                Array2::from_shape_fn((sum.nrows(), sum.ncols()), |(i, j)| sum[(i, j)] / tokens as f64)
            }
            Self::There(sum) => {
                let ((n, m), numbers) = (sum.dims2()?, sum.flatten_all()?.to_vec1::<f64>()?);
                Array2::from_shape_fn((n, m), |(i, j)| numbers[i * m + j] / tokens as f64)
            }
        })
    }
}

/// Inputs (N, d) with a constant 1 appended, (N, d+1).
fn with_ones(x: &Tensor) -> Result<Mat<f64>, RuntimeError> {
    let ((n, d), numbers) = (x.dims2()?, x.flatten_all()?.to_vec1::<f32>()?);
    Ok(Mat::from_fn(n, d + 1, |t, j| if j < d { f64::from(numbers[t * d + j]) } else { 1.0 }))
}

fn product(x: &Tensor, y: &Tensor) -> Result<Tensor, RuntimeError> {
    let wide = |x: &Tensor| -> Result<Tensor, RuntimeError> {
        let ones = Tensor::ones((x.dims2()?.0, 1), DType::F64, x.device())?;
        Ok(Tensor::cat(&[&x.to_dtype(DType::F64)?, &ones], 1)?)
    };
    Ok(wide(x)?.t()?.matmul(&wide(y)?)?)
}

fn square(x: &Tensor) -> Result<Tensor, RuntimeError> {
    product(x, x)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// What a GPU adds up is what the CPU adds up.
    #[test]
    fn both_ways_agree() -> Result<(), RuntimeError> {
        let parts = [5, 3].map(|n| Tensor::randn(0f32, 1.0, (n, 4), &Device::Cpu).unwrap());
        let (mut here, mut there) = (Sum::new(&parts[0])?, Sum::There(square(&parts[0])?));
        here.add(&parts[1])?;
        there.add(&parts[1])?;
        let (here, there) = (here.mean(8)?.unwrap(), there.mean(8)?.unwrap());
        assert!((&here - &there).iter().all(|off| off.abs() < 1e-12), "{here} {there}");
        assert_eq!(here[[4, 4]], 1.0);
        let infinite = Tensor::full(f32::INFINITY, (1, 4), &Device::Cpu)?;
        assert!(Sum::new(&infinite)?.mean(1)?.is_none());
        let (mut here, mut there) =
            (CrossSum::new(&parts[0], &parts[0])?, CrossSum::There(product(&parts[0], &parts[0])?));
        let other = parts[1].affine(2.0, 1.0)?;
        here.add(&parts[1], &other)?;
        there.add(&parts[1], &other)?;
        let (here, there) = (here.mean(8)?, there.mean(8)?);
        assert!((&here - &there).iter().all(|off| off.abs() < 1e-12), "{here} {there}");
        Ok(())
    }
}
