//! Keys and values that a layer hands on to the one above.

use candle_core::{Result, Tensor};

use super::attention::Attention;
use super::cache::Past;
use super::pass::Pass;
use super::rope::Rope;
use super::{Model, RuntimeError};
use crate::error::Error;

/// What a layer has read: its keys and values with those of the past, to be read again by the layer above.
#[derive(Debug, Clone)]
pub(crate) struct Handed {
    /// (B, k, S, h).
    pub(super) keys: Tensor,
    /// (B, k, S, h).
    pub(super) values: Tensor,
    /// Where the S tokens stand, ascending.
    pub(super) positions: Vec<usize>,
    /// The number of each head as plans count them.
    pub(super) order: Vec<usize>,
}

impl Handed {
    /// What the layer below handed on, and where some of its heads lie there.
    pub(super) fn places<'b>(below: Option<&'b Self>, heads: &[usize]) -> Result<(&'b Self, Vec<u32>)> {
        let missing = || {
            candle_core::Error::Msg(
                "a layer reads the keys and values of the layer below, which did not run".into(),
            )
        };
        let below = below.ok_or_else(missing)?;
        let place = |head: &usize| below.order.iter().position(|own| own == head).map(|place| place as u32);
        Ok((below, heads.iter().map(place).collect::<Option<_>>().ok_or_else(missing)?))
    }

    /// Some heads of the layer below, in this order.
    pub(super) fn of_below(below: Option<&Self>, heads: &[usize]) -> Result<Self> {
        let (below, places) = Self::places(below, heads)?;
        let select = |of: &Tensor| match places.windows(2).all(|next| next[1] == next[0] + 1) {
            true => of.narrow(1, places[0] as usize, places.len()),
            false => of.index_select(&Tensor::new(&places[..], of.device())?, 1),
        };
        Ok(Self {
            keys: select(&below.keys)?,
            values: select(&below.values)?,
            positions: below.positions.clone(),
            order: heads.to_vec(),
        })
    }
}

impl Attention {
    /// Inputs (B·T, d) → queries (B, n_q, T, h), and the keys and values that they read: its own with those of the past, to which they are
    /// added, or those of the layer below.
    pub(super) fn read(
        &self,
        x: &Tensor,
        pass: &Pass,
        rope: &Rope,
        past: Option<&mut Past>,
        below: Option<&Handed>,
    ) -> Result<(Tensor, Handed)> {
        match &self.below {
            Some(heads) => Ok((self.queries(x, pass, rope)?, Handed::of_below(below, heads)?)),
            None => {
                let [query, mut keys, mut values] = self.project(x, pass, rope)?;
                let mut seen = pass.positions();
                if let Some(Past::Whole(past)) = past {
                    (keys, values, seen) = past.extend(keys, values, seen)?;
                }
                Ok((query, Handed { keys, values, positions: seen.to_vec(), order: self.kv_order.clone() }))
            }
        }
    }

    /// Inputs (B·T, d) → queries (B, n_q, T, h), turned by their positions, of a layer that has nothing else.
    pub(super) fn queries(&self, x: &Tensor, pass: &Pass, rope: &Rope) -> Result<Tensor> {
        let (len, n_q, h) = (pass.positions().len(), self.query_heads, self.head_dim);
        let all = self.projected(x)?;
        let all = all.reshape((all.dim(0)? / len, len, n_q, h))?.transpose(1, 2)?;
        rope.apply(&all.contiguous()?)
    }
}

/// What running a layer gives.
type Ran<T> = std::result::Result<T, RuntimeError>;

impl Model {
    /// Layer `i`, (N, d) → (N, d), where `below` is what the layer below hands on; it becomes what this one does, if the layer above
    /// reads that.
    pub(super) fn step(
        &self,
        i: usize,
        x: &Tensor,
        pass: &Pass,
        past: Option<&mut Past>,
        below: &mut Option<Handed>,
    ) -> Ran<Tensor> {
        if below.is_none() {
            self.own_keys(i, "running a layer alone")?;
        }
        let (x, handed) = self.whole(i)?.forward(i, x, pass, past, below.take().as_ref())?;
        *below = Some(handed).filter(|_| i + 1 < self.n_layers() && self.reads_below(i + 1));
        Ok(x)
    }

    /// Whether layer `i` reads the keys and values of the layer below.
    pub(super) fn reads_below(&self, i: usize) -> bool {
        self.attention[i].as_ref().map_or(self.specs[i].below.is_some(), |own| own.known().below.is_some())
    }

    /// Refuses a layer that reads the keys and values of the one below, for `what` has no place for these.
    pub(super) fn own_keys(&self, layer: usize, what: &str) -> Ran<()> {
        if layer >= self.n_layers() || !self.reads_below(layer) {
            return Ok(());
        }
        let found = "reads the keys and values of the layer below".to_string();
        let expected = format!("{what} takes layers with keys and values of their own");
        Err(Error::Limits { layer, found, expected }.into())
    }

    /// What the attention of layer `i` makes of what it reads, (N, d) → (N, d).
    pub(crate) fn attend(&self, i: usize, input: &Tensor, pass: &Pass) -> Ran<Tensor> {
        Ok(self.attention(i)?.forward(input, pass, pass.rope(i), None, None)?.0)
    }

    /// What the attention of layer `i` makes of what it and the one below read, (N, d) each, where it reads that one's keys and values.
    pub(crate) fn attend_above(&self, i: usize, [below, input]: [&Tensor; 2], pass: &Pass) -> Ran<Tensor> {
        let (_, handed) = self.attention(i - 1)?.forward(below, pass, pass.rope(i - 1), None, None)?;
        Ok(self.attention(i)?.forward(input, pass, pass.rope(i), None, Some(&handed))?.0)
    }
}
