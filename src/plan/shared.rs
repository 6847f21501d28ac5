#[cfg(feature = "checkpoint")]
use std::collections::BTreeMap;
use std::sync::Arc;

#[cfg(feature = "runtime")]
use super::below::Sharing;
use super::{Plan, Pooling};
use crate::cross_layer::{LayerPairs, parted};
use crate::error::{Error, Result};
use crate::heads::{HeadSource, Heads, Pooled};
use crate::partition::Partition;
use crate::pooler::{KvPooler, POOLERS};

/// The shared heads of a plan: what conversion writes and the runtime runs, layer by layer.
///
/// They are made as the plan says, by its pooler and under its calibration, or it is an error; [`SharedHeads::done`] tells
/// what was really done, and is what outputs record.
///
/// ```
/// use qcqa::heads::{HeadSource, Heads, InMemory, Projection};
/// use qcqa::ndarray::Array3;
/// use qcqa::partition::Partition;
/// use qcqa::plan::{LayerPlan, Method, Plan, Pooling, SharedHeads};
/// use qcqa::pooler::{FirstHead, KvPooler};
/// use qcqa::spec::Spec;
///
/// let tensor = Array3::from_shape_fn((4, 2, 3), |(i, r, c)| (i * 7 + r * 3 + c) as f32);
/// let heads = Heads::new(Projection::new(tensor.clone(), None)?, Projection::new(tensor, None)?)?;
/// let source = InMemory::new(vec![heads])?;
///
/// let by_hand = Method::new("by hand", Spec::new("none"), Spec::new("none"), Spec::new("none"));
/// let layer = LayerPlan::new(Partition::from_groups(4, &[[0, 1], [2, 3]])?, 0.0);
/// let plan = Plan::new(source.id()?, by_hand, Pooling::new(Spec::new("mean")), vec![layer], 0.5, 0)?;
///
/// let shared = SharedHeads::new(&plan, &source)?;
/// let (_, pooled) = shared.layer(0)?;
/// assert_eq!(pooled.key.n_heads(), 2);
///
/// // Another pooler than the plan's is possible, and is not hidden.
/// let other = SharedHeads::with_pooler(&plan, &source, Box::new(FirstHead))?;
/// assert_eq!(other.done().pooler, FirstHead.spec());
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SharedHeads<'a> {
    plan: Plan,
    source: &'a dyn HeadSource,
    made: Made,
    done: Pooling,
    #[cfg(feature = "checkpoint")]
    others: Option<Arc<Others>>,
}

/// Tensors of the source that became others, by their names: numbers in the order in which they are stored.
#[cfg(feature = "checkpoint")]
pub(crate) type Others = BTreeMap<String, Vec<f32>>;

/// Where shared heads come from.
#[derive(Debug, Clone)]
enum Made {
    /// From a pooler, when they are asked for.
    By(Arc<dyn KvPooler>),
    /// From elsewhere, all layers: refits, distillation, files.
    #[cfg(feature = "checkpoint")]
    Given(Arc<dyn Layers>),
}

/// The shared heads of all layers, which are there.
#[cfg(feature = "checkpoint")]
pub(crate) trait Layers: std::fmt::Debug + Send + Sync {
    /// Those of a layer.
    fn shared_heads(&self, layer: usize) -> Result<Pooled>;
}

#[cfg(feature = "checkpoint")]
impl Layers for Vec<Pooled> {
    fn shared_heads(&self, layer: usize) -> Result<Pooled> {
        Ok(self[layer].clone())
    }
}

impl<'a> SharedHeads<'a> {
    /// The shared heads of a plan, made as it says.
    ///
    /// # Errors
    /// As [`Plan::check`]; [`Error::PlanSource`] for a plan of another model; [`Error::UnknownPlugin`],
    /// [`Error::UnknownSetting`] and [`Error::Setting`] for a pooler that this crate does not have;
    /// [`Error::PlanCalibration`] unless the pooler uses the moments that the plan names; [`Error::PlanRefit`] for a plan
    /// with a refit: that takes a text (feature `runtime`: [`refit`](crate::refit)); [`Error::PlanDistilled`].
    pub fn new(plan: &Plan, source: &'a dyn HeadSource) -> Result<Self> {
        match plan.pooling.refit {
            Some(refit) if plan.pooling.distilled.is_none() => Err(Error::PlanRefit { refit: refit.name() }),
            _ => Self::unfitted(plan, source),
        }
    }

