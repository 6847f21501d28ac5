//! What an MLP puts its hidden numbers through, and what passes back.

use candle_core::cpu::erf::erf_f32;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};
use candle_nn::ops::sigmoid;
use rayon::prelude::*;

use super::exponential::exp;
use super::numbers;
use crate::model::Activation;

/// √(2/π), and the coefficient of the cube, of [`Activation::GeluTanh`].
const TANH: [f32; 2] = [0.797_884_6, 0.044_715];

/// Of x (N, m): a(x).
pub(in crate::runtime) fn activated(activation: Activation, x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { x.contiguous()?.apply_op1_no_bwd(&Plain(activation)) } else { of(activation, x) }
}

/// Rows of m gates, then m values, x (N, 2m) → a(gate) ⊙ value, (N, m); on the CPU.
pub(in crate::runtime) fn gated(activation: Activation, x: &Tensor) -> Result<Tensor> {
    x.apply_op1_no_bwd(&Gated(activation))
}

/// [`gated`] of gates and values that lie apart, (N, m) each; of candle's operations, which on a GPU take several times as long
/// for parts of rows.
pub(in crate::runtime) fn gated_apart(activation: Activation, [gate, value]: &[Tensor; 2]) -> Result<Tensor> {
    of(activation, gate)? * behind(activation, value)?
}

/// Of a(x): x and the gradient (N, m) → (N, m).
pub(in crate::runtime) fn activated_backward(
    activation: Activation,
    x: &Tensor,
    gradient: &Tensor,
) -> Result<Tensor> {
    if x.device().is_cpu() {
        return x.apply_op2_no_bwd(gradient, &PlainBackward(activation));
    }
    let [_, slope] = value_and_slope(activation, x)?;
    gradient * slope
}

/// Of [`gated`]: x (N, 2m) and the gradient (N, m) → (N, 2m); on the CPU.
pub(in crate::runtime) fn gated_backward(
    activation: Activation,
    x: &Tensor,
    gradient: &Tensor,
) -> Result<Tensor> {
    x.apply_op2_no_bwd(gradient, &GatedBackward(activation))
}

/// Of [`gated_apart`]: gates and values and the gradient, (N, m) each → those of gates and of values, (N, m) each.
pub(in crate::runtime) fn gated_apart_backward(
    activation: Activation,
    [gate, value]: &[Tensor; 2],
    gradient: &Tensor,
) -> Result<[Tensor; 2]> {
    let [made, slope] = value_and_slope(activation, gate)?;
    let of_gate = ((gradient * behind(activation, value)?)? * slope)?;
    let of_value = (gradient * made)?;
    let of_value = match activation {
        Activation::Clipped => (of_value * value.abs()?.le(CLIP)?.to_dtype(value.dtype())?)?,
        _ => of_value,
    };
    Ok([of_gate, of_value])
}

/// a(x), of candle's operations.
fn of(activation: Activation, x: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::Relu => x.relu(),
        Activation::ReluSquared => x.relu()?.sqr(),
        Activation::Clipped => {
            let x = x.minimum(CLIP)?;
            &x * sigmoid(&(&x * STEEP)?)?
        }
    }
}

/// What a gate is multiplied by, of the value behind it.
fn behind(activation: Activation, value: &Tensor) -> Result<Tensor> {
    match activation {
        Activation::Clipped => value.clamp(-CLIP, CLIP)? + 1.0,
        _ => Ok(value.clone()),
    }
}

/// Where [`Activation::Clipped`] ends, and how steep it is.
const CLIP: f64 = 7.0;
const STEEP: f64 = 1.702;

