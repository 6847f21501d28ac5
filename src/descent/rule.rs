use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor};

use crate::run::Precision;
use crate::runtime::{LayerWeights, combined, times};

/// How weights follow their gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Descent {
    /// Momentum made orthogonal (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>); biases by
    /// [`Descent::AdamW`].
    #[default]
    Muon,
    /// As [`Descent::Muon`], but head by head: a fraction of the products, which is what counts where a step reads few tokens.
    MuonByHead,
    /// Adam without decay (Kingma & Ba 2015, arXiv 1412.6980; Loshchilov & Hutter 2019, arXiv 1711.05101).
    AdamW,
}

/// Adam's forgetting of gradients and of their squares, and what keeps it from dividing by 0.
const BETAS: [f64; 2] = [0.9, 0.95];
const EPSILON: f64 = 1e-8;
/// The rate of what is not attention, which goes by Adam, as a share of that of attention.
const REST_RATE: f64 = 0.1;
/// The share of the momentum that a new gradient takes; what is made orthogonal is a like mixture of both.
const FRESH: f64 = 0.05;
/// The root mean square of a step at rate 1, as Adam's steps have it (Liu et al. 2025, arXiv 2502.16982).
const MUON_STEP: f64 = 0.2;
/// Rounds of the iteration that makes a matrix orthogonal, and the polynomial of one.
const ROUNDS: usize = 5;
const POLYNOMIAL: [f64; 3] = [3.4445, -4.7750, 2.0315];

/// What an optimizer remembers of each tensor of a layer, in the order of [`LayerWeights::tensors`]: sums of gradients, and under Adam
/// of their squares, in which older ones fade: means but for a factor. Head by head the first of a layer's matrices has those of all.
pub(crate) type Memory = Vec<Vec<Tensor>>;

impl Descent {
    /// Of a layer that has not moved yet.
    pub(crate) fn memory(self, weights: &LayerWeights) -> Result<Memory> {
        let tensors: Vec<&Tensor> = weights.tensors().collect();
        let of = |(i, tensor): (usize, &&Tensor)| match self {
            Self::MuonByHead if i == 0 => Ok(vec![all_heads(&tensors[..MATRICES])?.zeros_like()?]),
            Self::MuonByHead if self.orthogonal(i) => Ok(Vec::new()),
            _ => (0..if self.orthogonal(i) { 1 } else { 2 }).map(|_| tensor.zeros_like()).collect(),
        };
        tensors.iter().enumerate().map(of).collect()
    }

    /// The weights of a layer after step number `step`, counted from 0, at `rate`.
    pub(crate) fn step(
        self,
        weights: &LayerWeights,
        gradients: &LayerWeights,
        memory: &mut Memory,
        step: u64,
        rate: f64,
    ) -> Result<LayerWeights> {
        let (memories, of) = (std::slice::from_mut(memory), std::slice::from_ref(gradients));
        Ok(self.step_all(&[weights], of, memories, step, rate, Precision::F32)?.swap_remove(0))
    }