    /// The shared heads before any refit.
    pub(crate) fn unfitted(plan: &Plan, source: &'a dyn HeadSource) -> Result<Self> {
        if plan.pooling.distilled.is_some() {
            return Err(Error::PlanDistilled);
        }
        let mut shared = Self::with_pooler(plan, source, POOLERS.make(&plan.pooling.pooler)?)?;
        // As the plan says it, whether or not it spells out every setting.
        shared.done.pooler = plan.pooling.pooler.clone();
        let (expected, found) = (plan.pooling.calibration.clone(), shared.done.calibration.clone());
        if expected != found { Err(Error::PlanCalibration { expected, found }) } else { Ok(shared) }
    }

    /// The plan's groups, pooled by another pooler than it names, or by one that this crate does not have; under whatever
    /// moments the source has, without a refit.
    ///
    /// # Errors
    /// As [`Plan::check`]; [`Error::PlanSource`].
    pub fn with_pooler(plan: &Plan, source: &'a dyn HeadSource, pooler: Box<dyn KvPooler>) -> Result<Self> {
        check(plan, source)?;
        let calibration = source.calibration().filter(|_| pooler.needs().moment);
        let done = Pooling::new(pooler.spec()).with_calibration(calibration);
        let made = Made::By(Arc::from(pooler));
        Ok(Self {
            plan: plan.clone(),
            source,
            made,
            done,
            #[cfg(feature = "checkpoint")]
            others: None,
        })
    }

    /// Shared heads that a plan's pooling has made before, one [`Pooled`] a layer.
    #[cfg(feature = "checkpoint")]
    pub(crate) fn made(plan: &Plan, source: &'a dyn HeadSource, layers: Vec<Pooled>) -> Result<Self> {
        check(plan, source)?;
        let done = plan.pooling.clone();
        Ok(Self { plan: plan.clone(), source, made: Made::Given(Arc::new(layers)), done, others: None })
    }

    /// These layers in the place of what the pooler makes, with the refit that made them.
    #[cfg(feature = "runtime")]
    pub(crate) fn refitted(self, layers: impl Layers + 'static, refit: super::Refit) -> Self {
        Self { done: self.done.clone().with_refit(Some(refit)), ..self.given(layers) }
    }

    /// These layers, which are what the pooler makes: nothing is made twice.
    #[cfg(feature = "runtime")]
    pub(crate) fn given(self, layers: impl Layers + 'static) -> Self {
        Self { made: Made::Given(Arc::new(layers)), ..self }
    }

    /// These layers after distillation, in the place of what there was.
    #[cfg(feature = "runtime")]
    pub(crate) fn distilled(self, layers: Vec<Pooled>, distilled: super::Distillation) -> Self {
        Self {
            made: Made::Given(Arc::new(layers)),
            done: self.done.with_distillation(Some(distilled)),
            ..self
        }
    }

    /// Other numbers for tensors of the source's norms and MLPs, by name and in the order in which they are stored: what a distillation
    /// of all weights ([`Trained::All`](super::Trained::All)) has made of them. Whatever runs or writes these heads takes them, and
    /// refuses names and sizes that do not fit.
    #[cfg(feature = "checkpoint")]
    #[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
    pub fn with_others(self, others: Option<BTreeMap<String, Vec<f32>>>) -> Self {
        Self { others: others.map(Arc::new), ..self }
    }

