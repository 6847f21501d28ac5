use faer::linalg::solvers::{Llt, Solve};
use faer::linalg::triangular_solve::solve_upper_triangular_in_place;
use faer::{Mat, Par, Side};
use ndarray::Array2;

use crate::error::{Error, Result};
use crate::heads::{CrossMoment, Heads, Projection};
use crate::low_rank::{RIDGE, no_moment, projection_rows};

/// What is known of the inputs of two neighbouring layers, `C_ll`, `C_uu` and `C_ul`, with the ridge of low-rank sharing on the
/// former two.
pub(super) struct Inputs {
    /// Of `C_ll`, (d+1)², and without the constant, (d)².
    lower: [Llt<f64>; 2],
    /// Of `C_uu`, (d+1)².
    upper: Llt<f64>,
    cross: Mat<f64>,
}

impl Inputs {
    /// Of layers that carry their moments.
    pub(super) fn new(lower: &Heads, upper: &Heads, cross: &CrossMoment) -> Result<Self> {
        let of = |heads: &Heads| -> Result<Mat<f64>> {
            let moment = heads.moment().ok_or(Error::NoMoment)?.matrix();
            let d = moment.nrows() - 1;
            let added = RIDGE * moment.diag().iter().take(d).sum::<f64>() / d as f64;
            Ok(Mat::from_fn(d + 1, d + 1, |i, j| moment[[i, j]] + if i == j && i < d { added } else { 0.0 }))
        };
        let (below, above, cross) = (of(lower)?, of(upper)?, cross.matrix());
        if below.nrows() != cross.nrows() || above.nrows() != cross.nrows() {
            let size = below.nrows();
            return Err(Error::shape("joint moment", &[size, size], cross.shape()));
        }
        let root = |of: faer::MatRef<'_, f64>| of.llt(Side::Lower).map_err(|_| no_moment());
        let d = below.nrows() - 1;
        Ok(Self {
            lower: [root(below.as_ref())?, root(below.submatrix(0, 0, d, d))?],
            upper: root(above.as_ref())?,
            cross: Mat::from_fn(d + 1, d + 1, |i, j| cross[[i, j]]),
        })
    }

    /// The upper layer's heads as the best linear functions of the lower input, `W C_ul C_ll⁻¹`: with the constant where they have
    /// biases that can take it, else of the inputs alone.
    pub(super) fn predicted(&self, heads: &Projection) -> Result<Projection> {
        let (h, biased) = (heads.head_dim(), heads.bias().is_some());
        let rows = projection_rows(heads, 0..h);
        let d = rows.ncols() - 1;
        // Transposed: what is solved for are columns.
        let seen = (&rows * &self.cross).transpose().to_owned();
        let found = match biased {
            true => self.lower[0].solve(&seen),
            false => self.lower[1].solve(seen.subrows(0, d)),
        };
        let number = |(row, column): (usize, usize)| match column < found.nrows() {
            true => found[(column, row)] as f32,
            false => 0.0,
        };
        Projection::from_augmented(&Array2::from_shape_fn((rows.nrows(), d + 1), number), h, biased)
    }

    /// Queries that see of the lower input what these see of their own: with `C = L Lᵀ`, `q L_uu L_ll⁻¹`, for which
    /// `q' C_ll q'ᵀ = q C_uu qᵀ`. Of queries without biases they have none, since L is triangular and the constant comes last.
    pub(super) fn weighing(&self, queries: &Projection) -> Result<Projection> {
        let h = queries.head_dim();
        let rows = projection_rows(queries, 0..h);
        let mut columns = (&rows * self.upper.L()).transpose().to_owned();
        solve_upper_triangular_in_place(self.lower[0].L().transpose(), columns.as_mut(), Par::Seq);
        let number = |(row, column): (usize, usize)| columns[(column, row)] as f32;
        let rows = Array2::from_shape_fn((rows.nrows(), columns.nrows()), number);
        Projection::from_augmented(&rows, h, queries.bias().is_some())
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array3, s};
    use rand::Rng;

    use super::*;
    use crate::heads::Moment;
    use crate::run::Run;

