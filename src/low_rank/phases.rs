use faer::{Mat, MatRef, c64};

use super::no_moment;
use super::spectra::eigen;
use crate::error::Result;
use crate::model::Rotation;
use crate::run::map_ordered;

/// Keys under rotation: only one complex factor for each frequency commutes with the turning of positions, so that each
/// frequency is a head of one complex row of its own, `κ = K[a] + j K[b]`, weighed by what its queries see.
#[derive(Debug)]
pub(crate) struct Phases {
    /// The dimensions that turn together at each frequency.
    pairs: Vec<(usize, usize)>,
    /// (H·ρ, d+1).
    rows: Mat<f64>,
    /// The rows times the metric.
    weighted: Mat<f64>,
    /// `w_i = Σ_q q C q^H` of frequency f at `[f][i]`.
    weights: Vec<Vec<f64>>,
}

/// The shared key of a group.
#[derive(Debug)]
pub(crate) struct PhasesFit {
    /// (ρ, d+1).
    pub(crate) rows: Mat<f64>,
    /// For each member and frequency the factor c_i with `κ_i ≈ c_i κ_g`.
    pub(crate) factors: Vec<Vec<c64>>,
}

/// The shared key of a group at one frequency: κ_g as its real and its imaginary row, (2, d+1), and c_i of each member.
#[derive(Debug)]
struct PhaseFit {
    rows: Mat<f64>,
    factors: Vec<c64>,
}

impl Phases {
    /// `queries` are the rotated rows of all query heads and `seen` the same times the metric, r for each head.
    pub(crate) fn new(
        rows: Mat<f64>,
        weighted: Mat<f64>,
        queries: &Mat<f64>,
        seen: &Mat<f64>,
        rotation: Rotation,
        r: usize,
    ) -> Self {
        let dims = rotation.dims();
        let square =
            |row: usize| (0..queries.ncols()).map(|i| queries[(row, i)] * seen[(row, i)]).sum::<f64>();
        let weight = |head: usize, (a, b): (usize, usize)| {
            (head * r..(head + 1) * r)
                .map(|q| square(q * dims + a) + square(q * dims + b))
                .sum::<f64>()
                .max(0.0)
        };
        let n = rows.nrows() / dims;
        let pairs: Vec<_> = rotation.pairs().collect();
        let weights = map_ordered(pairs.len(), |f| (0..n).map(|head| weight(head, pairs[f])).collect());
        Self { pairs, rows, weighted, weights }
    }

    /// Frequencies, ρ/2.
    pub(crate) fn frequencies(&self) -> usize {
        self.weights.len()
    }

    /// The rows of these heads at one frequency, the real ones, then the imaginary ones.
    fn gathered(&self, rows: &Mat<f64>, f: usize, heads: &[usize]) -> Mat<f64> {
        let dims = 2 * self.pairs.len();
        let (a, b) = self.pairs[f];
        let row = |i: usize| {
            if i < heads.len() { heads[i] * dims + a } else { heads[i - heads.len()] * dims + b }
        };
        Mat::from_fn(2 * heads.len(), rows.ncols(), |i, j| rows[(row(i), j)])
    }

    /// `P_ij = κ_i C κ_j^H` at one frequency.
    fn products(&self, f: usize, heads: &[usize]) -> Mat<c64> {
        let n = heads.len();
        let all = self.gathered(&self.weighted, f, heads) * self.gathered(&self.rows, f, heads).transpose();
        Mat::from_fn(n, n, |i, j| {
            c64::new(all[(i, j)] + all[(n + i, n + j)], all[(n + i, j)] - all[(i, n + j)])
        })
    }

    /// `A_ij = √(w_i w_j) κ_i C κ_j^H` at one frequency.
    pub(crate) fn hermitian(&self, f: usize, heads: &[usize]) -> Mat<c64> {
        weigh(&self.products(f, heads), &self.roots(f, heads))
    }

    fn roots(&self, f: usize, heads: &[usize]) -> Vec<f64> {
        heads.iter().map(|&head| self.weights[f][head].sqrt()).collect()
    }

    /// The best shared key of a group, at every frequency with the root mean square of the members'.
    pub(crate) fn fit(&self, heads: &[usize]) -> Result<PhasesFit> {
        self.at_all(heads, |f| self.fit_one(f, heads))
    }

    /// The members turned by phases alone until they agree best, then their mean: `|c_i| = 1`.
    pub(crate) fn align(&self, heads: &[usize], rounds: usize) -> Result<PhasesFit> {
        self.at_all(heads, |f| Ok(self.align_one(f, heads, rounds)))
    }