    /// The weights of some layers after step number `step`, each as if it were alone; matrices of one shape are made orthogonal at once,
    /// [`Descent::Muon`]'s on a GPU by products of that precision.
    pub(crate) fn step_all(
        self,
        weights: &[&LayerWeights],
        gradients: &[LayerWeights],
        memories: &mut [Memory],
        step: u64,
        rate: f64,
        precision: Precision,
    ) -> Result<Vec<LayerWeights>> {
        // What makes means of Adam's sums is left to the end, where it is one number.
        let [mean, square] = BETAS.map(|beta| (1.0 - beta) / (1.0 - beta.powf(step as f64 + 1.0)));
        let root = square.sqrt();
        let changes = weights.iter().zip(gradients).zip(memories).map(|((weights, gradients), memory)| {
            let gradients: Vec<&Tensor> = gradients.tensors().collect();
            let (matrices, others) = gradients.split_at(if self == Self::AdamW { 0 } else { MATRICES });
            let (of_matrices, of_others) = memory.split_at_mut(matrices.len());
            let mut changes = match self {
                Self::MuonByHead => {
                    let change = ahead(&all_heads(matrices)?, &mut of_matrices[0][0])?;
                    by_heads(&change, matrices, weights.head_dim, -rate)?
                }
                _ => (matrices.iter().zip(of_matrices))
                    .map(|(gradient, memory)| ahead(gradient, &mut memory[0]))
                    .collect::<Result<_>>()?,
            };
            for (&gradient, memory) in others.iter().zip(of_others) {
                for ((sum, new), beta) in
                    memory.iter_mut().zip([gradient.clone(), gradient.sqr()?]).zip(BETAS)
                {
                    *sum = combined(sum, beta, &new, 1.0)?;
                }
                changes.push((&memory[0] / (memory[1].sqrt()? + EPSILON / root)?)?);
            }
            Ok(changes)
        });
        let mut changes: Vec<Vec<Tensor>> = changes.collect::<Result<_>>()?;
        if self == Self::Muon {
            all_orthogonal(&mut changes, -rate, precision)?;
        }
        let moved = weights.iter().zip(changes).map(|(weights, changes)| {
            let (mut changes, attention) = (changes.iter().enumerate(), weights.of_attention());
            weights.map(|weight| match changes.next() {
                Some((i, change)) if self.orthogonal(i) => combined(weight, 1.0, change, 1.0),
                Some((i, change)) => {
                    let rate = if i < attention { rate } else { rate * REST_RATE };
                    combined(weight, 1.0, change, -rate * mean / root)
                }
                None => Ok(weight.clone()),
            })
        });
        moved.collect()
    }

    /// Whether tensor number `i` of a layer moves by an orthogonal matrix.
    fn orthogonal(self, i: usize) -> bool {
        self != Self::AdamW && i < MATRICES
    }
}

/// Matrices of a layer, of which the outputs are the last; biases come after them.
const MATRICES: usize = 4;
const OUTPUTS: usize = MATRICES - 1;

/// Numbers of matrices that are made orthogonal at once.
const AT_ONCE: usize = 1 << 26;

/// What is made orthogonal, but for a factor: the momentum, which takes a gradient in, and that gradient once more.
fn ahead(gradient: &Tensor, momentum: &mut Tensor) -> Result<Tensor> {
    *momentum = combined(momentum, 1.0 - FRESH, gradient, 1.0)?;
    combined(gradient, 1.0, momentum, 1.0 - FRESH)
}

/// [`orthogonal`] of all matrices of some layers, those of one shape side by side.
fn all_orthogonal(layers: &mut [Vec<Tensor>], rate: f64, precision: Precision) -> Result<()> {
    let mut alike: BTreeMap<(usize, usize), Vec<(usize, usize)>> = BTreeMap::new();
    for (layer, tensors) in layers.iter().enumerate() {
        for (i, matrix) in tensors[..MATRICES].iter().enumerate() {
            alike.entry(matrix.dims2()?).or_default().push((layer, i));
        }
    }
    for ((a, b), places) in alike {
        for places in places.chunks((AT_ONCE / (a * b).max(1)).max(1)) {
            let matrices: Vec<&Tensor> = places.iter().map(|&(layer, i)| &layers[layer][i]).collect();
            let turned = orthogonal(&Tensor::stack(&matrices, 0)?, rate, precision)?;
            for (n, &(layer, i)) in places.iter().enumerate() {
                layers[layer][i] = turned.get(n)?;
            }
        }
    }
    Ok(())
}

/// The heads of a layer's matrices as rows, one after the other: rows of queries, keys and values, columns of outputs.
fn all_heads(matrices: &[&Tensor]) -> Result<Tensor> {
    let (outputs, rows) = (matrices[OUTPUTS].t()?.contiguous()?, &matrices[..OUTPUTS]);
    Tensor::cat(&[rows, &[&outputs]].concat(), 0)
}