    /// Inputs of both layers, (tokens, d+1), and their moments.
    fn inputs(d: usize, tokens: usize) -> ([Array2<f64>; 2], [Moment; 2], CrossMoment) {
        let mut rng = Run::new(3).rng();
        let mut number = || rng.random::<f64>() - 0.4;
        let lower = Array2::from_shape_fn((tokens, d + 1), |(_, j)| if j < d { number() } else { 1.0 });
        let mut upper =
            Array2::from_shape_fn((tokens, d + 1), |(_, j)| if j < d { 0.3 * number() } else { 1.0 });
        for t in 0..tokens {
            for j in 0..d {
                upper[[t, j]] += 2.0 * lower[[t, (j + 1) % d]] - 0.5 * lower[[t, j]] + 0.2;
            }
        }
        let mean = |a: &Array2<f64>, b: &Array2<f64>| a.t().dot(b) / tokens as f64;
        let own = [&lower, &upper].map(|x| Moment::new(mean(x, x)).unwrap());
        let cross = CrossMoment::new(mean(&upper, &lower)).unwrap();
        ([lower, upper], own, cross)
    }

    fn layer(seed: usize, bias: bool, moment: &Moment) -> Heads {
        let weight = |n: usize| {
            Array3::from_shape_fn((2, 2, 4), |(i, r, c)| ((seed + n + i * 8 + r * 4 + c) as f32 * 0.7).sin())
        };
        let bias = |n: usize| bias.then(|| Array2::from_elem((2, 2), 0.1 * n as f32));
        let projection = |n: usize| Projection::new(weight(n), bias(n)).unwrap();
        let output = weight(9).permuted_axes([0, 2, 1]).as_standard_layout().into_owned();
        let heads = Heads::new(projection(1), projection(2)).unwrap();
        heads.with_queries(projection(3), output).unwrap().with_moment(moment.clone()).unwrap()
    }

    fn outputs(of: &Projection, x: &Array2<f64>) -> Array2<f64> {
        x.dot(&of.augmented(0..of.head_dim(), f64::from).t())
    }

    /// No other function of the lower input is nearer to the upper heads, up to the ridge, with a constant or without.
    #[test]
    fn predictions_are_the_best_linear_ones() {
        let ([lower, upper], own, cross) = inputs(4, 400);
        for bias in [false, true] {
            let [below, above] = [layer(1, bias, &own[0]), layer(5, bias, &own[1])];
            let seen = Inputs::new(&below, &above, &cross).unwrap();
            let found = seen.predicted(above.key()).unwrap();
            assert_eq!(found.bias().is_some(), bias);
            let target = outputs(above.key(), &upper);
            let lost = |of: &Projection| (&outputs(of, &lower) - &target).mapv(|v| v * v).sum();
            let least = lost(&found);
            for at in 0..4 {
                for step in [-0.2f32, 0.2] {
                    let (mut weight, bias) = found.clone().into_parts();
                    weight[[0, 1, at]] += step;
                    assert!(lost(&Projection::new(weight, bias).unwrap()) > least);
                }
            }
        }
    }

    /// The queries that stand for the upper ones have their second moments.
    #[test]
    fn weighing_queries_see_as_much() {
        let (_, own, cross) = inputs(4, 400);
        let [below, above] = [layer(1, false, &own[0]), layer(5, false, &own[1])];
        let seen = Inputs::new(&below, &above, &cross).unwrap();
        let found = seen.weighing(above.query().unwrap()).unwrap();
        let ridged = |moment: &Moment| {
            let mut moment = moment.matrix();
            let added = RIDGE * moment.diag().slice(s![..4]).sum() / 4.0;
            (0..4).for_each(|i| moment[[i, i]] += added);
            moment
        };
        let squares = |of: &Projection, moment: &Moment| {
            let rows = of.augmented(0..2, f64::from);
            rows.dot(&ridged(moment)).dot(&rows.t())
        };
        let off = squares(&found, &own[0]) - squares(above.query().unwrap(), &own[1]);
        assert!(off.iter().all(|v| v.abs() < 1e-5), "{off}");
    }
}
