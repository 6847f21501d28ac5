use faer::{Mat, MatRef, c64};
use ndarray::{Array1, Array2, Array3, ArrayView3, Axis, s};

use super::{Fit, Metric, PhasesFit, projection_rows, query_side};
use crate::error::{Error, Result};
use crate::heads::{Heads, Pooled, Projection};
use crate::partition::Partition;
use crate::run::map_ordered;

/// A shared head, and what its members must turn to read it.
#[derive(Debug)]
pub(crate) struct SharedGroup {
    /// (h, d+1).
    pub(crate) key: Mat<f64>,
    /// (h, d+1).
    pub(crate) value: Mat<f64>,
    /// One for each member.
    pub(crate) turns: Vec<Turn>,
}

/// How a head reads a shared one.
#[derive(Debug)]
pub(crate) struct Turn {
    /// c_i of each frequency, `κ_i ≈ c_i κ_g`: queries become `conj(c_i) q`.
    pub(crate) phases: Vec<c64>,
    /// `K_i ≈ T_i K_g` in the dimensions that nothing rotates: queries become `T_iᵀ Q`; empty where all are rotated.
    pub(crate) keys: Mat<f64>,
    /// `V_i ≈ T_i V_g`: outputs become `O T_i`.
    pub(crate) values: Mat<f64>,
}

impl SharedGroup {
    /// Puts the parts of a group's shared head together: rotated dimensions come first.
    pub(crate) fn new(values: Fit, rotated: Option<PhasesFit>, unrotated: Option<Fit>) -> Self {
        let (mut phases, mut key_maps) = (Vec::new(), Vec::new());
        let mut key = Mat::zeros(0, values.rows.ncols());
        if let Some(fit) = rotated {
            (key, phases) = (fit.rows, fit.factors);
        }
        if let Some(fit) = unrotated {
            key = faer::concat![[key], [fit.rows]];
            key_maps = fit.maps;
        }
        let mut phases = phases.into_iter();
        let mut key_maps = key_maps.into_iter();
        let turns = values.maps.into_iter().map(|values| Turn {
            phases: phases.next().unwrap_or_default(),
            keys: key_maps.next().unwrap_or_else(Mat::new),
            values,
        });
        let turns = turns.collect();
        Self { key, value: values.rows, turns }
    }
}

/// Pools a layer group by group; groups of one head are copied bit for bit. `metric` gives the means that an output
/// bias makes up for.
pub(crate) fn pool_groups(
    heads: &Heads,
    partition: &Partition,
    metric: &Metric,
    share: impl Fn(&[usize]) -> Result<SharedGroup> + Sync + Send,
) -> Result<Pooled> {
    if partition.n_heads() != heads.n_heads() {
        return Err(Error::PartitionSize { expected: heads.n_heads(), found: partition.n_heads() });
    }
    let (query, output) = query_side(heads)?;
    let (groups, r) = (partition.groups(), heads.queries_per_head());
    let (mut queries, query_bias) = query.clone().into_parts();
    let (mut query_bias, mut outputs) = (query_bias, output.to_owned());
    let mut output_bias = heads.output_bias().map(|bias| bias.mapv(f64::from));
    let h = heads.value().head_dim();
    let values = output_bias.as_ref().map(|_| projection_rows(heads.value(), 0..h));
    let mut key = Filled::new(heads.key(), groups.len());
    let mut value = Filled::new(heads.value(), groups.len());
    let turned = map_ordered(groups.len(), |g| -> Result<_> {
        let members = &groups[g];
        if members.len() < 2 {
            return Ok(None);
        }
        let shared = share(members)?;
        let of_head = |(&head, turn): (&usize, &Turn)| {
            let lost = values
                .as_ref()
                .map(|values| turn.lost_mean(metric, values.subrows(head * h, h), &shared.value));
            TurnedHead::new(heads, query, output, head, turn, lost)
        };
        let of_heads: Vec<TurnedHead> = members.iter().zip(&shared.turns).map(of_head).collect();
        Ok(Some((shared, of_heads)))
    });
    for (g, (members, turned)) in groups.iter().zip(turned).enumerate() {
        let Some((shared, of_heads)) = turned? else {
            key.copy(g, heads.key(), members[0]);
            value.copy(g, heads.value(), members[0]);
            continue;
        };
        key.set(g, shared.key.as_ref());
        value.set(g, shared.value.as_ref());
        for (&head, turned) in members.iter().zip(of_heads) {
            let own = s![head * r..(head + 1) * r, .., ..];
            queries.slice_mut(own).assign(&turned.queries);
            outputs.slice_mut(own).assign(&turned.outputs);
            if let (Some(all), Some(bias)) = (&mut query_bias, turned.query_bias) {
                all.slice_mut(s![head * r..(head + 1) * r, ..]).assign(&bias);
            }
            if let Some(bias) = &mut output_bias {
                turned.made_up.iter().for_each(|made_up| *bias += made_up);
            }
        }
    }
    let output_bias = output_bias.map(|bias| bias.mapv(|v| v as f32));
    Ok(Pooled {
        key: key.finish()?,
        value: value.finish()?,
        query: Some(Projection::new(queries, query_bias)?),
        output: Some(outputs),
        output_bias,
    })
}