    fn at_all(&self, heads: &[usize], fit: impl Fn(usize) -> Result<PhaseFit>) -> Result<PhasesFit> {
        let mut rows = Mat::zeros(2 * self.pairs.len(), self.rows.ncols());
        let mut factors = vec![Vec::with_capacity(self.pairs.len()); heads.len()];
        for (f, &(a, b)) in self.pairs.iter().enumerate() {
            let found = fit(f)?;
            rows.row_mut(a).copy_from(found.rows.row(0));
            rows.row_mut(b).copy_from(found.rows.row(1));
            factors.iter_mut().zip(found.factors).for_each(|(of_head, factor)| of_head.push(factor));
        }
        Ok(PhasesFit { rows, factors })
    }

    fn fit_one(&self, f: usize, heads: &[usize]) -> Result<PhaseFit> {
        let products = self.products(f, heads);
        let mut roots = self.roots(f, heads);
        if roots.iter().all(|&root| root == 0.0) {
            // Nobody looks here: any shared key will do, and this one keeps what it can.
            roots.fill(1.0);
        }
        let (_, vectors) = eigen(weigh(&products, &roots).as_ref()).ok_or_else(no_moment)?;
        let n = heads.len();
        // κ_g = Σ_j ū_j √w_j κ_j
        let shares: Vec<c64> = (0..n).map(|j| vectors[(j, n - 1)].conj() * roots[j]).collect();
        self.with_shares(f, heads, &products, &shares)
    }

    /// `κ_g = Σ_j s_j κ_j`, scaled, with the factors `c_i = κ_i C κ_g^H / κ_g C κ_g^H`.
    fn with_shares(
        &self,
        f: usize,
        heads: &[usize],
        products: &Mat<c64>,
        shares: &[c64],
    ) -> Result<PhaseFit> {
        let n = heads.len();
        let rows = self.gathered(&self.rows, f, heads);
        let mut shared = Mat::from_fn(2, rows.ncols(), |part, column| {
            let terms = shares.iter().enumerate().map(|(j, share)| {
                let (re, im) = (rows[(j, column)], rows[(n + j, column)]);
                if part == 0 { share.re * re - share.im * im } else { share.re * im + share.im * re }
            });
            terms.sum::<f64>()
        });
        let with_shared: Vec<c64> =
            (0..n).map(|i| (0..n).map(|j| products[(i, j)] * shares[j].conj()).sum()).collect();
        let energy: f64 = shares.iter().zip(&with_shared).map(|(share, product)| (share * product).re).sum();
        let mut factors: Vec<c64> = with_shared
            .iter()
            .map(|product| if energy > 0.0 { product / energy } else { c64::new(0.0, 0.0) })
            .collect();
        let scale = root_mean_square(rows.as_ref()) / root_mean_square(shared.as_ref());
        if scale.is_finite() && scale > 0.0 {
            shared *= faer::Scale(scale);
            factors.iter_mut().for_each(|factor| *factor /= scale);
        }
        Ok(PhaseFit { rows: shared, factors })
    }

    fn align_one(&self, f: usize, heads: &[usize], rounds: usize) -> PhaseFit {
        let (n, products) = (heads.len(), self.products(f, heads));
        let rows = self.gathered(&self.rows, f, heads);
        let mut factors = vec![c64::new(1.0, 0.0); n];
        for _ in 0..rounds {
            for i in 0..n {
                // The phase of κ_i C (Σ_{j≠i} c̄_j κ_j)^H.
                let others: c64 = (0..n).filter(|&j| j != i).map(|j| products[(i, j)] * factors[j]).sum();
                if others.norm() > 0.0 {
                    factors[i] = others / others.norm();
                }
            }
        }
        let shared = Mat::from_fn(2, rows.ncols(), |part, column| {
            let terms = factors.iter().enumerate().map(|(j, factor)| {
                let (re, im) = (rows[(j, column)], rows[(n + j, column)]);
                if part == 0 { factor.re * re + factor.im * im } else { factor.re * im - factor.im * re }
            });
            terms.sum::<f64>() / n as f64
        });
        PhaseFit { rows: shared, factors }
    }
}

/// `√w_i P_ij √w_j`.
fn weigh(products: &Mat<c64>, roots: &[f64]) -> Mat<c64> {
    Mat::from_fn(roots.len(), roots.len(), |i, j| products[(i, j)] * (roots[i] * roots[j]))
}

pub(crate) fn root_mean_square(rows: MatRef<'_, f64>) -> f64 {
    rows.norm_l2() / ((rows.nrows() * rows.ncols()).max(1) as f64).sqrt()
}
