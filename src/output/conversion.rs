use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::check::check;
use super::copy::{self, Extra, PROVENANCE};
use super::staging::{Destination, Staging};
use super::views::{Job, Made, Numbers, Tensor};
use super::weights::Weights;
use super::{Container, Content, OutputModel, OutputTensor, Slot, Target};
use crate::checkpoint::{CONFIG, Checkpoint, Entry, INDEX};
use crate::error::Error;
use crate::files::{FileError, WriteOptions, check_apart, parent_of, sync_directory};
use crate::heads::HeadSource;
use crate::model::{Axis, Part};
use crate::partition::Partition;
use crate::plan::{LayerPlan, Method, Plan, Pooling, SharedHeads};
use crate::run::Run;
use crate::spec::Spec;

/// What was written or, in a dry run, would be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Bytes of all files; in a dry run estimated from the headers of the source.
    pub bytes: u64,
    /// KV cache of the source, bytes per token at its type.
    pub kv_bytes_before: usize,
    /// KV cache of the output, bytes per token: as the target stores it, so one that saves no memory says so.
    pub kv_bytes_after: usize,
    /// Whether a runtime that loads the output needs less KV cache.
    pub saves_memory: bool,
    /// Query heads of the source, over all layers.
    pub query_heads: usize,
    /// Query heads of zeros that fill groups up, over all layers: scores are computed for them, too.
    pub dead_query_heads: usize,
    /// Bytes that these take among the weights, in queries and outputs.
    pub dead_bytes: u64,
    /// Query heads and KV heads of every layer of the output; none where tensors are made anew by the target.
    pub heads: Vec<[usize; 2]>,
    /// The files, relative to the output, in the order of writing.
    pub files: Vec<PathBuf>,
    /// Files of the source that are not copied: weights in other forms, what describes these, weights of adapters, and code that the
    /// source's config.json names and the output's does not.
    pub left_out: Vec<PathBuf>,
    /// What runs that were killed had left hidden beside the output: found and removed.
    pub removed: Vec<PathBuf>,
}

/// Checks that a target can hold a plan, without pooling anything.
///
/// # Errors
/// [`Error::PlanSource`](crate::Error::PlanSource) through [`FileError::Core`]; [`FileError::TargetPlan`];
/// [`FileError::Layout`] for a target that lays heads out wrongly.
pub fn check_plan(source: &Checkpoint, plan: &Plan, target: &dyn Target) -> Result<(), FileError> {
    checked(source, plan, target).map(drop)
}

/// Checks that a target has a form for models like the source, whatever the plan: better now than after a search.
///
/// # Errors
/// [`Error::NoForm`](crate::Error::NoForm) and [`Error::NoGroupedForm`](crate::Error::NoGroupedForm) through [`FileError::TargetPlan`];
/// what of the source's files keeps the target from writing them.
pub fn check_form(source: &Checkpoint, target: &dyn Target) -> Result<(), FileError> {
    let kept = source.architecture().kv_heads().into_iter().map(Partition::singletons);
    let kept = kept.map(|groups| Ok(LayerPlan::new(groups?, 0.0))).collect::<Result<_, Error>>()?;
    let none = || Spec::new("none");
    let (method, pooling) = (Method::new("none", none(), none(), none()), Pooling::new(none()));
    let plan = Plan::new(source.id()?, method, pooling, kept, 1.0, 0)?;
    match target.output(source, &plan) {
        Ok(_) | Err(FileError::Core(Error::Limits { .. })) => Ok(()),
        Err(FileError::Core(source)) => Err(FileError::TargetPlan { target: target.name(), source }),
        Err(of_files) => Err(of_files),
    }
}

/// What the target makes of a plan that it can hold.
pub(super) fn checked(
    source: &Checkpoint,
    plan: &Plan,
    target: &dyn Target,
) -> Result<OutputModel, FileError> {
    let model = source.architecture();
    plan.source.check_same(&source.id()?)?;
    let unfit = |source| FileError::TargetPlan { target: target.name(), source };
    if let Some(layer) = plan.first_below().filter(|_| !target.holds_pairs()) {
        return Err(unfit(Error::Limits {
            layer,
            found: "reads the keys and values of the layer below".to_string(),
            expected: "this target gives every layer projections of its own, which see its own input: a copy would be exact only where both \
                       layers have one input; the target remote-code writes such layers"
                .to_string(),
        }));
    }
    target.limits(model).check(plan.groups()).map_err(unfit)?;
    let output = target.output(source, plan).map_err(|error| match error {
        FileError::Core(source) => unfit(source),
        of_files => of_files,
    })?;
    check(source, plan, target.name(), &output)?;
    Ok(output)
}

