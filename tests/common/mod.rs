//! What several tests need: layers to work on, and the plain definitions to hold results against.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share of this")]

#[cfg(feature = "linalg")]
pub mod attention;

use ndarray::{Array2, Array3, Axis};
use ndarray_rand::RandomExt;
use ndarray_rand::rand::SeedableRng;
use ndarray_rand::rand_distr::{Distribution, StandardNormal, Uniform};
use qcqa::heads::{Heads, Projection};
use qcqa::model::{Architecture, AttentionSpec, ModelId};
use qcqa::partition::Partition;
use rand_chacha::ChaCha8Rng;

/// A layer of Gaussian heads, with biases if asked for.
pub fn layer(seed: u64, heads: usize, head_dim: usize, inputs: usize, bias: bool) -> Heads {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut projection = || {
        let weight = Array3::random_using((heads, head_dim, inputs), StandardNormal, &mut rng);
        let bias = bias.then(|| Array2::random_using((heads, head_dim), StandardNormal, &mut rng));
        Projection::new(weight, bias).unwrap()
    };
    Heads::new(projection(), projection()).unwrap()
}

/// A layer of small whole numbers: every sum and product of them is exact, on any machine.
pub fn integer_layer(seed: u64, heads: usize, head_dim: usize, inputs: usize) -> Heads {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let digits = Uniform::new_inclusive(-4i32, 4).unwrap();
    let mut projection = || {
        let weight =
            Array3::from_shape_simple_fn((heads, head_dim, inputs), || digits.sample(&mut rng) as f32);
        Projection::new(weight, None).unwrap()
    };
    Heads::new(projection(), projection()).unwrap()
}

/// The weight-sharing error by its definition, f64, from the weights themselves.
pub fn plain_wse(heads: &Heads, partition: &Partition) -> f64 {
    let mut error = 0.0;
    for projection in [heads.key(), heads.value()] {
        let (n, h, d) = projection.weight().dim();
        // The bias as one more input column.
        let mut rows = Array3::<f64>::zeros((n, h, d + 1));
        rows.slice_mut(ndarray::s![.., .., ..d]).assign(&projection.weight().mapv(f64::from));
        if let Some(bias) = projection.bias() {
            rows.slice_mut(ndarray::s![.., .., d]).assign(&bias.mapv(f64::from));
        }
        for group in partition.groups() {
            let members = rows.select(Axis(0), &group);
            let mean = members.mean_axis(Axis(0)).unwrap();
            error += members.outer_iter().map(|m| (&m - &mean).mapv(|x| x * x).sum()).sum::<f64>();
        }
    }
    error
}

/// All partitions of n heads, by their restricted growth strings.
pub fn all_partitions(n: usize) -> Vec<Partition> {
    fn grow(labels: &mut Vec<usize>, groups: usize, n: usize, found: &mut Vec<Partition>) {
        if labels.len() == n {
            found.push(Partition::from_labels(labels).unwrap());
            return;
        }
        for label in 0..=groups {
            labels.push(label);
            grow(labels, groups.max(label + 1), n, found);
            labels.pop();
        }
    }
    let mut found = Vec::new();
    grow(&mut Vec::new(), 0, n, &mut found);
    found
}

/// What a plan says of tensors without a checkpoint.
pub fn source(layers: usize, heads: usize, head_dim: usize, hidden: usize) -> ModelId {
    let layers = vec![AttentionSpec::new(heads, heads, head_dim); layers];
    ModelId::new(&Architecture::new("raw", hidden, layers), "f32", None)
}