/// a(x) and a'(x), of candle's operations.
fn value_and_slope(activation: Activation, x: &Tensor) -> Result<[Tensor; 2]> {
    Ok(match activation {
        Activation::Silu => {
            let share = sigmoid(x)?;
            let made = (x * &share)?;
            let slope = (&made + (share * made.affine(-1.0, 1.0)?)?)?;
            [made, slope]
        }
        Activation::Gelu => {
            let below = (((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)? * 0.5)?;
            let density = ((x.sqr()? * -0.5)?.exp()? * DENSITY)?;
            [(x * &below)?, (below + (x * density)?)?]
        }
        Activation::GeluTanh => {
            let [a, b] = TANH.map(f64::from);
            let t = ((x + (x.powf(3.0)? * b)?)? * a)?.tanh()?;
            let inner = ((x.sqr()? * (3.0 * a * b))? + a)?;
            let (bend, half) = (((1.0 - t.sqr()?)? * inner)?, ((t + 1.0)? * 0.5)?);
            [(x * &half)?, (half + ((x * bend)? * 0.5)?)?]
        }
        Activation::Relu => [x.relu()?, x.gt(0.0)?.to_dtype(x.dtype())?],
        Activation::ReluSquared => {
            let above = x.relu()?;
            [above.sqr()?, (above * 2.0)?]
        }
        Activation::Clipped => {
            let below = x.le(CLIP)?.to_dtype(x.dtype())?;
            let x = x.minimum(CLIP)?;
            let share = sigmoid(&(&x * STEEP)?)?;
            let bend = (((&x * &share)? * (1.0 - &share)?)? * STEEP)?;
            [(x * &share)?, ((share + bend)? * below)?]
        }
    })
}

/// 1/√(2π).
const DENSITY: f64 = 0.398_942_280_401_432_7;

/// a(x) and a'(x).
#[inline(always)]
fn both(activation: Activation, x: f32) -> (f32, f32) {
    match activation {
        Activation::Silu => {
            let share = 1.0 / (1.0 + exp(-x));
            let silu = x * share;
            (silu, share + silu * (1.0 - share))
        }
        Activation::Gelu => {
            let below = 0.5 * (1.0 + erf_f32(x * std::f32::consts::FRAC_1_SQRT_2));
            (x * below, below + x * DENSITY as f32 * exp(-0.5 * x * x))
        }
        Activation::GeluTanh => {
            let [a, b] = TANH;
            // tanh y = 1 − 2 / (e^2y + 1).
            let t = 1.0 - 2.0 / (exp(2.0 * a * (x + b * x * x * x)) + 1.0);
            let bend = (1.0 - t * t) * a * (1.0 + 3.0 * b * x * x);
            (0.5 * x * (1.0 + t), 0.5 * (1.0 + t + x * bend))
        }
        Activation::Relu => (x.max(0.0), if x > 0.0 { 1.0 } else { 0.0 }),
        Activation::ReluSquared => (x.max(0.0) * x.max(0.0), 2.0 * x.max(0.0)),
        Activation::Clipped => {
            let (steep, low) = (STEEP as f32, x.min(CLIP as f32));
            let share = 1.0 / (1.0 + exp(-steep * low));
            let slope = share + steep * low * share * (1.0 - share);
            (low * share, if x > CLIP as f32 { 0.0 } else { slope })
        }
    }
}

/// What a gate is multiplied by, of the value behind it, and its slope.
#[inline(always)]
fn both_behind(activation: Activation, value: f32) -> (f32, f32) {
    match activation {
        Activation::Clipped => {
            let kept = value.clamp(-CLIP as f32, CLIP as f32);
            (kept + 1.0, if kept == value { 1.0 } else { 0.0 })
        }
        _ => (value, 1.0),
    }
}

struct Plain(Activation);

impl CustomOp1 for Plain {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, mut made) = (numbers(storage, layout)?, vec![0.0; layout.shape().elem_count()]);
        let rows = made.par_chunks_mut(ROW).zip(x.par_chunks(ROW));
        rows.for_each(|(made, x)| made.iter_mut().zip(x).for_each(|(made, &x)| *made = both(self.0, x).0));
        Ok((CpuStorage::F32(made), layout.shape().clone()))
    }
}

/// Numbers that a thread takes at a time.
const ROW: usize = 4096;

struct Gated(Activation);

impl CustomOp1 for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, (n, width)) = (numbers(storage, layout)?, layout.shape().dims2()?);
        let m = width / 2;
        let mut made = vec![0.0; n * m];
        made.par_chunks_exact_mut(m).zip(x.par_chunks_exact(width)).for_each(|(made, x)| {
            let (gates, values) = x.split_at(m);
            for ((made, &gate), &value) in made.iter_mut().zip(gates).zip(values) {
                *made = both(self.0, gate).0 * both_behind(self.0, value).0;
            }
        });
        Ok((CpuStorage::F32(made), (n, m).into()))
    }
}

struct PlainBackward(Activation);

impl CustomOp2 for PlainBackward {
    fn name(&self) -> &'static str {
        "activation-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of: &Layout,
        gradient: &CpuStorage,
        at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, gradient) = (numbers(x, of)?, numbers(gradient, at)?);
        let back = x.par_iter().zip(gradient).map(|(&x, gradient)| both(self.0, x).1 * gradient);
        Ok((CpuStorage::F32(back.collect()), of.shape().clone()))
    }
}

