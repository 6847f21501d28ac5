//! Partitions of a layer's heads, and the spaces in which they are searched.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// An assignment of every KV head of a layer to one group; illegal ones cannot be built.
///
/// Stored as canonical labels (a restricted growth string): head 0 has label 0 and every new group takes the
/// next number, so groups are ordered by their smallest head and relabelled partitions are equal. Serde
/// writes lists of heads: `[[0,3],[1,2]]`.
///
/// ```
/// use qcqa::partition::Partition;
///
/// let partition = Partition::from_labels(&[7, 4, 4, 7])?;
/// assert_eq!((partition.n_heads(), partition.n_groups()), (4, 2));
/// assert_eq!(partition.labels(), [0, 1, 1, 0]);
/// assert_eq!(partition.groups(), [[0, 3], [1, 2]]);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Vec<Vec<usize>>", into = "Vec<Vec<usize>>")]
pub struct Partition {
    n_groups: u16,
    labels: Box<[u16]>,
}

/// A label that has no canonical one yet.
const UNSEEN: u16 = u16::MAX;

impl Partition {
    /// The most heads a layer may have.
    pub const MAX_HEADS: usize = 4096;

    /// Every head alone: MHA, k = H.
    ///
    /// # Errors
    /// [`Error::HeadCount`] for 0 heads or more than [`Partition::MAX_HEADS`].
    pub fn singletons(n_heads: usize) -> Result<Self> {
        Self::from_labels(&(0..n_heads).collect::<Vec<_>>())
    }

    /// All heads in one group: MQA, k = 1.
    ///
    /// # Errors
    /// [`Error::HeadCount`], as [`Partition::singletons`].
    pub fn one_group(n_heads: usize) -> Result<Self> {
        Self::from_labels(&vec![0; n_heads])
    }

    /// The partition in which heads with equal labels share a group; any labels will do.
    ///
    /// ```
    /// # use qcqa::partition::Partition;
    /// assert_eq!(Partition::from_labels(&[1, 0, 1])?, Partition::from_labels(&[5, 9, 5])?);
    /// # Ok::<(), qcqa::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::HeadCount`], as [`Partition::singletons`].
    pub fn from_labels(labels: &[usize]) -> Result<Self> {
        check_count(labels.len())?;
        let mut seen: Vec<usize> = Vec::new();
        let labels = labels
            .iter()
            .map(|&label| {
                let known = seen.iter().position(|&s| s == label);
                known.unwrap_or_else(|| {
                    seen.push(label);
                    seen.len() - 1
                }) as u16
            })
            .collect();
        Ok(Self { n_groups: seen.len() as u16, labels })
    }

    /// The partition with these groups; their order and the order within them do not matter.
    ///
    /// ```
    /// # use qcqa::Error;
    /// # use qcqa::partition::Partition;
    /// let partition = Partition::from_groups(3, &[vec![1], vec![2, 0]])?;
    /// assert_eq!(partition.labels(), [0, 1, 0]);
    /// assert!(matches!(Partition::from_groups(3, &[[0, 1]]), Err(Error::HeadMissing { head: 2, .. })));
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::EmptyGroup`], [`Error::HeadOutOfRange`], [`Error::HeadTwice`], [`Error::HeadMissing`],
    /// [`Error::HeadCount`].
    pub fn from_groups<G: AsRef<[usize]>>(n_heads: usize, groups: &[G]) -> Result<Self> {
        check_count(n_heads)?;
        let mut labels = vec![usize::MAX; n_heads];
        for (group, members) in groups.iter().enumerate() {
            if members.as_ref().is_empty() {
                return Err(Error::EmptyGroup { group });
            }
            for &head in members.as_ref() {
                let slot = labels.get_mut(head).ok_or(Error::HeadOutOfRange { head, n_heads })?;
                if *slot != usize::MAX {
                    return Err(Error::HeadTwice { head });
                }
                *slot = group;
            }
        }
        match labels.iter().position(|&l| l == usize::MAX) {
            Some(head) => Err(Error::HeadMissing { head, n_heads }),
            None => Self::from_labels(&labels),
        }
    }

    /// The partition of labels below `bound`: the searches' fast road in.
    pub(crate) fn canonical(mut labels: Box<[u16]>, bound: usize) -> Self {
        let mut new_label = vec![UNSEEN; bound];
        let mut n_groups = 0;
        for label in &mut labels {
            // No branch: which label is new cannot be predicted, and a wrong guess takes longer than the
            // rest.
            let new = &mut new_label[usize::from(*label)];
            let unseen = *new == UNSEEN;
            *new = if unseen { n_groups } else { *new };
            n_groups += u16::from(unseen);
            *label = *new;
        }
        Self { n_groups, labels }
    }

    /// The labels, to be changed and made a partition again.
    pub(crate) fn into_labels(self) -> Box<[u16]> {
        self.labels
    }

    /// Number of heads, H.
    pub fn n_heads(&self) -> usize {
        self.labels.len()
    }

    /// Number of groups, k.
    pub fn n_groups(&self) -> usize {
        usize::from(self.n_groups)
    }

    /// The group of a head.
    ///
    /// # Panics
    /// When `head` is not below [`Partition::n_heads`].
    pub fn group_of(&self, head: usize) -> usize {
        usize::from(self.labels[head])
    }

    /// Canonical labels, one for each head.
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// The groups, ordered by smallest head, members ascending.
    pub fn groups(&self) -> Vec<Vec<usize>> {
        let mut groups = vec![Vec::new(); self.n_groups()];
        for (head, &label) in self.labels.iter().enumerate() {
            groups[usize::from(label)].push(head);
        }
        groups
    }

    /// Sizes of the groups, in their order.
    pub fn sizes(&self) -> Vec<usize> {
        let mut sizes = vec![0; self.n_groups()];
        for &label in &self.labels {
            sizes[usize::from(label)] += 1;
        }
        sizes
    }

    /// Whether all groups have one size (equal cardinality, QCQA-EC).
    pub fn is_equal(&self) -> bool {
        let sizes = self.sizes();
        sizes.iter().all(|&s| s == sizes[0])
    }
}

fn check_count(n_heads: usize) -> Result<()> {
    match n_heads {
        1..=Partition::MAX_HEADS => Ok(()),
        _ => Err(Error::HeadCount { n_heads, max: Partition::MAX_HEADS }),
    }
}

impl fmt::Debug for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Partition{:?}", self.groups())
    }
}

impl TryFrom<Vec<Vec<usize>>> for Partition {
    type Error = Error;

    fn try_from(groups: Vec<Vec<usize>>) -> Result<Self> {
        Self::from_groups(groups.iter().map(Vec::len).sum(), &groups)
    }
}

impl From<Partition> for Vec<Vec<usize>> {
    fn from(partition: Partition) -> Self {
        partition.groups()
    }
}

/// Whether groups may differ in size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cardinality {
    /// Groups of any size (QCQA-AC).
    #[default]
    Arbitrary,
    /// All groups of H/k heads (QCQA-EC); k divides H.
    Equal,
}

/// Which partitions of a layer a search may return.
///
/// The partition without sharing (k = H) always belongs to it.
///
/// ```
/// use qcqa::partition::{Partition, SearchSpace};
///
/// let space = SearchSpace { max_group_size: Some(4), ..SearchSpace::equal() };
/// assert_eq!(space.group_counts(8)?, [2, 4, 8]);
/// assert!(!space.admits(&Partition::one_group(8)?));
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SearchSpace {
    /// Whether groups may differ in size.
    pub cardinality: Cardinality,
    /// The most groups; `None`: as many as there are heads.
    pub max_groups: Option<usize>,
    /// The most heads in one group; `None`: no limit.
    pub max_group_size: Option<usize>,
    /// Percent of H that k groups may take when all are filled up to the largest, k times its size; those of the most equal
    /// sizes always may. `None`: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_filled: Option<usize>,
}

impl SearchSpace {
    /// All partitions.
    pub fn arbitrary() -> Self {
        Self::default()
    }

