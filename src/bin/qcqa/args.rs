//! Flags that several commands take, and what they make of the library.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use clap::builder::{
    PathBufValueParser, PossibleValue, PossibleValuesParser, RangedU64ValueParser, TypedValueParser,
};
use qcqa::allocator::{ALLOCATORS, CostScale, LayerSelection};
use qcqa::budget::{Budget, Limits};
use qcqa::calibration::Calibration;
use qcqa::files::{WriteOptions, check_apart, write_whole};
use qcqa::optimizer::{Nsga2, OPTIMIZERS, Optimizer};
use qcqa::output::Target;
use qcqa::partition::SearchSpace;
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::Refit;
use qcqa::pooler::{KvPooler, POOLERS};
use qcqa::targets::{self, RUNTIMES, TARGETS};

use crate::calibrated::CalibrationArgs;
use crate::hints::CliError;

/// What searching takes, wherever it is done.
#[derive(Debug, Args)]
pub(super) struct SearchOptions {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL", value_parser = path())]
    pub(super) model: PathBuf,
    /// Share of the KV cache that may be kept, above 0 and at most 1
    ///
    /// An upper bound: a plan may use less. Not needed for mqa.
    #[arg(long, value_name = "FRACTION", value_parser = fraction, allow_negative_numbers = true)]
    pub(super) kv: Option<f64>,
    /// How heads are grouped
    ///
    /// Unless said, search does qcqa-ec and compress low-rank.
    #[arg(long, value_parser = methods())]
    pub(super) method: Option<String>,
    #[command(flatten)]
    pub(super) options: MethodArgs,
    #[command(flatten)]
    pub(super) refit: RefitArgs,
    #[command(flatten)]
    pub(super) calibration: CalibrationArgs,
}

impl SearchOptions {
    /// The method asked for; `default` unless one is named.
    pub(super) fn preset(&self, default: Preset) -> Result<Preset, CliError> {
        self.method.as_deref().map_or(Ok(default), preset)
    }

    /// What is read.
    pub(super) fn inputs(&self) -> Vec<PathBuf> {
        [self.model.clone()].into_iter().chain(self.calibration.files()).collect()
    }
}

/// What a method leaves open: each fixes grouping, cardinality, allocation, cost and pooler; these flags override.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Method")]
pub(super) struct MethodArgs {
    /// How the searched methods search: auto is exact up to 12 heads (8 for low-rank), local above; compare takes several
    #[arg(long, value_delimiter = ',', default_value = "auto", value_parser = optimizers(), hide_short_help = true)]
    pub(super) optimizer: Vec<String>,
    /// How the layers share the budget; uniform unless said, but with a calibration text sensitivity for low-rank and cla,
    /// without one exact for cla
    #[arg(long, value_parser = allocations(), hide_short_help = true)]
    pub(super) allocation: Option<String>,
    /// How the errors of different layers are made comparable: as a share of their energies, or as they are (the paper)
    #[arg(long, value_parser = ["energy-share", "raw"], default_value = "energy-share", hide_short_help = true)]
    pub(super) cost: String,
    /// How the heads of a group are merged; mean unless said, but for low-rank
    #[arg(long, value_parser = PossibleValuesParser::new(POOLERS.names()), hide_short_help = true)]
    pub(super) pooler: Option<String>,
    /// The most groups of a layer that shares
    #[arg(long, value_name = "K", hide_short_help = true, value_parser = from_one())]
    #[arg(allow_negative_numbers = true)]
    pub(super) max_groups: Option<usize>,
    /// The most heads of a group
    #[arg(long, value_name = "HEADS", hide_short_help = true, value_parser = from_one())]
    #[arg(allow_negative_numbers = true)]
    pub(super) max_group_size: Option<usize>,
    /// Individuals of nsga2
    #[arg(long, value_name = "N", default_value = "100", hide_short_help = true, value_parser = counted(2))]
    #[arg(allow_negative_numbers = true)]
    pub(super) population: usize,
    /// Generations of nsga2
    #[arg(long, value_name = "N", default_value = "100", hide_short_help = true, value_parser = counted(1))]
    #[arg(allow_negative_numbers = true)]
    pub(super) generations: usize,
}