struct GatedBackward(Activation);

impl CustomOp2 for GatedBackward {
    fn name(&self) -> &'static str {
        "gated-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        of: &Layout,
        gradient: &CpuStorage,
        at: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, gradient, (n, width)) = (numbers(x, of)?, numbers(gradient, at)?, of.shape().dims2()?);
        let m = width / 2;
        let mut back = vec![0.0; n * width];
        let rows = x.par_chunks_exact(width).zip(gradient.par_chunks_exact(m));
        back.par_chunks_exact_mut(width).zip(rows).for_each(|(back, (x, gradient))| {
            let ((gates, values), (of_gate, of_value)) = (x.split_at(m), back.split_at_mut(m));
            for i in 0..m {
                let ((made, slope), (value, of)) = (both(self.0, gates[i]), both_behind(self.0, values[i]));
                of_gate[i] = gradient[i] * value * slope;
                of_value[i] = gradient[i] * made * of;
            }
        });
        Ok((CpuStorage::F32(back), (n, width).into()))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use proptest::prelude::*;

    use super::*;

    const ALL: [Activation; 6] = [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::ReluSquared,
        Activation::Clipped,
    ];

    fn apart(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
    }

    fn tensor(n: usize, width: usize, seed: usize) -> Tensor {
        let number = |i: usize| ((i * 7919 + seed * 31) % 2001) as f32 / 250.0 - 4.001;
        Tensor::from_vec((0..n * width).map(number).collect(), (n, width), &Device::Cpu).unwrap()
    }

    proptest! {
        /// What other devices compute is what the CPU computes.
        #[test]
        fn both_ways_agree(n in 1usize..6, m in 1usize..40, seed in 0usize..1000, which in 0usize..6) {
            let (a, x, gradient) = (ALL[which], tensor(n, 2 * m, seed), tensor(n, m, seed + 1));
            let parts = [0, m].map(|first| x.narrow(1, first, m).unwrap().contiguous().unwrap());
            prop_assert!(apart(&gated(a, &x).unwrap(), &gated_apart(a, &parts).unwrap()) < 1e-4);
            let back = Tensor::cat(&gated_apart_backward(a, &parts, &gradient).unwrap(), 1).unwrap();
            prop_assert!(apart(&gated_backward(a, &x, &gradient).unwrap(), &back) < 1e-3);
            let [_, value] = parts;
            prop_assert!(apart(&activated(a, &x).unwrap(), &of(a, &x).unwrap()) < 1e-5);
            let [made, slope] = value_and_slope(a, &value).unwrap();
            prop_assert!(apart(&made, &of(a, &value).unwrap()) < 1e-5);
            let back = (&gradient * slope).unwrap();
            let fast = activated_backward(a, &value, &gradient).unwrap();
            prop_assert!(apart(&fast, &back) < 1e-4);
        }

        /// Slopes are those of the values, by differences in f64.
        #[test]
        fn slopes_are_differences(x in -6.0f32..6.0, which in 0usize..6) {
            let a = ALL[which];
            prop_assume!(x.abs() > 0.01);
            let h = 1e-2f32;
            let difference = (f64::from(both(a, x + h).0) - f64::from(both(a, x - h).0)) / f64::from((x + h) - (x - h));
            prop_assert!((difference - f64::from(both(a, x).1)).abs() < 2e-3, "{a:?} at {x}");
        }
    }

    /// Values from their definitions in f64; the Φ of 1 is a tabulated one.
    #[test]
    fn values_are_the_definitions() {
        let close =
            |a: Activation, x: f32, y: f64| assert!((f64::from(both(a, x).0) - y).abs() < 1e-6, "{a:?}");
        close(Activation::Silu, 1.0, 1.0 / (1.0 + (-1.0f64).exp()));
        close(Activation::Gelu, 1.0, 0.841_344_746_068_542_9);
        close(
            Activation::GeluTanh,
            1.0,
            0.5 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * 1.044_715).tanh()),
        );
        close(Activation::Relu, -1.0, 0.0);
        close(Activation::ReluSquared, 3.0, 9.0);
        close(Activation::Clipped, 1.0, 1.0 / (1.0 + (-1.702f64).exp()));
        close(Activation::Clipped, 9.0, 7.0 / (1.0 + (-1.702 * 7.0f64).exp()));
        assert_eq!(both_behind(Activation::Clipped, -9.0), (-6.0, 0.0));
    }
}
