//! The whole road, from the heads of a model to a smaller one: heads → fitness → front → allocation → plan → shared heads →
//! files.

#[cfg(feature = "checkpoint")]
mod compressed;
mod fronts;
#[cfg(feature = "runtime")]
mod limits;
#[cfg(feature = "runtime")]
mod mixtures;
mod pairs;
mod preset;
mod resolved;
mod search;
#[cfg(feature = "runtime")]
mod stages;

use std::sync::Arc;

use crate::allocator::{Allocator, CostScale};
use crate::budget::{Budget, Limits};
#[cfg(feature = "runtime")]
use crate::calibration::Calibration;
#[cfg(feature = "runtime")]
use crate::distil::Distill;
#[cfg(feature = "runtime")]
use crate::error::Error;
use crate::error::Result;
use crate::fitness::FitnessKind;
use crate::grouping::{Grouping, UniformGqa};
use crate::heads::HeadSource;
use crate::optimizer::Optimizer;
#[cfg(feature = "checkpoint")]
use crate::output::Target;
use crate::partition::SearchSpace;
use crate::plan::{Plan, Refit};
use crate::pooler::KvPooler;
use crate::run::Run;
#[cfg(feature = "runtime")]
use crate::runtime::Model;
#[cfg(feature = "runtime")]
use crate::text::Windows;

use self::pairs::PairFronts;
use self::search::BothFronts;

#[cfg(feature = "checkpoint")]
#[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
pub use compressed::Compressed;
pub use fronts::Fronts;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub use limits::LimitCost;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub use mixtures::{Mixer, Mixture, Mixtures};
pub use preset::Preset;
pub use search::Search;
#[cfg(feature = "runtime")]
#[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
pub use stages::{Effect, Stage, TextEffect};

/// How the layers share the budget.
#[derive(Debug, Clone)]
enum Allocation {
    /// As the method does of itself.
    Own,
    /// By this rule, from the errors.
    By(Arc<dyn Allocator>),
    /// The least of what the model was measured to lose on the windows that validate.
    Measured,
}

/// A compression, composed of plugins: which heads share, how the layers divide the budget, how a group merges.
///
/// Starts from a [`Preset`]; every part can be replaced.
///
/// ```
/// use qcqa::budget::Budget;
/// use qcqa::heads::{Heads, InMemory, Projection};
/// use qcqa::ndarray::Array3;
/// use qcqa::pipeline::{Compress, Preset};
/// use qcqa::Run;
///
/// // One layer of four heads; heads 0 and 2 are alike, and so are 1 and 3.
/// let tensor = Array3::from_shape_fn((4, 2, 3), |(i, r, c)| (10 * (i % 2) + 3 * r + c) as f32 + 0.01 * i as f32);
/// let heads = Heads::new(Projection::new(tensor.clone(), None)?, Projection::new(tensor, None)?)?;
/// let source = InMemory::new(vec![heads])?;
///
/// let plan = Compress::new(Preset::QcqaEc).budget(Budget::Fraction(0.5)).plan(&source, Run::new(0))?;
/// assert_eq!(plan.layers[0].groups.groups(), [[0, 2], [1, 3]]);
/// # Ok::<(), qcqa::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Compress<'a> {
    name: String,
    preset: Option<Preset>,
    search: Search,
    fitness: Arc<dyn FitnessKind>,
    allocation: Allocation,
    cost: CostScale,
    limits: Limits,
    pooler: Arc<dyn KvPooler>,
    /// `None`: as fits what is known of the inputs.
    refit: Option<Option<Refit>>,
    budget: Budget,
    #[cfg(feature = "checkpoint")]
    target: Option<&'a dyn Target>,
    #[cfg(feature = "runtime")]
    calibration: Option<&'a Calibration<'a>>,
    #[cfg(feature = "runtime")]
    distil: Option<Distill>,
    #[cfg(feature = "runtime")]
    weighs_limits: bool,
    lifetime: std::marker::PhantomData<&'a ()>,
}

impl<'a> Compress<'a> {
    /// The method of the field, at half of the cache.
    pub fn new(preset: Preset) -> Self {
        let base = Self::custom(preset.search(), preset.fitness(), preset.pooler());
        Self { name: preset.name().to_string(), preset: Some(preset), ..base }
    }