/// What is fitted again.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Calibration")]
pub(super) struct RefitArgs {
    /// What is fitted again on the calibration texts after heads were merged: nothing, the output projection, or queries, keys,
    /// values and outputs; full where the pooler is calibrated and there is a text
    ///
    /// compress and compare keep an earlier stage where that is nearer to the source on windows that fitted nothing.
    #[arg(long, value_parser = ["none", "output", "full"], hide_short_help = true)]
    refit: Option<String>,
}

impl RefitArgs {
    /// `None`: nobody said.
    pub(super) fn asked(&self) -> Option<Option<Refit>> {
        self.refit.as_deref().map(|name| match name {
            "output" => Some(Refit::Output),
            "full" => Some(Refit::Full),
            _ => None,
        })
    }
}

/// What writing takes, wherever it is done.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct Writing {
    /// Replace what qcqa wrote there before
    #[arg(long)]
    pub(super) force: bool,
    /// Check everything, write nothing
    #[arg(long)]
    pub(super) dry_run: bool,
}

impl Writing {
    pub(super) fn options(self) -> WriteOptions {
        WriteOptions::default().force(self.force).dry_run(self.dry_run)
    }

    /// Checks before any work that a file can be written there, and that it is none of what is read.
    pub(super) fn check(self, out: &Path, inputs: &[PathBuf]) -> Result<(), CliError> {
        check_apart(out, inputs.iter().map(PathBuf::as_path))?;
        Ok(write_whole(out, &[], self.options().dry_run(true))?)
    }
}

/// A file or directory as the command line takes it.
pub(super) fn path() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| {
        // As in `--out=~/x`, where no shell sees a home.
        let home = path.components().next().map(Component::as_os_str).filter(|first| {
            let names = first.to_string_lossy();
            names == "~" || (names.starts_with('~') && path.components().count() > 1)
        });
        if home.is_some_and(|home| !Path::new(home).exists()) {
            let name = path.display();
            return Err(format!(
                "the shell has not replaced the ~ of {name}: leave a space before it, or write $HOME"
            ));
        }
        if path == Path::new("-") {
            return Err(
                "- is no file here: /dev/stdin is what is piped in, ./- a file of that name".to_string()
            );
        }
        Ok(path)
    })
}

/// A whole number from `least` to a million, which no search would come to the end of.
fn counted(least: u64) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(least..=1_000_000)
}

/// A whole number from 1 on.
pub(super) fn from_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// A budget as the command line takes it.
pub(super) fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => {
            Err("a budget is a fraction of the KV cache, above 0 and at most 1 (0.5 keeps half; 50% is written 0.5)".to_string())
        }
    }
}

pub(super) fn methods() -> PossibleValuesParser {
    PossibleValuesParser::new(
        Preset::ALL.iter().map(|preset| PossibleValue::new(preset.name()).help(preset.summary())),
    )
}

fn optimizers() -> PossibleValuesParser {
    // An old name still works.
    PossibleValuesParser::new(OPTIMIZERS.names().map(|name| PossibleValue::new(name).hide(name == "ward")))
}

fn allocations() -> PossibleValuesParser {
    PossibleValuesParser::new(ALLOCATORS.names().chain(["sensitivity"]))
}

/// The target that a runtime decides.
pub(super) const AUTO: &str = "auto";

/// Names of targets, and further ones.
pub(super) fn targets_parser(further: &[&'static str]) -> PossibleValuesParser {
    PossibleValuesParser::new(TARGETS.iter().map(|target| target.name()).chain(further.iter().copied()))
}

pub(super) fn runtimes() -> PossibleValuesParser {
    PossibleValuesParser::new(RUNTIMES.iter().map(|runtime| runtime.name))
}

/// A target by the name that the parser has let through.
pub(super) fn target(name: &str) -> Result<&'static dyn Target, CliError> {
    targets::by_name(name).ok_or_else(|| CliError::usage(format!("there is no target {name}")))
}

