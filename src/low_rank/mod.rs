//! What low-rank sharing knows of a layer: how far the heads of a group can be one head, and what each of them must
//! turn for that.
//!
//! Attention reads keys and values only through queries and outputs, so much of a head may change without changing the
//! model: values by any invertible map that the output undoes, keys by one complex factor for each frequency, which
//! commutes with the rotation and which the query undoes (docs/method.md, "Low-rank sharing"). A group's shared head is
//! the best low-rank fit of all its members under that freedom and under the layer's real inputs.

mod layout;
mod metric;
mod phases;
mod spectra;
mod stack;
mod turn;

use faer::Mat;
use ndarray::{ArrayView3, s};

use crate::error::{Error, Result};
use crate::heads::{Heads, Projection};
use crate::model::NormOver;
use crate::run::map_ordered;

#[cfg(feature = "runtime")]
pub(crate) use layout::from_rows;
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
    Stack::new(rows, weighted, map_ordered(n, readers), || Error::NotFinite {
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
    /// Where a norm follows: the length of each head, by which its rows were divided.
    lengths: Option<Vec<f64>>,
}

/// Rounds in which keys under a norm are turned towards one another.
const ROUNDS: usize = 8;

impl Keys {
    /// The best shared key of a group under the freedom that its queries have.
    pub(crate) fn fit(&self, members: &[usize]) -> Result<(Option<PhasesFit>, Option<Fit>)> {
        if self.lengths.is_some() {
            return self.align(members, ROUNDS);
        }
        let rotated = self.rotated.as_ref().map(|k| k.fit(members)).transpose()?;
        Ok((rotated, self.unrotated.as_ref().map(|k| k.fit(members)).transpose()?))
    }

    /// The mean of a group's keys, turned towards one another. Under a norm only what rotates may turn.
    pub(crate) fn align(&self, members: &[usize], rounds: usize) -> Result<(Option<PhasesFit>, Option<Fit>)> {
        let mut rotated = self.rotated.as_ref().map(|k| k.align(members, rounds)).transpose()?;
        let Some(lengths) = &self.lengths else {
            return Ok((rotated, self.unrotated.as_ref().map(|k| k.align(members, rounds)).transpose()?));
        };
        let length = members.iter().map(|&head| lengths[head]).sum::<f64>() / members.len() as f64;
        if let Some(fit) = &mut rotated {
            fit.rows *= faer::Scale(length);
        }
        Ok((rotated, self.unrotated.as_ref().map(|k| k.mean(members, length))))
    }
}

/// The keys of a layer, weighed by what its queries see. Where a norm of each head follows, its length counts for nothing: heads
/// of keys and of queries are taken at length 1 under the metric.
///
/// # Errors
/// As [`values`].
pub(crate) fn keys(heads: &Heads, metric: &Metric) -> Result<Keys> {
    let query = heads.weighing().ok_or(Error::NoQueries)?;
    let (n, r, h) = (heads.n_heads(), heads.queries_per_head(), heads.key().head_dim());
    let dims = heads.rotation().dims();
    let normed = heads.key_norm().is_some();
    let apart = matches!(heads.key_norm(), Some(NormOver::Head | NormOver::OwnHead));
    let lengths = |of: &Projection| if apart { lengths(of, metric) } else { vec![1.0; of.n_heads()] };
    let of_keys = normed.then(|| lengths(heads.key()));
    let of_queries = normed.then(|| lengths(query));
    let part_of = |of: &Projection, lengths: &Option<Vec<f64>>, part: std::ops::Range<usize>| {
        let (mut rows, block) = (projection_rows(of, part.clone()), part.len());
        for (head, length) in lengths.iter().flatten().enumerate() {
            let mut own = rows.subrows_mut(head * block, block);
            own *= faer::Scale(length.recip());
        }
        rows
    };
    let rotated = (dims > 0).then(|| {
        let rows = part_of(heads.key(), &of_keys, 0..dims);
        let queries = part_of(query, &of_queries, 0..dims);
        let weighted = metric.weigh(&rows);
        Phases::new(rows, weighted, &queries, &metric.weigh(&queries), heads.rotation(), r)
    });
    let unrotated = (dims < h).then(|| {
        let rows = part_of(heads.key(), &of_keys, dims..h);
        // A constant over the keys cancels in the softmax; not under a norm.
        let weighted = if normed { metric.weigh(&rows) } else { metric.centred(&rows) };
        let queries = part_of(query, &of_queries, dims..h);
        let seen = metric.weigh(&queries);
        let part = h - dims;
        let readers = |head: usize| {
            (0..r).fold(Mat::zeros(part, part), |sum, q| {
                let at = (head * r + q) * part;
                sum + seen.subrows(at, part) * queries.subrows(at, part).transpose()
            })
        };
        Stack::new(rows, weighted, map_ordered(n, readers), no_moment)
    });
    Ok(Keys { rotated, unrotated: unrotated.transpose()?, lengths: of_keys })
}

/// The root mean square of each head's numbers over the inputs; 1 of a head that is 0.
fn lengths(projection: &Projection, metric: &Metric) -> Vec<f64> {
    let (h, n) = (projection.head_dim(), projection.n_heads());
    let rows = projection_rows(projection, 0..h);
    let seen = metric.weigh(&rows);
    let square = |row: usize| (0..rows.ncols()).map(|i| rows[(row, i)] * seen[(row, i)]).sum::<f64>();
    let length =
        |head: usize| ((head * h..(head + 1) * h).map(square).sum::<f64>() / h as f64).max(0.0).sqrt();
    (0..n).map(length).map(|length| if length > 0.0 { length } else { 1.0 }).collect()
}

/// Queries and outputs, which low-rank sharing turns.
pub(crate) fn query_side(heads: &Heads) -> Result<(&Projection, ArrayView3<'_, f32>)> {
    heads.query().zip(heads.output()).ok_or(Error::NoQueries)
}