    /// All partitions into groups of one size.
    pub fn equal() -> Self {
        Self { cardinality: Cardinality::Equal, ..Self::default() }
    }

    /// The group counts k for which the space holds a partition of `n_heads` heads, ascending; H is always
    /// last.
    ///
    /// # Errors
    /// [`Error::Setting`] when a limit is 0.
    pub fn group_counts(&self, n_heads: usize) -> Result<Vec<usize>> {
        for (name, limit) in [("max_groups", self.max_groups), ("max_group_size", self.max_group_size)] {
            if limit == Some(0) {
                return Err(Error::Setting { name, value: "0".into(), expected: "at least 1" });
            }
        }
        Ok((1..=n_heads).filter(|&k| k == n_heads || self.holds(n_heads, k)).collect())
    }

    fn holds(&self, n_heads: usize, k: usize) -> bool {
        let divides = self.cardinality == Cardinality::Arbitrary || n_heads % k == 0;
        divides && k <= self.groups_at_most(n_heads) && n_heads.div_ceil(k) <= self.size_at_most(n_heads, k)
    }

    /// Whether the partition belongs to the space.
    pub fn admits(&self, partition: &Partition) -> bool {
        let (n, k) = (partition.n_heads(), partition.n_groups());
        k == n
            || (self.holds(n, k)
                && (self.cardinality == Cardinality::Arbitrary || partition.is_equal())
                && partition.sizes().iter().all(|&s| s <= self.size_at_most(n, k)))
    }

    /// The most groups of a partition of `n_heads` heads, the one without sharing aside.
    pub(crate) fn groups_at_most(&self, n_heads: usize) -> usize {
        self.max_groups.map_or(n_heads, |m| m.min(n_heads))
    }

    /// The most heads of a group among k; the more groups, the fewer.
    pub(crate) fn size_at_most(&self, n_heads: usize, k: usize) -> usize {
        let filled = |percent: usize| (n_heads.saturating_mul(percent) / 100 / k).max(n_heads.div_ceil(k));
        let most = self.max_filled.map_or(n_heads, filled).min(n_heads);
        self.max_group_size.map_or(most, |m| m.min(most))
    }
}

impl fmt::Display for SearchSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (groups, sizes) = (self.max_groups, self.max_group_size);
        write!(
            f,
            "{}",
            if self.cardinality == Cardinality::Equal { "equal groups" } else { "groups of any size" }
        )?;
        groups.map_or(Ok(()), |most| write!(f, ", at most {most}"))?;
        sizes.map_or(Ok(()), |most| write!(f, ", of at most {most} heads"))?;
        let filled = self.max_filled;
        filled.map_or(Ok(()), |most| write!(f, ", filled up to the largest at most {most}% of the heads"))
    }
}