/// A method by the name that the parser has let through.
pub(super) fn preset(name: &str) -> Result<Preset, CliError> {
    Ok(name.parse()?)
}

impl MethodArgs {
    /// The compression that method and flags ask for, searched by `optimizer`.
    pub(super) fn compress<'a>(
        &self,
        method: Preset,
        optimizer: &str,
        target: Option<&'a dyn Target>,
        calibration: Option<&'a Calibration<'a>>,
    ) -> Result<Compress<'a>, CliError> {
        let Self { population, generations, max_groups, max_group_size, .. } = *self;
        let limits = Limits {
            space: SearchSpace { max_groups, max_group_size, ..SearchSpace::arbitrary() },
            ..Limits::default()
        };
        let cost = if self.cost == "raw" { CostScale::Raw } else { CostScale::EnergyShare };
        let mut compress = Compress::new(method).limits(limits).cost(cost);
        compress = match optimizer {
            "auto" => compress,
            "nsga2" => compress.optimizer(Nsga2 { population, generations, ..Nsga2::default() }),
            name => compress.optimizer(Arc::<dyn Optimizer>::from(OPTIMIZERS.by_name(name)?)),
        };
        compress = match self.allocation.as_deref() {
            None => compress,
            Some("sensitivity") => compress.by_sensitivity(),
            Some(name) => compress.allocator(self.allocator(name)?),
        };
        if let Some(name) = &self.pooler {
            compress = compress.pooler(Arc::<dyn KvPooler>::from(POOLERS.by_name(name)?));
        }
        if let Some(target) = target {
            compress = compress.target(target);
        }
        Ok(match calibration {
            Some(calibration) => compress.calibration(calibration),
            None => compress,
        })
    }

    /// An allocator by name.
    pub(super) fn allocator(&self, name: &str) -> Result<Arc<dyn qcqa::Allocator>, CliError> {
        let Self { population, generations, .. } = *self;
        Ok(match name {
            "selection" => Arc::new(LayerSelection { population, generations, ..LayerSelection::default() }),
            name => Arc::from(ALLOCATORS.by_name(name)?),
        })
    }

    /// Whether heads of two layers are merged under moments of both.
    pub(super) fn is_calibrated_across(&self, method: Preset) -> Result<bool, CliError> {
        Ok(method.crosses_layers() && self.is_calibrated(method)?)
    }

    /// Whether the pooler that will be used works under moments of the inputs.
    pub(super) fn is_calibrated(&self, method: Preset) -> Result<bool, CliError> {
        match &self.pooler {
            Some(name) => Ok(POOLERS.by_name(name)?.needs().moment),
            None => Ok(matches!(method, Preset::LowRank | Preset::ClaLowRank)),
        }
    }
}

impl SearchOptions {
    /// The budget; multi-query attention needs none.
    pub(super) fn budget(&self, method: Preset) -> Result<Budget, CliError> {
        match self.kv {
            Some(kv) => Ok(Budget::Fraction(kv)),
            None if method == Preset::Mqa => Ok(Budget::Fraction(1.0)),
            None => Err(CliError::usage("--kv FRACTION is missing: 0.5 keeps half the cache")),
        }
    }

    /// The compression asked for; `default` is the method unless another is named.
    pub(super) fn compress<'a>(
        &self,
        default: Preset,
        target: Option<&'a dyn Target>,
        calibration: Option<&'a Calibration<'a>>,
    ) -> Result<Compress<'a>, CliError> {
        let method = self.preset(default)?;
        let [optimizer] = &self.options.optimizer[..] else {
            return Err(CliError::usage("one --optimizer at a time, but for compare"));
        };
        let compress =
            self.options.compress(method, optimizer, target, calibration)?.budget(self.budget(method)?);
        Ok(match self.refit.asked() {
            Some(refit) => compress.refit(refit),
            None => compress,
        })
    }
}
