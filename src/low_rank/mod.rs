//! What low-rank sharing knows of a layer: how far the heads of a group can be one head, and what each of them must
//! turn for that.
//!
//! Attention reads keys and values only through queries and outputs, so much of a head may change without changing the
//! model: values by any invertible map that the output undoes, keys by one complex factor for each frequency, which
//! commutes with the rotation and which the query undoes (docs/method.md, "Low-rank sharing"). A group's shared head is
//! the best low-rank fit of all its members under that freedom and under the layer's real inputs.

mod metric;
mod phases;
mod spectra;
mod stack;
mod turn;

use faer::Mat;
use ndarray::{ArrayView3, s};

use crate::error::{Error, Result};
use crate::heads::{Heads, Projection};

pub(crate) use metric::{Metric, no_moment, projection_rows};
pub(crate) use phases::{Phases, PhasesFit};
pub(crate) use spectra::eigenvalues;
pub(crate) use stack::{Fit, Stack};
pub(crate) use turn::{SharedGroup, pool_groups};

/// The ridge of low-rank sharing unless another is asked for: the share of the inputs' mean square that every input has added to it.
pub(crate) const RIDGE: f64 = 1e-2;

/// The values of a layer, weighed by what the outputs `Σ_q O_qᵀ O_q` make of them.
///
/// # Errors
/// [`Error::NoQueries`] for a layer without queries and outputs; [`Error::NotFinite`].
pub(crate) fn values(heads: &Heads, metric: &Metric) -> Result<Stack> {
    let (_, output) = query_side(heads)?;
    let (n, r, h) = (heads.n_heads(), heads.queries_per_head(), heads.value().head_dim());
    let rows = projection_rows(heads.value(), 0..h);
    // A constant over the values passes through attention unchanged: an output bias can make up for it.
    let weighted = match heads.output_bias() {
        Some(_) => metric.centred(&rows),
        None => metric.weigh(&rows),
    };
    let readers = |head: usize| {
        let columns = output.slice(s![head * r..(head + 1) * r, .., ..]).mapv(f64::from);
        let columns = columns.to_shape((columns.len() / h, h)).expect("contiguous");
        let product = columns.t().dot(&columns);
        Mat::from_fn(h, h, |i, j| product[[i, j]])
    };
    Stack::new(rows, weighted, (0..n).map(readers).collect(), || Error::NotFinite {
        what: "output projection".to_string(),
    })
}

/// The keys of a layer, in the parts that may turn differently.
#[derive(Debug)]
pub(crate) struct Keys {
    /// `None` where no dimension is rotated.
    pub(crate) rotated: Option<Phases>,
    /// `None` where all dimensions are.
    pub(crate) unrotated: Option<Stack>,
}

/// The keys of a layer, weighed by what its queries see.
///
/// # Errors
/// As [`values`].
pub(crate) fn keys(heads: &Heads, metric: &Metric) -> Result<Keys> {
    let (query, _) = query_side(heads)?;
    let (n, r, h) = (heads.n_heads(), heads.queries_per_head(), heads.key().head_dim());
    let dims = heads.rotation().dims();
    let rotated = (dims > 0).then(|| {
        let rows = projection_rows(heads.key(), 0..dims);
        let queries = projection_rows(query, 0..dims);
        let weighted = metric.weigh(&rows);
        Phases::new(rows, weighted, &queries, &metric.weigh(&queries), heads.rotation(), r)
    });
    let unrotated = (dims < h).then(|| {
        let rows = projection_rows(heads.key(), dims..h);
        // A constant over the keys cancels in the softmax.
        let weighted = metric.centred(&rows);
        let queries = projection_rows(query, dims..h);
        let seen = metric.weigh(&queries);
        let part = h - dims;
        let readers = |head: usize| {
            (0..r).fold(Mat::zeros(part, part), |sum, q| {
                let at = (head * r + q) * part;
                sum + seen.subrows(at, part) * queries.subrows(at, part).transpose()
            })
        };
        Stack::new(rows, weighted, (0..n).map(readers).collect(), no_moment)
    });
    Ok(Keys { rotated, unrotated: unrotated.transpose()? })
}

/// Queries and outputs, which low-rank sharing turns.
pub(crate) fn query_side(heads: &Heads) -> Result<(&Projection, ArrayView3<'_, f32>)> {
    heads.query().zip(heads.output()).ok_or(Error::NoQueries)
}