/// [`orthogonal`] of every one of [`all_heads`], as the matrices lie of which these were.
fn by_heads(all: &Tensor, matrices: &[&Tensor], h: usize, rate: f64) -> Result<Vec<Tensor>> {
    let (rows, d) = all.dims2()?;
    let all = orthogonal(&all.reshape((rows / h, h, d))?, rate, Precision::F32)?.reshape((rows, d))?;
    let mut first = 0;
    let part = |(i, matrix): (usize, &&Tensor)| {
        let rows = matrix.elem_count() / d;
        let part = all.narrow(0, first, rows)?;
        first += rows;
        if i == OUTPUTS { part.t()?.contiguous() } else { Ok(part) }
    };
    matrices.iter().enumerate().map(part).collect()
}

/// Of each of some matrices, (n, a, b), roughly the nearest whose singular values are all 1, by a Newton–Schulz iteration, `rate` times as
/// large as a step of Adam. The iteration is a polynomial of the Gram matrix times the matrix: where that is much longer than
/// wide, the polynomial alone is iterated, on the short side.
fn orthogonal(matrices: &Tensor, rate: f64, precision: Precision) -> Result<Tensor> {
    let (_, a, b) = matrices.dims3()?;
    let wide = if a <= b { matrices.clone() } else { matrices.t()?.contiguous()? };
    // Rows first: on a GPU a sum of all at once is one block's work.
    let length = wide.sqr()?.sum_keepdim(2)?.sum_keepdim(1)?.sqrt()?;
    // So long that the polynomial's last coefficient is 1.
    let size = POLYNOMIAL[2].powf(0.25);
    let x = wide.broadcast_div(&length.affine(size.recip(), 1e-7)?)?;
    // Elsewhere products may be rounded, which the square of a matrix does not bear.
    let exact = x.device().is_cpu();
    let x = match (exact, precision) {
        (true, _) if LONG * a.min(b) <= a.max(b) => by_gram(&x)?,
        (false, Precision::Bf16) => by_rounded(&x)?,
        _ => by_matrix(x)?,
    };
    let x = times(x, rate * MUON_STEP * (a.max(b) as f64).sqrt() / size)?;
    if a <= b { Ok(x) } else { x.t()?.contiguous() }
}

/// How many times longer than wide a matrix is whose Gram matrix is worth the iteration: of a · a numbers four products of a
/// round, of a · b two.
const LONG: usize = 4;

/// Rounds X ← (c₁ + c₃ Y + c₅ Y²) X, Y = X Xᵀ, of and to c₅^¼ X: so Y comes √c₅ times as large, and Y² is as it is wanted.
fn by_matrix(mut x: Tensor) -> Result<Tensor> {
    let [first, third, fifth] = POLYNOMIAL;
    for _ in 0..ROUNDS {
        let y = x.matmul(&x.t()?)?;
        let z = combined(&y, third / fifth.sqrt(), &y.matmul(&y)?, 1.0)?;
        x = combined(&x, first, &z.matmul(&x)?, 1.0)?;
    }
    Ok(x)
}

/// [`by_matrix`] in BF16, which the iteration bears.
fn by_rounded(x: &Tensor) -> Result<Tensor> {
    by_matrix(x.to_dtype(DType::BF16)?)?.to_dtype(x.dtype())
}