/// Writes what a plan makes of `source`, in the form of `target`.
///
/// Everything is checked before anything is written: that the plan was made for this source, what the target
/// can hold and says, the place and the room there. The output appears whole or not at all: it is written to
/// a hidden directory beside `out`, config.json last, and renamed. Tensors without heads are copied bit for
/// bit, and heads that no pooler changed keep their bits; at most one layer is in memory as f32. Other files
/// are copied, but not other weight files. `qcqa.json` tells how the model was made: the plan with what was
/// done, and `planned_pooling`, what the plan asks for, where that differs. Progress is reported as stage
/// `"write"`.
///
/// ```
/// use qcqa::Run;
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::files::WriteOptions;
/// use qcqa::heads::HeadSource;
/// use qcqa::output::convert;
/// use qcqa::partition::Partition;
/// use qcqa::plan::{LayerPlan, Method, Plan, Pooling, SharedHeads};
/// use qcqa::spec::Spec;
/// use qcqa::targets::Stock;
///
/// let source = Checkpoint::open("tests/data/novels-1m")?;
/// // Neighbours share, two and two, in each of the four layers.
/// let pairs = LayerPlan::new(Partition::from_labels(&[0, 0, 1, 1, 2, 2, 3, 3])?, 0.0);
/// let by_hand = Method::new("by hand", Spec::new("none"), Spec::new("none"), Spec::new("none"));
/// let plan = Plan::new(source.id()?, by_hand, Pooling::new(Spec::new("mean")), vec![pairs; 4], 0.5, 0)?;
///
/// let shared = SharedHeads::new(&plan, &source)?;
/// let only_check = WriteOptions::default().dry_run(true);
/// let report = convert(&source, &shared, &Stock, "novels-1m-half".as_ref(), only_check, Run::new(0))?;
/// assert_eq!(report.kv_bytes_after, report.kv_bytes_before / 2);
/// # Ok::<(), qcqa::Error>(())
/// ```
///
/// # Errors
/// One [`FileError`] for each rule; [`Error::PlanSource`](crate::Error::PlanSource) and
/// [`Error::Cancelled`](crate::Error::Cancelled), among others, through [`FileError::Core`]. After an error
/// `out` is as it was.
pub fn convert(
    source: &Checkpoint,
    shared: &SharedHeads<'_>,
    target: &dyn Target,
    out: &Path,
    options: WriteOptions,
    run: Run<'_>,
) -> Result<Report, FileError> {
    let output = checked(source, shared.plan(), target)?;
    let destination = Destination::check(out, source.path(), options.force)?;
    let (mut extras, mut left) = copied_files(source, out)?;
    extras.retain(|extra| output.files.iter().all(|(path, _)| *path != extra.to));
    if output.container == Container::Directory {
        left.extend(copy::take_unnamed(&mut extras, source.config().raw(), &output.config));
        left.sort();
    } else {
        extras.retain(copy::is_licence);
        left.clear();
    }

    let copied = copied(source, &output);
    let total = copied.len() + output.tensors.len() + extras.len();
    let job = Job::new(source, shared, total as u64, run);
    let weights = Weights::new(source, &output, outputs(source, &job, target.name(), copied, &output)?)?;
    let small = small_files(source, shared, target, &output, &weights, &extras)?;
    let mut report = report(source, kv_bytes(source, &output), &weights, &extras, &small);
    report.left_out = left;
    (report.dead_query_heads, report.dead_bytes) = dead(source, &output);
    report.heads = heads(&output);
    destination.check_space(report.bytes)?;
    job.start()?;
    if options.dry_run {
        return Ok(report);
    }

    let mut staging = Staging::new(&destination)?;
    report.removed = std::mem::take(&mut staging.removed);
    let path = staging.path();
    weights.write(source, &job, &path)?;
    for extra in &extras {
        extra.copy(&path)?;
        job.step()?;
    }
    for (name, bytes) in &small {
        let file = path.join(name);
        let failed = |e| FileError::io("write", &file, e);
        let made = fs::create_dir_all(parent_of(&file)).and_then(|()| File::create_new(&file));
        made.and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all())).map_err(failed)?;
    }
    let directories: BTreeSet<_> = report.files.iter().flat_map(|f| f.ancestors().skip(1)).collect();
    directories.into_iter().try_for_each(|d| sync_directory(&path.join(d)))?;
    let lengths = report.files.iter().map(|f| path.join(f).metadata().map(|m| m.len()));
    report.bytes = lengths.sum::<io::Result<u64>>().map_err(|e| FileError::io("read", &path, e))?;
    staging.commit()?;
    Ok(report)
}

