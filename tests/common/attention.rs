//! Whole attention layers, and what merging loses of them by its plain definition: f64, one operator at a time.

use ndarray::{Array1, Array2, Array3, Axis, s};
use ndarray_rand::RandomExt;
use ndarray_rand::rand::SeedableRng;
use ndarray_rand::rand_distr::StandardNormal;
use proptest::prelude::*;
use qcqa::fitness::Residuals;
use qcqa::heads::{Heads, Moment, Pooled, Projection};
use qcqa::model::Rotation;
use qcqa::partition::Partition;
use rand_chacha::ChaCha8Rng;

/// A layer to be made.
#[derive(Debug, Clone)]
pub struct Shape {
    pub seed: u64,
    pub heads: usize,
    /// Query heads of each KV head.
    pub queries: usize,
    pub head_dim: usize,
    pub inputs: usize,
    /// Of queries, keys, values and output.
    pub biases: [bool; 4],
    pub rotation: Rotation,
    /// Tokens that the input moment is measured on; `None`: no moment.
    pub tokens: Option<usize>,
}

impl Shape {
    pub fn new(heads: usize, head_dim: usize, inputs: usize) -> Self {
        let (biases, rotation) = ([false; 4], Rotation::HalfSplit { dims: head_dim / 2 * 2 });
        Self { seed: 1, heads, queries: 1, head_dim, inputs, biases, rotation, tokens: Some(5 * inputs) }
    }

    /// Gaussian weights; d + 1 outputs.
    pub fn layer(&self) -> Heads {
        let (h, d, rng) = (self.head_dim, self.inputs, &mut ChaCha8Rng::seed_from_u64(self.seed));
        let mut projection = |n, bias: bool| {
            let weight = Array3::random_using((n, h, d), StandardNormal, &mut *rng);
            let biases = Array2::random_using((n, h), StandardNormal, &mut *rng);
            Projection::new(weight, bias.then_some(biases)).unwrap()
        };
        let n_q = self.heads * self.queries;
        let [q, k, v, o] = self.biases;
        let (query, key, value) = (projection(n_q, q), projection(self.heads, k), projection(self.heads, v));
        let output = Array3::random_using((n_q, d + 1, h), StandardNormal, &mut *rng);
        let bias = Array1::random_using(d + 1, StandardNormal, &mut *rng);
        let heads = Heads::new(key, value).unwrap().with_queries(query, output).unwrap();
        let heads = if o { heads.with_output_bias(bias).unwrap() } else { heads };
        let heads = heads.with_rotation(self.rotation).unwrap();
        match self.tokens {
            Some(tokens) => {
                heads.with_moment(Moment::new(moment(&inputs(self.seed, d, tokens))).unwrap()).unwrap()
            }
            None => heads,
        }
    }
}

prop_compose! {
    /// Everything that a layer may or may not have.
    pub fn shapes()(
        seed: u64, heads in 2usize..=5, queries in 1usize..=2, head_dim in 1usize..=5, inputs in 2usize..=8,
        biases: [bool; 4], turns in 0usize..=3, interleaved: bool, tokens in prop::option::of(1usize..40),
    ) -> Shape {
        let dims = 2 * turns.min(head_dim / 2);
        let rotation = match (dims, interleaved) {
            (0, _) => Rotation::None,
            (_, true) => Rotation::Interleaved { dims },
            _ => Rotation::HalfSplit { dims },
        };
        Shape { seed, heads, queries, head_dim, inputs, biases, rotation, tokens }
    }
}

prop_compose! {
    /// The same with a partition of its heads.
    pub fn divided()(shape in shapes(), labels: [u8; 5]) -> (Shape, Partition) {
        let labels: Vec<_> = labels[..shape.heads].iter().map(|&l| usize::from(l % 3)).collect();
        let partition = Partition::from_labels(&labels).unwrap();
        (shape, partition)
    }
}

/// Correlated inputs of unequal sizes whose mean is not 0, (tokens, d).
pub fn inputs(seed: u64, d: usize, tokens: usize) -> Array2<f64> {
    let rng = &mut ChaCha8Rng::seed_from_u64(!seed);
    let mix = Array2::<f64>::random_using((d, d), StandardNormal, &mut *rng);
    let mean = Array1::<f64>::random_using(d, StandardNormal, &mut *rng);
    let free = Array2::<f64>::random_using((tokens, d), StandardNormal, &mut *rng);
    free.dot(&mix) + mean
}