    /// Tensors of the source beside the heads that have become others, as [`SharedHeads::with_others`] takes them.
    #[cfg(feature = "checkpoint")]
    #[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
    pub fn others(&self) -> Option<&BTreeMap<String, Vec<f32>>> {
        self.others.as_deref()
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What makes the shared heads: the plan's pooling, unless another pooler was put in its place.
    pub fn done(&self) -> &Pooling {
        &self.done
    }

    /// The plan with what was done in the place of what it asked for: what outputs record.
    pub fn record(&self) -> Plan {
        Plan { pooling: self.done.clone(), ..self.plan.clone() }
    }

    /// These shared heads under a plan that asks for what was done.
    #[cfg(feature = "runtime")]
    pub(crate) fn settled(self) -> Self {
        Self { plan: self.record(), ..self }
    }

    /// Where the heads come from.
    pub fn source(&self) -> &'a dyn HeadSource {
        self.source
    }

    /// The groups of a layer.
    ///
    /// # Panics
    /// When there is no such layer.
    pub fn groups(&self, layer: usize) -> &Partition {
        &self.plan.layers[layer].groups
    }

    /// The groups of a layer, and what they read.
    #[cfg(feature = "runtime")]
    pub(crate) fn sharing(&self, layer: usize) -> Sharing<'_> {
        Sharing::from(&self.plan.layers[layer])
    }

    /// A layer of the source, and its shared heads, checked against it. Of two layers that share with one another the lower one has the
    /// shared heads of both, those first that its own groups read; the upper one, as functions of the lower one's input,
    /// those that it reads.
    ///
    /// # Errors
    /// [`Error::NoLayer`]; what the source and the pooler report; as [`Pooled::check`].
    pub fn layer(&self, layer: usize) -> Result<(Heads, Pooled)> {
        let planned = self.plan.layers.get(layer);
        let planned = planned.ok_or(Error::NoLayer { layer, layers: self.plan.layers.len() })?;
        let (groups, heads) = (&planned.groups, self.source.heads(layer)?);
        let lower = if planned.below.is_some() { layer.saturating_sub(1) } else { layer };
        let pooled = match &self.made {
            #[cfg(feature = "checkpoint")]
            Made::Given(layers) => layers.shared_heads(layer)?,
            Made::By(pooler) => match self.plan.joint(lower) {
                Some(joint) => {
                    let pair = self.pair(lower, pooler.as_ref(), &joint);
                    let [of_lower, of_upper] = pair.map_err(|error| error.of_layer(layer))?;
                    if lower < layer { of_upper } else { of_lower }
                }
                None => pooler.pool(&heads, groups).map_err(|error| error.of_layer(layer))?,
            },
        };
        let read = if planned.below.is_some() { groups.n_groups() } else { self.plan.group_counts()[layer] };
        pooled.check_kept(&heads, groups, read)?;
        Ok((heads, pooled))
    }

    /// The shared heads of a layer and the one above by their joint groups.
    fn pair(&self, lower: usize, pooler: &dyn KvPooler, joint: &Partition) -> Result<[Pooled; 2]> {
        let pairs = LayerPairs::new(self.source, pooler.needs().moment)?;
        let heads = pairs.of_lower(lower)?;
        let pooled = pooler.pool(&heads, joint)?;
        pooled.check(&heads, joint)?;
        let below = self.plan.layers[lower + 1].below.as_ref();
        let queries = self.plan.layers[lower].groups.n_heads() * heads.queries_per_head();
        parted(pooled, queries, below.map_or(&[], super::Below::heads))
    }
}

/// Checks that a plan is for this source, whose layers can share as it says.
fn check(plan: &Plan, source: &dyn HeadSource) -> Result<()> {
    plan.check()?;
    plan.source.check_same(&source.id()?)?;
    // Heads that already read another layer's input have no second place to be shared in.
    let pairs = match source.architecture().first_below().is_some() || plan.first_below().is_some() {
        true => LayerPairs::new(source, false)?,
        false => return Ok(()),
    };
    let cannot = plan.layers.iter().enumerate().skip(1).find(|(layer, planned)| {
        planned.below.is_some() && pairs.lower().binary_search(&(layer - 1)).is_err()
    });
    cannot.map_or(Ok(()), |(layer, _)| {
        let found = "reads the keys and values of the layer below".to_string();
        let expected =
            "the two differ in heads, positions or masks, or their keys go through norms".to_string();
        Err(Error::Limits { layer, found, expected })
    })
}