/// The files that are copied beside the weights, and those that are not. By way of links they can lie elsewhere than in the directory:
/// all are apart from the output.
pub(super) fn copied_files(source: &Checkpoint, out: &Path) -> Result<(Vec<Extra>, Vec<PathBuf>), FileError> {
    let (extras, left) = copy::list(source)?;
    let shards = source.files().files.iter().map(|shard| &*shard.path);
    check_apart(out, shards.chain(extras.iter().map(|extra| &*extra.from)))?;
    Ok((extras, left))
}

/// Tensors of the source of which nothing is said; a file of its own kind has those alone of which something is.
fn copied<'a>(source: &'a Checkpoint, output: &OutputModel) -> Vec<(&'a str, &'a Entry)> {
    if output.container != Container::Directory {
        return Vec::new();
    }
    let named = output.tensors.iter().map(|tensor| &tensor.name);
    let said: BTreeSet<&String> = named.chain(&output.left_out).collect();
    let all = source.files().tensors.iter().filter(|(name, _)| !said.contains(name));
    all.map(|(name, entry)| (name.as_str(), entry)).collect()
}

/// The tensors of an output, lazily, each with the number of the source's file that it belongs to.
fn outputs<'a>(
    source: &'a Checkpoint,
    job: &'a Job<'a>,
    target: &'static str,
    copied: Vec<(&'a str, &'a Entry)>,
    output: &'a OutputModel,
) -> Result<Vec<(usize, Tensor<'a>)>, FileError> {
    let mut tensors = Vec::with_capacity(copied.len() + output.tensors.len());
    for (name, entry) in copied {
        let (dtype, numbers) = (entry.dtype, Numbers::Stored(name, entry));
        tensors.push((entry.shard, Tensor { job, name, shape: entry.shape.clone(), dtype, numbers }));
    }
    for OutputTensor { name, content } in &output.tensors {
        let invalid = |found| FileError::TargetOutput { target, found };
        let like = |like: &str| {
            let entry = source.files().tensors.get(like);
            entry.ok_or_else(|| invalid(format!("{name} is to be as {like}, which the source does not have")))
        };
        let (shard, dtype, shape, numbers) = match content {
            Content::Copied(from) => {
                let entry = like(from)?;
                (entry.shard, entry.dtype, entry.shape.clone(), Numbers::Stored(from, entry))
            }
            Content::Heads { like: of, layer, axis, pieces, rows } => {
                let (entry, model) = (like(of)?, source.architecture());
                let (extent, width) = (pieces.len() * model.layers[*layer].head_dim, model.hidden);
                let shape = match axis {
                    Some(Axis::Rows) => vec![extent, width],
                    Some(Axis::Columns) => vec![width, extent],
                    None => vec![extent],
                };
                let made = Made::Heads(*axis, pieces, rows.as_deref());
                (entry.shard, entry.dtype, shape, Numbers::Made(source.float(of, entry)?, *layer, made))
            }
            Content::OutputBias(layer) => {
                let bias = source.stored(*layer)?.output.bias.as_ref();
                let bias =
                    bias.ok_or_else(|| invalid(format!("{name} is an output bias, and there is none")))?;
                let entry = like(bias)?;
                let numbers = Numbers::Made(source.float(bias, entry)?, *layer, Made::OutputBias);
                (entry.shard, entry.dtype, entry.shape.clone(), numbers)
            }
            Content::HeadNorm { like: of, layer, part, slots } => {
                let first = of.first().ok_or_else(|| invalid(format!("{name} is a norm of no tensor")))?;
                let (entry, h) = (like(first)?, source.architecture().layers[*layer].head_dim);
                let numbers = Numbers::Norm(source.float(first, entry)?, *layer, of, *part, slots);
                let by_head = of.len() == 1 && entry.shape.len() == 2;
                let shape = if by_head { vec![slots.len(), h] } else { vec![slots.len() * h] };
                (entry.shard, entry.dtype, shape, numbers)
            }
            Content::Sinks { like: of, layer, slots } => {
                let entry = like(of)?;
                let like = std::slice::from_ref(of);
                let numbers = Numbers::Norm(source.float(of, entry)?, *layer, like, Part::Query, slots);
                (entry.shard, entry.dtype, vec![slots.len()], numbers)
            }
            Content::Made { layer, shape, dtype, make } => {
                let keys = like(&source.stored(*layer)?.key.tensor)?;
                (keys.shard, dtype.stored(), shape.clone(), Numbers::Made(*dtype, *layer, Made::By(make)))
            }
        };
        let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &size| bits.checked_mul(size));
        bits.ok_or_else(|| invalid(format!("{name} of shape {shape:?} is too large")))?;
        tensors.push((shard, Tensor { job, name, shape, dtype, numbers }));
    }
    Ok(tensors)
}