/// What becomes of the query heads of one KV head.
struct TurnedHead {
    queries: Array3<f32>,
    query_bias: Option<Array2<f32>>,
    outputs: Array3<f32>,
    /// What the output bias makes up for, one for each query head; empty without one.
    made_up: Vec<Array1<f64>>,
}

impl TurnedHead {
    /// `lost` is the mean of what the head's values lose, where there is an output bias.
    fn new(
        heads: &Heads,
        query: &Projection,
        output: ArrayView3<'_, f32>,
        head: usize,
        turn: &Turn,
        lost: Option<Array1<f64>>,
    ) -> Self {
        let r = heads.queries_per_head();
        let own = s![head * r..(head + 1) * r, .., ..];
        let (mut queries, output) = (query.weight().slice(own).to_owned(), output.slice(own));
        queries.outer_iter_mut().for_each(|mut rows| turn.query(heads, &mut rows));
        let query_bias = query.bias().map(|bias| {
            let mut bias = bias.slice(s![head * r..(head + 1) * r, ..]).to_owned();
            bias.outer_iter_mut().for_each(|bias| turn.query(heads, &mut bias.insert_axis(Axis(1))));
            bias
        });
        let made_up =
            |lost: Array1<f64>| output.outer_iter().map(|o| o.mapv(f64::from).dot(&lost)).collect::<Vec<_>>();
        let made_up = lost.map(made_up).unwrap_or_default();
        let mut outputs = output.to_owned();
        outputs.outer_iter_mut().for_each(|mut columns| turn.output(&mut columns));
        Self { queries, query_bias, outputs, made_up }
    }
}

impl Turn {
    /// Turns the rows (h, n) of one query head: n inputs, or its bias.
    fn query(&self, heads: &Heads, rows: &mut ndarray::ArrayViewMut2<'_, f32>) {
        let dims = heads.rotation().dims();
        let old = rows.mapv(f64::from);
        for ((a, b), c) in heads.rotation().pairs().zip(&self.phases) {
            for column in 0..old.ncols() {
                let (re, im) = (old[[a, column]], old[[b, column]]);
                rows[[a, column]] = (c.re * re + c.im * im) as f32;
                rows[[b, column]] = (c.re * im - c.im * re) as f32;
            }
        }
        let part = self.keys.nrows();
        for (row, column) in (0..part).flat_map(|row| (0..old.ncols()).map(move |column| (row, column))) {
            let sum: f64 = (0..part).map(|i| self.keys[(i, row)] * old[[dims + i, column]]).sum();
            rows[[dims + row, column]] = sum as f32;
        }
    }

    /// `(V_i − T_i V_g) μ̃`, (h).
    fn lost_mean(&self, metric: &Metric, own: MatRef<'_, f64>, shared: &Mat<f64>) -> Array1<f64> {
        Array1::from(metric.means(&(own - &self.values * shared)))
    }

    /// Turns the columns (D, h) of one output head.
    fn output(&self, columns: &mut ndarray::ArrayViewMut2<'_, f32>) {
        let (rows, h) = columns.dim();
        let old = Mat::from_fn(rows, h, |i, j| f64::from(columns[[i, j]]));
        let new = old * &self.values;
        columns.indexed_iter_mut().for_each(|((i, j), v)| *v = new[(i, j)] as f32);
    }
}

/// A projection that fills up group by group.
struct Filled {
    weight: Array3<f32>,
    bias: Option<Array2<f32>>,
}

impl Filled {
    fn new(source: &Projection, groups: usize) -> Self {
        let (_, h, d) = source.weight().dim();
        let bias = source.bias().map(|_| Array2::zeros((groups, h)));
        Self { weight: Array3::zeros((groups, h, d)), bias }
    }

    fn copy(&mut self, group: usize, source: &Projection, head: usize) {
        self.weight.slice_mut(s![group, .., ..]).assign(&source.weight().slice(s![head, .., ..]));
        if let (Some(bias), Some(of)) = (&mut self.bias, source.bias()) {
            bias.slice_mut(s![group, ..]).assign(&of.slice(s![head, ..]));
        }
    }

    fn set(&mut self, group: usize, rows: MatRef<'_, f64>) {
        let d = self.weight.dim().2;
        for ((row, column), v) in self.weight.slice_mut(s![group, .., ..]).indexed_iter_mut() {
            *v = rows[(row, column)] as f32;
        }
        if let Some(bias) = &mut self.bias {
            bias.slice_mut(s![group, ..])
                .iter_mut()
                .enumerate()
                .for_each(|(row, v)| *v = rows[(row, d)] as f32);
        }
    }

    fn finish(self) -> Result<Projection> {
        Projection::new(self.weight, self.bias)
    }
}