/// `E[x̃ x̃ᵀ]` with the constant 1 appended.
pub fn moment(inputs: &Array2<f64>) -> Array2<f64> {
    let ones = Array2::ones((inputs.nrows(), 1));
    let x = ndarray::concatenate![Axis(1), inputs.view(), ones];
    x.t().dot(&x) / inputs.nrows() as f64
}

/// The moment of a layer, or that of white inputs, with a ridge.
pub fn second(heads: &Heads, ridge: f64) -> Array2<f64> {
    let d = heads.key().inputs();
    let mut c = heads.moment().map_or_else(|| Array2::eye(d + 1), |c| c.matrix());
    if heads.moment().is_some() {
        let added = ridge * (0..d).map(|i| c[[i, i]]).sum::<f64>() / d as f64;
        (0..d).for_each(|i| c[[i, i]] += added);
    }
    c
}

/// `C − μ̃ μ̃ᵀ`.
pub fn covariance(c: &Array2<f64>) -> Array2<f64> {
    let mean = c.column(c.ncols() - 1).to_owned();
    c - &(mean.clone().insert_axis(Axis(1)).dot(&mean.insert_axis(Axis(0))))
}

/// Rows of a head with the bias as the last column, (h, d + 1).
pub fn rows(projection: &Projection, head: usize) -> Array2<f64> {
    let (_, h, d) = projection.weight().dim();
    let mut rows = Array2::zeros((h, d + 1));
    rows.slice_mut(s![.., ..d]).assign(&projection.weight().slice(s![head, .., ..]).mapv(f64::from));
    if let Some(bias) = projection.bias() {
        rows.column_mut(d).assign(&bias.row(head).mapv(f64::from));
    }
    rows
}

/// The tensors that attention reads after pooling: as pooled, or where unchanged those of the source.
pub fn read_side<'a>(heads: &'a Heads, pooled: &'a Pooled) -> (&'a Projection, Array3<f64>) {
    let output = pooled.output.as_ref().map(|o| o.view()).or(heads.output()).unwrap();
    (pooled.query.as_ref().or(heads.query()).unwrap(), output.mapv(f64::from))
}

/// `‖C₁^½ A C₂^½‖² = tr(C₁ A C₂ Aᵀ)`.
fn energy(c1: &Array2<f64>, a: &Array2<f64>, c2: &Array2<f64>) -> f64 {
    (&c1.dot(a).dot(c2) * a).sum()
}

/// What each head loses in a merged layer, in squared outputs and scores. Scores are those of independent inputs at
/// uniformly distributed distances: `‖C^½ (q^H κ − q'^H κ') C^½‖² / 2` at each frequency, `‖C^½ (Qᵀ K − Q'ᵀ K') C'^½‖²` in
/// the rest, with C' the covariance. Values count under C, under C' where an output bias can make up for constants.
pub fn losses(heads: &Heads, partition: &Partition, pooled: &Pooled, c: &Array2<f64>) -> Vec<Residuals> {
    losses_between(heads, partition, pooled, c, &covariance(c))
}

fn losses_between(
    heads: &Heads,
    partition: &Partition,
    pooled: &Pooled,
    c: &Array2<f64>,
    centred: &Array2<f64>,
) -> Vec<Residuals> {
    let dims = heads.rotation().dims();
    let (new_query, new_output) = read_side(heads, pooled);
    let output = heads.output().unwrap().mapv(f64::from);
    let identity = Array2::eye(output.dim().1);
    let r = heads.queries_per_head();
    let of_head = |head: usize| {
        let group = partition.group_of(head);
        let (key, shared_key) = (rows(heads.key(), head), rows(&pooled.key, group));
        let (value, shared_value) = (rows(heads.value(), head), rows(&pooled.value, group));
        let mut lost = Residuals::default();
        for q in head * r..(head + 1) * r {
            let pick = |o: &Array3<f64>| o.slice(s![q, .., ..]).to_owned();
            let error = pick(&output).dot(&value) - pick(&new_output).dot(&shared_value);
            let metric = if heads.output_bias().is_some() { centred } else { c };
            lost.values += energy(&identity, &error, metric);
            let (old, new) = (rows(heads.query().unwrap(), q), rows(new_query, q));
            let outer = |q: &Array2<f64>, i: usize, k: &Array2<f64>, j: usize| {
                q.slice(s![i..=i, ..]).t().dot(&k.slice(s![j..=j, ..]))
            };
            for (a, b) in heads.rotation().pairs() {
                let re = |q, k| outer(q, a, k, a) + outer(q, b, k, b);
                let im = |q, k| outer(q, a, k, b) - outer(q, b, k, a);
                lost.keys += 0.5 * energy(c, &(re(&old, &key) - re(&new, &shared_key)), c);
                lost.keys += 0.5 * energy(c, &(im(&old, &key) - im(&new, &shared_key)), c);
            }
            let rest =
                |q: &Array2<f64>, k: &Array2<f64>| q.slice(s![dims.., ..]).t().dot(&k.slice(s![dims.., ..]));
            lost.keys += energy(c, &(rest(&old, &key) - rest(&new, &shared_key)), centred);
        }
        lost
    };
    (0..heads.n_heads()).map(of_head).collect()
}

