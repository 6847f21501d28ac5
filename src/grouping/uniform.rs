use crate::error::{Error, Result};
use crate::grouping::Grouping;
use crate::heads::Heads;
use crate::partition::Partition;
use crate::spec::Spec;

/// Neighbouring heads in k equal groups: GQA (Ainslie et al. 2023, arXiv 2305.13245). k = 1 is MQA (Shazeer
/// 2019, arXiv 1911.02150), k = H is MHA. It has no partition for a k that does not divide H.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UniformGqa;

impl UniformGqa {
    /// k equal groups of neighbours among `n_heads` heads; `None` where k does not divide them.
    ///
    /// # Errors
    /// [`Error::GroupCount`] for k outside `1..=n_heads`, [`Error::HeadCount`].
    pub fn partition(n_heads: usize, k: usize) -> Result<Option<Partition>> {
        if !(1..=n_heads).contains(&k) {
            return Err(Error::GroupCount { k, n_heads });
        }
        if n_heads % k != 0 {
            return Ok(None);
        }
        let size = n_heads / k;
        Partition::from_labels(&(0..n_heads).map(|head| head / size).collect::<Vec<_>>()).map(Some)
    }
}

impl Grouping for UniformGqa {
    fn spec(&self) -> Spec {
        Spec::new("uniform")
    }

    fn group(&self, heads: &Heads, k: usize) -> Result<Option<Partition>> {
        Self::partition(heads.n_heads(), k)
    }
}