/// The target's files and the small JSON files, of a directory config.json last: without it nothing looks like a model.
fn small_files(
    source: &Checkpoint,
    shared: &SharedHeads<'_>,
    target: &dyn Target,
    output: &OutputModel,
    weights: &Weights<'_>,
    extras: &[Extra],
) -> Result<Vec<(PathBuf, Vec<u8>)>, FileError> {
    let mut files = output.files.clone();
    if let Some(index) = weights.index(source) {
        files.push((INDEX.into(), pretty(INDEX, &index)?));
    }
    let saves = kv_bytes(source, output) < source.kv_bytes_per_token();
    let note = if saves {
        "query heads are reordered group by group"
    } else {
        "shared heads are copied to all members of their group: saves no memory, for evaluation only"
    };
    let mut provenance = json!({
        "qcqa": env!("CARGO_PKG_VERSION"),
        "target": target.name(),
        "saves_memory": saves,
        "note": note,
        "plan": shared.record(),
    });
    let planned = &shared.plan().pooling;
    if shared.done() != planned {
        provenance["planned_pooling"] = json!(planned);
    }
    let config = (output.container == Container::Directory).then_some(CONFIG);
    // What a later run may replace.
    let copied = extras.iter().map(|extra| extra.to.clone());
    let made = [PROVENANCE].into_iter().chain(config).map(PathBuf::from);
    let made = files.iter().map(|(name, _)| name.clone()).chain(made);
    provenance["files"] = json!(weights.files(source).chain(copied).chain(made).collect::<BTreeSet<_>>());
    files.push((PROVENANCE.into(), pretty(PROVENANCE, &provenance)?));
    if let Some(name) = config {
        files.push((name.into(), pretty(name, &output.config)?));
    }
    Ok(files)
}

/// KV cache of an output, bytes per token.
fn kv_bytes(source: &Checkpoint, output: &OutputModel) -> usize {
    source.architecture().kv_bytes_with(&output.kv_heads, source.dtype().bytes())
}

/// Query heads and KV heads of every layer.
fn heads(output: &OutputModel) -> Vec<[usize; 2]> {
    let mut queries = vec![0; output.kv_heads.len()];
    for tensor in &output.tensors {
        let Content::Heads { layer, axis: Some(_), pieces, .. } = &tensor.content else { continue };
        queries[*layer] += pieces.iter().filter(|(part, _)| *part == Part::Query).count();
    }
    queries
        .into_iter()
        .zip(&output.kv_heads)
        .map(|(queries, &kv)| [queries, kv])
        .filter(|[q, kv]| *q > 0 && *kv > 0)
        .collect()
}

/// Query heads of zeros, and the bytes of their queries and outputs.
fn dead(source: &Checkpoint, output: &OutputModel) -> (usize, u64) {
    let (mut heads, mut bytes) = (0, 0);
    for tensor in &output.tensors {
        let Content::Heads { layer, axis: Some(_), pieces, .. } = &tensor.content else { continue };
        let dead = |part: Part| pieces.iter().filter(|piece| **piece == (part, Slot::Zero)).count();
        let [queries, outputs] = [Part::Query, Part::Output].map(dead);
        let model = source.architecture();
        let size = model.layers[*layer].head_dim * model.hidden * source.dtype().bytes();
        heads += queries;
        bytes += ((queries + outputs) * size) as u64;
    }
    (heads, bytes)
}

fn pretty(name: &str, value: &impl serde::Serialize) -> Result<Vec<u8>, FileError> {
    let text = serde_json::to_vec_pretty(value);
    let mut text = text.map_err(|source| FileError::unwritten(Path::new(name), source))?;
    text.push(b'\n');
    Ok(text)
}

fn report(
    source: &Checkpoint,
    kv_bytes_after: usize,
    weights: &Weights<'_>,
    extras: &[Extra],
    small: &[(PathBuf, Vec<u8>)],
) -> Report {
    let copied = extras.iter().map(|e| e.bytes);
    Report {
        bytes: weights.bytes(source) + copied.chain(small.iter().map(|(_, b)| b.len() as u64)).sum::<u64>(),
        kv_bytes_before: source.kv_bytes_per_token(),
        kv_bytes_after,
        saves_memory: kv_bytes_after < source.kv_bytes_per_token(),
        query_heads: source.architecture().layers.iter().map(|layer| layer.query_heads).sum(),
        dead_query_heads: 0,
        dead_bytes: 0,
        heads: Vec::new(),
        files: (weights.files(source))
            .chain(extras.iter().map(|e| e.to.clone()))
            .chain(small.iter().map(|(name, _)| name.clone()))
            .collect(),
        left_out: Vec::new(),
        removed: Vec::new(),
    }
}