/// [`by_matrix`], but P ← (c₁ + c₃ Y + c₅ Y²) P and Y ← (c₁ + c₃ Y + c₅ Y²)² Y, which all commute, then P X.
fn by_gram(x: &Tensor) -> Result<Tensor> {
    let [first, third, fifth] = POLYNOMIAL;
    let mut y = x.matmul(&x.t()?)?;
    let unit = Tensor::eye(y.dim(1)?, y.dtype(), y.device())?.broadcast_as(y.shape())?.contiguous()?;
    let mut all: Option<Tensor> = None;
    for round in 1..=ROUNDS {
        let z = combined(&y, third / fifth.sqrt(), &y.matmul(&y)?, 1.0)?;
        let z = combined(&z, 1.0, &unit, first)?;
        if round < ROUNDS {
            y = z.matmul(&y)?.matmul(&z)?;
        }
        all = Some(all.map_or(Ok(z.clone()), |all| z.matmul(&all))?);
    }
    all.map_or(Ok(x.clone()), |all| all.matmul(x))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use ndarray::Array2;

    use super::*;

    fn numbers(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729 + i * i * 31) % 1009) as f32 / 504.0 - 1.0).collect()
    }

    fn matrix(rows: usize, seed: usize) -> Tensor {
        Tensor::from_vec(numbers(rows * 8, seed), (rows, 8), &Device::Cpu).unwrap()
    }

    #[test]
    fn an_orthogonal_step_has_singular_values_near_one() {
        for (a, b) in [(4, 12), (12, 4)] {
            let matrix = Tensor::from_vec(numbers(a * b, 1), (1, a, b), &Device::Cpu).unwrap();
            let made = orthogonal(&matrix, 1.0, Precision::F32)
                .unwrap()
                .squeeze(0)
                .unwrap()
                .affine(1.0 / (MUON_STEP * 12f64.sqrt()), 0.0)
                .unwrap();
            let turned = made.t().unwrap();
            let square = if a < b { made.matmul(&turned) } else { turned.matmul(&made) };
            let square: Vec<Vec<f32>> = square.unwrap().to_vec2().unwrap();
            for (i, row) in square.iter().enumerate() {
                for (j, &value) in row.iter().enumerate() {
                    let expected = if i == j { 1.0 } else { 0.0 };
                    // The polynomial trades exactness for speed: singular values of 0.7 to 1.2.
                    assert!((value - expected).abs() < 0.5, "{a}x{b}: {value} at {i}, {j}");
                }
            }
        }
    }

    #[test]
    fn both_iterations_are_one() {
        let matrix = Tensor::from_vec(numbers(2 * 3 * 40, 9), (2, 3, 40), &Device::Cpu).unwrap();
        let x = (matrix / 10.0).unwrap();
        let apart = (by_gram(&x).unwrap() - by_matrix(x).unwrap()).unwrap().abs().unwrap().max_all().unwrap();
        assert!(apart.to_scalar::<f32>().unwrap() < 1e-5);
    }

    #[test]
    fn a_rounded_iteration_is_nearly_the_exact_one() {
        let matrix = Tensor::from_vec(numbers(2 * 8 * 24, 3), (2, 8, 24), &Device::Cpu).unwrap();
        let x = (matrix / 20.0).unwrap();
        let (rounded, exact) = (by_rounded(&x).unwrap(), by_matrix(x).unwrap());
        let length = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let apart = length(&(&rounded - &exact).unwrap()) / length(&exact);
        // A round multiplies by up to 3.4 what the one before has rounded.
        assert!(0.0 < apart && apart < 0.15, "{apart}");
    }

    #[test]
    fn heads_one_by_one_are_what_each_is_alone() {
        let of = [matrix(6, 5), matrix(2, 6), matrix(2, 7), matrix(6, 8).t().unwrap().contiguous().unwrap()];
        let matrices: Vec<&Tensor> = of.iter().collect();
        let found = by_heads(&all_heads(&matrices).unwrap(), &matrices, 2, 1.0).unwrap();
        for (i, (of, found)) in of.iter().zip(&found).enumerate() {
            for head in 0..of.elem_count() / 16 {
                let dim = usize::from(i == OUTPUTS);
                let alone = of.narrow(dim, 2 * head, 2).unwrap().contiguous().unwrap().unsqueeze(0).unwrap();
                let alone = orthogonal(&alone, 1.0, Precision::F32).unwrap().squeeze(0).unwrap();
                let apart = (alone - found.narrow(dim, 2 * head, 2).unwrap()).unwrap().abs().unwrap();
                assert!(apart.max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-6, "{i}, {head}");
            }
        }
    }

    #[test]
    fn layers_side_by_side_are_what_each_is_alone() {
        let layer = |kv: usize, seed| LayerWeights {
            matrices: [matrix(8, seed), matrix(kv, seed + 1), matrix(kv, seed + 2), matrix(8, seed + 3)],
            biases: [Some(Tensor::from_vec(numbers(8, seed), 8, &Device::Cpu).unwrap()), None, None, None],
            rest: Vec::new(),
            head_dim: 2,
        };
        let (weights, gradients) = ([layer(4, 1), layer(2, 5)], [layer(4, 9), layer(2, 13)]);
        for descent in [Descent::Muon, Descent::MuonByHead, Descent::AdamW] {
            let memories = || weights.each_ref().map(|weights| descent.memory(weights).unwrap());
            let (mut together, mut alone) = (memories(), memories());
            for step in 0..2 {
                let (weights_of, precision) = (weights.each_ref(), Precision::F32);
                let all =
                    descent.step_all(&weights_of, &gradients, &mut together, step, 0.1, precision).unwrap();
                for (n, all) in all.iter().enumerate() {
                    let one = descent.step(&weights[n], &gradients[n], &mut alone[n], step, 0.1).unwrap();
                    for (all, one) in all.tensors().zip(one.tensors()) {
                        let apart =
                            (all - one).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
                        assert!(apart.to_scalar::<f32>().unwrap() < 1e-6, "{descent:?}, {n}");
                    }
                }
            }
        }
    }

    /// `M ← μ M + (1 − μ) G`, and the step goes by the iteration of `(1 − μ) G + μ M`, over its length at the start.
    #[test]
    fn muon_is_its_definition() {
        let layer = |seed: usize| LayerWeights {
            matrices: [(); 4].map(|()| matrix(3, seed)),
            biases: [None, None, None, None],
            rest: Vec::new(),
            head_dim: 1,
        };
        let of = |numbers: Vec<f32>| Array2::from_shape_vec((3, 8), numbers).unwrap().mapv(f64::from);
        let (mut weights, mut w, mut m) = (layer(1), of(numbers(24, 1)), Array2::<f64>::zeros((3, 8)));
        let mut memory = Descent::Muon.memory(&weights).unwrap();
        for step in 0..3 {
            let g = of(numbers(24, step + 2));
            weights = Descent::Muon.step(&weights, &layer(step + 2), &mut memory, step as u64, 0.1).unwrap();
            m = &m * 0.95 + &g * 0.05;
            let mut x = &g * 0.05 + &m * 0.95;
            x /= x.mapv(|v| v * v).sum().sqrt();
            for _ in 0..5 {
                let y = x.dot(&x.t());
                x = &x * 3.4445 + (&y * -4.7750 + y.dot(&y) * 2.0315).dot(&x);
            }
            w = &w - &(x * (0.1 * 0.2 * 8f64.sqrt()));
            for found in weights.tensors() {
                let apart = of(found.flatten_all().unwrap().to_vec1().unwrap()) - &w;
                assert!(apart.iter().all(|apart| apart.abs() < 1e-5), "{step}: {apart}");
            }
        }
    }

    #[test]
    fn adam_is_its_definition() {
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu).unwrap().reshape((1, 2)).unwrap();
        let layer = |values: &[f32]| LayerWeights {
            matrices: [(); 4].map(|()| tensor(values)),
            biases: [None, None, None, None],
            rest: vec![tensor(values)],
            head_dim: 1,
        };
        let (mut weights, mut memory) = (layer(&[1.0, -2.0]), Vec::new());
        let (mut w, mut m, mut v) = ([1.0f64, -2.0], [0.0f64; 2], [0.0f64; 2]);
        for step in 0..5u64 {
            let gradient = [0.5 - step as f32, 0.25 * step as f32];
            if step == 0 {
                memory = Descent::AdamW.memory(&weights).unwrap();
            }
            weights = Descent::AdamW.step(&weights, &layer(&gradient), &mut memory, step, 0.1).unwrap();
            for i in 0..2 {
                let g = f64::from(gradient[i]);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.95 * v[i] + 0.05 * g * g;
                let power = step as i32 + 1;
                let (mean, square) = (m[i] / (1.0 - 0.9f64.powi(power)), v[i] / (1.0 - 0.95f64.powi(power)));
                w[i] -= 0.1 * mean / (square.sqrt() + 1e-8);
            }
            let found: Vec<Vec<f32>> = weights.matrices[2].to_vec2().unwrap();
            assert!((0..2).all(|i| (f64::from(found[0][i]) - w[i]).abs() < 1e-5), "{found:?}, {w:?}");
        }
    }
}