    /// A method of one's own, called `custom` in plans, at half of the cache: one k in all layers.
    pub fn custom(search: Search, fitness: Arc<dyn FitnessKind>, pooler: Arc<dyn KvPooler>) -> Self {
        Self {
            name: "custom".to_string(),
            preset: None,
            search,
            fitness,
            allocation: Allocation::Own,
            cost: CostScale::default(),
            limits: Limits::default(),
            pooler,
            refit: None,
            budget: Budget::Fraction(0.5),
            #[cfg(feature = "checkpoint")]
            target: None,
            #[cfg(feature = "runtime")]
            calibration: None,
            #[cfg(feature = "runtime")]
            distil: None,
            #[cfg(feature = "runtime")]
            weighs_limits: false,
            lifetime: std::marker::PhantomData,
        }
    }

    /// The name that plans give the method.
    pub fn named(self, name: impl Into<String>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// How large the KV cache may be; multi-query attention has one size, whatever the budget.
    pub fn budget(self, budget: Budget) -> Self {
        Self { budget, ..self }
    }

    /// The budget asked for.
    pub fn asked_budget(&self) -> Budget {
        self.budget
    }

    /// Searches by another optimizer. Methods whose groups come from a rule are left as they are.
    pub fn optimizer(mut self, optimizer: impl Optimizer + 'static) -> Self {
        if let Search::Optimizer(own) = &mut self.search {
            *own = Arc::new(optimizer);
        }
        self
    }

    /// Judges partitions by another fitness.
    pub fn fitness(self, fitness: impl FitnessKind + 'static) -> Self {
        Self { fitness: Arc::new(fitness), ..self }
    }

    /// Divides the budget among the layers in another way.
    pub fn allocator(self, allocator: impl Allocator + 'static) -> Self {
        Self { allocation: Allocation::By(Arc::new(allocator)), ..self }
    }

    /// Divides the budget by how far the model is from its source when one layer alone is grouped, estimated on the windows of the
    /// calibration that validate; where all layers must have one k there is nothing to divide.
    pub fn by_sensitivity(self) -> Self {
        Self { allocation: Allocation::Measured, ..self }
    }

    /// Makes the errors of layers comparable in another way.
    pub fn cost(self, cost: CostScale) -> Self {
        Self { cost, ..self }
    }

    /// Merges groups by another pooler.
    pub fn pooler(self, pooler: impl KvPooler + 'static) -> Self {
        Self { pooler: Arc::new(pooler), ..self }
    }

    /// What is fitted again on the calibration text; unless this is called, everything, where the pooler is calibrated and
    /// there is a text.
    pub fn refit(self, refit: Option<Refit>) -> Self {
        Self { refit: Some(refit), ..self }
    }

    /// Further limits, beside those of method and target.
    pub fn limits(self, limits: Limits) -> Self {
        Self { limits, ..self }
    }

    /// The form in which the model is to be written: plans keep to what it can hold.
    #[cfg(feature = "checkpoint")]
    #[cfg_attr(docsrs, doc(cfg(feature = "checkpoint")))]
    pub fn target(self, target: &'a dyn Target) -> Self {
        Self { target: Some(target), ..self }
    }

    /// What is known of the model's inputs: moments decide how groups merge; of texts the windows that validate decide between
    /// groups, layers and stages, too.
    #[cfg(feature = "runtime")]
    #[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
    pub fn calibration(self, calibration: &'a Calibration<'a>) -> Self {
        Self { calibration: Some(calibration), ..self }
    }

    /// Distils the shared heads on the calibration text after all else.
    #[cfg(feature = "runtime")]
    #[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
    pub fn distil(self, distil: Distill) -> Self {
        Self { distil: Some(distil), ..self }
    }

    /// Also finds the plan of the same budget without the target's limits, and measures both on the windows that validate:
    /// [`Compressed::limit_cost`]. It costs a second search where the limits are more than one k in all layers.
    #[cfg(feature = "runtime")]
    #[cfg_attr(docsrs, doc(cfg(feature = "runtime")))]
    pub fn weighing_limits(self) -> Self {
        Self { weighs_limits: true, ..self }
    }

    /// The plan for a model: [`Compress::search`] and [`Fronts::plan`] in one.
    ///
    /// # Errors
    /// As these.
    pub fn plan(&self, source: &dyn HeadSource, run: Run<'_>) -> Result<Plan> {
        self.search_for(source, Some(self.budget), run)?.plan(self.budget, run)
    }

    /// Searches every layer for every number of groups, and measures what the allocation needs. Layer i is searched with
    /// `run.fork(i)`. Progress is stage `"layers"`, then `"search"` or that of the optimizer.
    ///
    /// # Errors
    /// [`Error::TargetMethod`] for a method whose groups the target cannot hold, [`Error::NeedsText`] and
    /// [`Error::RefitPooler`] for what a calibration text is missing for; what source, fitness and search report.
    pub fn search<'s>(&'s self, source: &'s dyn HeadSource, run: Run<'_>) -> Result<Fronts<'s>> {
        self.search_for(source, None, run)
    }

    /// As [`Compress::search`]; for one budget alone where one is given.
    fn search_for<'s>(
        &'s self,
        source: &'s dyn HeadSource,
        budget: Option<Budget>,
        run: Run<'_>,
    ) -> Result<Fronts<'s>> {
        self.check_pairs(source)?;
        let limits = self.all_limits(source)?;
        let space = match budget {
            Some(budget) => self.space_for(&limits, source, budget)?,
            None => limits.space,
        };
        self.search_within(source, limits, space, None, run)
    }

    /// As [`Compress::search`] within these limits, of which `space` is what is searched; `known` are the fronts of that space,
    /// where it was searched before.
    fn search_within<'s>(
        &'s self,
        source: &'s dyn HeadSource,
        limits: Limits,
        space: SearchSpace,
        known: Option<BothFronts>,
        run: Run<'_>,
    ) -> Result<Fronts<'s>> {
        let allocation = self.resolved_allocation(&limits)?;
        let refit = self.resolved_refit()?;
        self.check_distillation()?;
        let neighbours = self.preset.is_some_and(|preset| preset.tries_neighbours(limits.space.cardinality));
        let beside = neighbours.then_some(&UniformGqa as &dyn Grouping);
        let mut found = match known {
            Some(known) => known,
            None => search::fronts(&self.search, beside, self.fitness.as_ref(), source, &space, run)?,
        };
        if !self.can_choose() {
            // The error chooses, layer by layer.
            for (front, others) in found.searched.iter_mut().zip(found.ruled.drain(..)) {
                others.iter().try_for_each(|point| front.offer(&point.partition, point.error).map(drop))?;
            }
        }
        let search = [self.search.spec()].into_iter().chain(beside.map(Grouping::spec)).collect();
        let pairs = match self.crosses_layers() {
            true => Some(PairFronts::search(self, source, (&limits, &space), run)?),
            false => None,
        };
        let mut fronts = Fronts {
            compress: self,
            pairs,
            source,
            limits,
            #[cfg(feature = "runtime")]
            space,
            refit,
            search,
            allocation,
            fronts: found.searched,
            neighbours: found.ruled,
            #[cfg(feature = "runtime")]
            sensitivity: None,
        };
        fronts.measure(run)?;
        Ok(fronts)
    }

    /// Refuses to distil without a text, or what predicts nothing: before anything is computed.
    fn check_distillation(&self) -> Result<()> {
        #[cfg(feature = "runtime")]
        if self.distil.is_some() && self.crosses_layers() {
            return Err(Error::Setting {
                name: "the distillation of layers that share",
                value: "asked for".to_string(),
                expected: "none: gradients do not pass from one layer's attention to another's keys",
            });
        }
        #[cfg(feature = "runtime")]
        if let Some(distil) = &self.distil {
            let text = self.calibration.and_then(|calibration| calibration.text());
            let (model, _) = text.ok_or(Error::NeedsText { what: "distillation" })?;
            if !model.predicts() {
                return Err(crate::text::RuntimeError::NoPredictions.into());
            }
            distil.check_model(model)?;
        }
        Ok(())
    }

    fn has_text(&self) -> bool {
        #[cfg(feature = "runtime")]
        return self.calibration.is_some_and(|c| c.text().is_some());
        #[cfg(not(feature = "runtime"))]
        false
    }

    /// Whether there are windows that fit nothing.
    fn can_choose(&self) -> bool {
        #[cfg(feature = "runtime")]
        return self.validation().is_some();
        #[cfg(not(feature = "runtime"))]
        false
    }

    /// The windows that choose, and the model that reads them.
    #[cfg(feature = "runtime")]
    fn validation(&self) -> Option<(&'a Model, &'a Windows)> {
        let (model, texts) = self.calibration?.text()?;
        Some((model, texts.validation()?))
    }
}
