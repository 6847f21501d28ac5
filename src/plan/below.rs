use serde::{Deserialize, Serialize};

use super::{LayerPlan, Plan};
use crate::error::{Error, Result};
use crate::model::ModelId;
use crate::partition::Partition;

/// The heads that a layer without keys and values of its own reads: for each of its groups, in their order, a shared head of the
/// layer below (Brandon et al. 2024, arXiv 2405.12981).
///
/// The layer below numbers its shared heads so: first those of its own groups, then those that only the layer above reads, in the
/// order of the groups that read them. Both layers' groups together are thus one partition of the heads of both, whose k groups
/// are computed and cached once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Below(Vec<usize>);

impl Below {
    /// One head of the layer below for each group.
    pub fn new(heads: Vec<usize>) -> Self {
        Self(heads)
    }

    /// The heads, one for each group.
    pub fn heads(&self) -> &[usize] {
        &self.0
    }
}

impl LayerPlan {
    /// The plans of two neighbouring layers whose heads share: `joint` is a partition of the `lower` heads of the one below and then those
    /// of the one above; its error and its bound are held by the lower layer.
    ///
    /// ```
    /// use qcqa::partition::Partition;
    /// use qcqa::plan::LayerPlan;
    ///
    /// // Two heads a layer: the first of both share, the upper layer's second is read by it alone.
    /// let joint = LayerPlan::new(Partition::from_labels(&[0, 1, 0, 2])?, 1.0);
    /// let [lower, upper] = joint.split(2)?;
    /// assert_eq!((lower.groups.n_groups(), upper.groups.n_groups()), (2, 2));
    /// assert_eq!(upper.below.unwrap().heads(), [0, 2]);
    /// # Ok::<(), qcqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::PartitionSize`] unless some heads are left for the layer above; [`Error::HeadCount`] for none below.
    pub fn split(&self, lower: usize) -> Result<[Self; 2]> {
        let labels: Vec<usize> = self.groups.labels().iter().map(|&label| label.into()).collect();
        if labels.len() <= lower {
            return Err(Error::PartitionSize { expected: lower + 1, found: labels.len() });
        }
        let (own, above) = labels.split_at(lower);
        let (own, groups) = (Partition::from_labels(own)?, Partition::from_labels(above)?);
        let read = groups.groups().iter().map(|members| above[members[0]]).collect();
        let upper = Self { lower_bound: Some(0.0), below: Some(Below(read)), ..Self::new(groups, 0.0) };
        Ok([Self { groups: own, ..self.clone() }, upper])
    }
}

/// The partition of the heads of two layers of which the upper one reads `below`; `None` where it says none: two of its groups
/// read one head, or numbers are left out.
fn joint(lower: &Partition, upper: &Partition, below: &Below) -> Option<Partition> {
    let (own, read) = (lower.labels().iter().map(|&label| usize::from(label)), below.heads());
    if read.len() != upper.n_groups() || (1..read.len()).any(|i| read[..i].contains(&read[i])) {
        return None;
    }
    let labels: Vec<usize> =
        own.chain(upper.labels().iter().map(|&group| read[usize::from(group)])).collect();
    let joint = Partition::from_labels(&labels).ok()?;
    // The same numbers, or some were left out.
    joint.labels().iter().map(|&label| usize::from(label)).eq(labels).then_some(joint)
}

/// KV heads that every layer computes and caches.
pub(super) fn kept(layers: &[LayerPlan]) -> Vec<usize> {
    let of = |(i, layer): (usize, &LayerPlan)| {
        let above = layers.get(i + 1).and_then(|above| above.below.as_ref());
        let most = above.and_then(|below| below.heads().iter().max());
        match &layer.below {
            Some(_) => 0,
            // A larger number is no head, which the check of the plan says.
            None => most.map_or(0, |&head| head.min(Partition::MAX_HEADS) + 1).max(layer.groups.n_groups()),
        }
    };
    layers.iter().enumerate().map(of).collect()
}

/// Checks that every layer that reads the one below can do so.
pub(super) fn check(layers: &[LayerPlan], source: &ModelId) -> Result<()> {
    for (i, layer) in layers.iter().enumerate() {
        let Some(below) = &layer.below else { continue };
        let wrong =
            |what: String| Err(Error::PlanInconsistent(format!("layer {i} reads the one below, {what}")));
        let Some(lower) = i.checked_sub(1) else { return wrong("and there is none".to_string()) };
        if layers[lower].below.is_some() {
            return wrong("which has no keys and values of its own".to_string());
        }
        if source.layers[lower].head_dim != source.layers[i].head_dim {
            return wrong("whose heads have another width".to_string());
        }
        let own = &layers[lower].groups;
        if joint(own, &layer.groups, below).is_none() {
            return wrong(format!(
                "but its {} groups cannot be its heads {:?}: each is another one, of the {} groups there or, numbered on from these in \
                 the order of their heads, of those that it alone reads",
                layer.groups.n_groups(),
                below.heads().iter().take(8).collect::<Vec<_>>(),
                own.n_groups()
            ));
        }
    }
    Ok(())
}

impl Plan {
    /// The partition of the heads of this layer and of the one above, where that one reads the shared heads of this one: its k
    /// groups are computed and cached here.
    pub fn joint(&self, layer: usize) -> Option<Partition> {
        let (lower, upper) = (self.layers.get(layer)?, self.layers.get(layer + 1)?);
        joint(&lower.groups, &upper.groups, upper.below.as_ref()?)
    }

    /// The first layer that reads the keys and values of the one below.
    pub fn first_below(&self) -> Option<usize> {
        self.layers.iter().position(|layer| layer.below.is_some())
    }

    /// Refuses a plan in which layers share with one another, for `what` has no place for that.
    ///
    /// # Errors
    /// [`Error::Limits`] naming the first layer that reads the one below.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn no_pairs(&self, what: &str) -> Result<()> {
        match self.first_below() {
            None => Ok(()),
            Some(layer) => Err(Error::Limits {
                layer,
                found: "reads the keys and values of the layer below".to_string(),
                expected: format!("{what} takes layers with keys and values of their own"),
            }),
        }
    }
}

/// The groups of a layer, and what they read where that is not of the layer itself.
#[cfg(feature = "runtime")]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sharing<'a> {
    pub(crate) groups: &'a Partition,
    pub(crate) below: Option<&'a Below>,
}

#[cfg(feature = "runtime")]
impl<'a> From<&'a Partition> for Sharing<'a> {
    fn from(groups: &'a Partition) -> Self {
        Self { groups, below: None }
    }
}

#[cfg(feature = "runtime")]
impl<'a> From<&'a LayerPlan> for Sharing<'a> {
    fn from(layer: &'a LayerPlan) -> Self {
        Self { groups: &layer.groups, below: layer.below.as_ref() }
    }
}
