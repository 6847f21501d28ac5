//! Layers to try plugins on.

use ndarray::{Array2, Array3};
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::error::Result;
use crate::heads::{Heads, Moment, Projection};
use crate::model::Rotation;

fn numbers(rng: &mut ChaCha8Rng) -> impl FnMut() -> f32 + '_ {
    || rng.random_range(-1.0..1.0)
}

/// A layer of `n` heads of `h` over `d` inputs, uniform in −1 … 1, with biases if asked for; `seed` tells layers apart.
///
/// # Errors
/// None for dimensions from 1 on.
pub fn layer(seed: u64, n: usize, h: usize, d: usize, bias: bool) -> Result<Heads> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut projection = || {
        let weight = Array3::from_shape_simple_fn((n, h, d), numbers(&mut rng));
        Projection::new(weight, bias.then(|| Array2::from_shape_simple_fn((n, h), numbers(&mut rng))))
    };
    Heads::new(projection()?, projection()?)
}

/// Such a layer with all that a pooler may need: two query heads for each KV head, outputs, half of the dimensions rotated, a
/// moment of correlated inputs.
///
/// # Errors
/// None for dimensions from 1 on.
pub fn heads(n: usize, h: usize, d: usize, bias: bool) -> Result<Heads> {
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    let query = Array3::from_shape_simple_fn((2 * n, h, d), numbers(&mut rng));
    let query_bias = bias.then(|| Array2::from_shape_simple_fn((2 * n, h), numbers(&mut rng)));
    let output = Array3::from_shape_simple_fn((2 * n, d, h), numbers(&mut rng));
    // Moments of twice as many inputs as there are dimensions, the last of which is 1.
    let mut inputs =
        Array2::from_shape_simple_fn((2 * d, d + 1), || f64::from(rng.random_range(-1.0f32..1.0)));
    inputs.column_mut(d).fill(1.0);
    let moment = inputs.t().dot(&inputs) / (2 * d) as f64;
    let dims = h / 2 / 2 * 2;
    layer(5, n, h, d, bias)?
        .with_queries(Projection::new(query, query_bias)?, output)?
        .with_rotation(if dims > 0 { Rotation::HalfSplit { dims } } else { Rotation::None })?
        .with_moment(Moment::new(moment)?)
}