/// The losses of some heads together.
pub fn sum(losses: &[Residuals], members: &[usize]) -> Residuals {
    members.iter().fold(Residuals::default(), |sum, &head| Residuals {
        values: sum.values + losses[head].values,
        keys: sum.keys + losses[head].keys,
    })
}

/// All that a layer has: what it would lose if its shared heads were 0.
pub fn whole(heads: &Heads, c: &Array2<f64>) -> Residuals {
    whole_between(heads, c, &covariance(c))
}

fn whole_between(heads: &Heads, c: &Array2<f64>, centred: &Array2<f64>) -> Residuals {
    let zero = || {
        let (_, h, d) = heads.key().weight().dim();
        Projection::new(Array3::zeros((1, h, d)), None).unwrap()
    };
    let nothing = Pooled::new(zero(), zero());
    let n = heads.n_heads();
    let all: Vec<_> = (0..n).collect();
    sum(&losses_between(heads, &Partition::one_group(n).unwrap(), &nothing, c, centred), &all)
}

/// How far rounding the shared tensors to f32 may move a loss: relative to the size of the operators themselves, which
/// inputs may not see.
pub fn rounding(heads: &Heads, c: &Array2<f64>, loss: Residuals) -> Residuals {
    let wide = Array2::eye(c.nrows()) * c.diag().sum();
    let size = whole_between(heads, &wide, &wide);
    let bound = |loss: f64, size: f64| 2.0 * (loss.max(0.0) * 1e-12 * size).sqrt() + 1e-12 * size;
    Residuals { values: bound(loss.values, size.values), keys: bound(loss.keys, size.keys) }
}

/// Whether two losses are equal but for rounding.
#[track_caller]
pub fn same_loss(found: Residuals, expected: Residuals, rounding: Residuals) {
    let apart = [(found.values - expected.values).abs(), (found.keys - expected.keys).abs()];
    assert!(apart[0] <= rounding.values, "values: {found:?} {expected:?}, rounding {rounding:?}");
    assert!(apart[1] <= rounding.keys, "keys: {found:?} {expected:?}, rounding {rounding:?}");
}

/// The layer with other keys, values, queries and outputs, and all else as it is.
pub fn with_parts(
    heads: &Heads,
    change: impl FnOnce(&mut Projection, &mut Projection, &mut Projection, &mut Array3<f32>),
) -> Heads {
    let (mut key, mut value) = (heads.key().clone(), heads.value().clone());
    let (mut query, mut output) = (heads.query().unwrap().clone(), heads.output().unwrap().to_owned());
    change(&mut key, &mut value, &mut query, &mut output);
    let new = Heads::new(key, value).unwrap().with_queries(query, output).unwrap();
    let new = new.with_rotation(heads.rotation()).unwrap();
    let new = match heads.output_bias() {
        Some(bias) => new.with_output_bias(bias.to_owned()).unwrap(),
        None => new,
    };
    match heads.moment() {
        Some(moment) => new.with_moment(moment.clone()).unwrap(),
        None => new,
    }
}

/// Rewrites the rows (h, d + 1) of every head, head i from those of head 0.
pub fn from_first(projection: &mut Projection, turn: impl Fn(usize, &Array2<f64>) -> Array2<f64>) {
    let (n, _, d) = projection.weight().dim();
    let first = rows(projection, 0);
    let (mut weight, mut bias) = projection.clone().into_parts();
    for head in 0..n {
        let turned = turn(head, &first).mapv(|v| v as f32);
        weight.slice_mut(s![head, .., ..]).assign(&turned.slice(s![.., ..d]));
        if let Some(bias) = &mut bias {
            bias.row_mut(head).assign(&turned.column(d));
        }
    }
    *projection = Projection::new(weight, bias).unwrap();
}

/// A random map (n, n) for each number, far from singular: the identity and a bit.
pub fn map(seed: u64, n: usize) -> Array2<f64> {
    let noise = Array2::<f64>::random_using((n, n), StandardNormal, &mut ChaCha8Rng::seed_from_u64(seed));
    Array2::eye(n) * 1.5 + noise * (0.8 / (n as f64).sqrt())
}
