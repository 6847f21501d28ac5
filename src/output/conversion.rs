use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use safetensors::{SafeTensorError, View};
use serde_json::{Map, Value, json};

use super::copy::{self, Extra, PROVENANCE, same_permissions};
use super::families::Part;
use super::output::{Destination, Staging, sync_directory};
use super::read::CONFIG;
use super::shards::INDEX;
use super::targets::Layout;
use super::views::{HeadsOf, Job, Tensor};
use super::{Checkpoint, FileError, Target};
use crate::error::shown;
use crate::{KvPooler, Plan, PoolLayer, Run, kv_bytes_per_token};

/// How to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteOptions {
    /// Replace a model that is already there, once the new one is whole.
    pub force: bool,
    /// Check everything and write nothing.
    pub dry_run: bool,
}

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
    /// The files, relative to the output, in the order of writing.
    pub files: Vec<PathBuf>,
}

/// Writes the model that `plan` makes of `source`, in the form of `target`.
///
/// Everything is checked before anything is written: the plan, that it was made for this source, what the target
/// can hold, the place and the room there. The output appears whole or not at all: it is written to a hidden
/// directory beside `out`, config.json last, and renamed. Tensors without KV heads are copied bit for bit, query
/// heads and output columns reordered without decoding unless the pooler changed them; at most one layer is in
/// memory as f32. Other files are copied, but not other weight files. `qcqa.json` tells how the model was made.
/// Progress is reported as stage `"write"`.
///
/// # Errors
/// One [`FileError`] for each rule; [`Error::Cancelled`](crate::Error::Cancelled) through
/// [`FileError::Core`]. After an error `out` is as it was.
pub fn convert(
    source: &Checkpoint,
    plan: &Plan,
    pooler: &dyn KvPooler,
    target: &dyn Target,
    out: &Path,
    options: WriteOptions,
    run: Run<'_>,
) -> Result<Report, FileError> {
    let pool = |i: usize, heads: &crate::Heads| pooler.pool(heads, &plan.layers[i].groups);
    convert_with(source, plan, &pool, target, out, options, run)
}

/// The same for layers that are pooled with more than a pooler knows, for example the moments of their inputs:
/// `pool(i, heads)` gives the shared heads of layer i, one for each group of the plan.
///
/// # Errors
/// As [`convert`], and what `pool` reports.
pub fn convert_with(
    source: &Checkpoint,
    plan: &Plan,
    pool: &PoolLayer<'_>,
    target: &dyn Target,
    out: &Path,
    options: WriteOptions,
    run: Run<'_>,
) -> Result<Report, FileError> {
    plan.check()?;
    same_source(source, plan)?;
    target.check(plan)?;
    let layouts = layouts(source, plan, target)?;
    let destination = Destination::check(out, source.path(), options.force)?;
    let extras = copy::list(source.path())?;
    let shards = source.files().files.iter().map(|shard| &shard.path);
    shards.chain(extras.iter().map(|e| &e.from)).try_for_each(|file| destination.spare(file))?;

    let total = source.files().tensors.len() + extras.len();
    let job = Job::new(source, plan, pool, &layouts, total as u64, run);
    let shards = outputs(&job);
    let small = small_files(source, plan, target, &shards)?;
    let mut report = report(source, &layouts, &shards, &extras, &small);
    destination.check_space(report.bytes)?;
    run.step("write", 0, job.total)?;
    if options.dry_run {
        return Ok(report);
    }

    let staging = Staging::new(&destination)?;
    let path = staging.path();
    write_shards(&job, shards, &path)?;
    for extra in &extras {
        extra.copy(&path)?;
        job.step()?;
    }
    for (name, bytes) in &small {
        let file = path.join(name);
        let written =
            File::create_new(&file).and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all()));
        written.map_err(|e| FileError::io("write", &file, e))?;
    }
    let directories: BTreeSet<_> = report.files.iter().flat_map(|f| f.ancestors().skip(1)).collect();
    directories.into_iter().try_for_each(|d| sync_directory(&path.join(d)))?;
    let lengths = report.files.iter().map(|f| path.join(f).metadata().map(|m| m.len()));
    report.bytes = lengths.sum::<io::Result<u64>>().map_err(|e| FileError::io("read", &path, e))?;
    staging.commit()?;
    Ok(report)
}

/// Checks the place that [`convert`] would write to, as far as that can be without a plan.
#[cfg(feature = "cli")]
pub(crate) fn check_output(source: &Checkpoint, out: &Path, force: bool) -> Result<(), FileError> {
    Destination::check(out, source.path(), force).map(drop)
}

/// Checks that the plan was made for this checkpoint; the message names the field that differs.
pub(crate) fn same_source(source: &Checkpoint, plan: &Plan) -> Result<(), FileError> {
    let (planned, found) = (&plan.source, source.source()?);
    let print = |f: &Option<String>| f.as_deref().map_or("none".to_string(), shown);
    let fields = [
        ("model_type", shown(&planned.model_type), shown(&found.model_type)),
        ("number of layers", planned.layers.to_string(), found.layers.to_string()),
        ("number of query heads", planned.query_heads.to_string(), found.query_heads.to_string()),
        ("number of KV heads", planned.kv_heads.to_string(), found.kv_heads.to_string()),
        ("head_dim", planned.head_dim.to_string(), found.head_dim.to_string()),
        ("hidden size", planned.hidden.to_string(), found.hidden.to_string()),
        ("dtype", shown(&planned.dtype), shown(&found.dtype)),
        ("fingerprint of keys and values", print(&planned.fingerprint), print(&found.fingerprint)),
    ];
    match fields.into_iter().find(|(_, planned, found)| planned != found) {
        None => Ok(()),
        Some((field, expected, found)) => {
            Err(FileError::PlanSource { path: source.path().to_path_buf(), field, expected, found })
        }
    }
}

fn layouts(source: &Checkpoint, plan: &Plan, target: &dyn Target) -> Result<Vec<Layout>, FileError> {
    let queries = source.config().queries_per_head();
    let checked = |(layer, groups)| {
        let layout = target.layout(groups, queries);
        let wrong = |found| FileError::Layout { target: target.name(), layer, found };
        layout.check(groups, queries).map_err(wrong).map(|()| layout)
    };
    plan.layers.iter().map(|l| &l.groups).enumerate().map(checked).collect()
}

/// The tensors of one output file, by name.
type Outputs<'a> = Vec<(&'a str, Tensor<'a>)>;

/// The tensors of every output file, lazily, in the sharding of the source.
fn outputs<'a>(job: &'a Job<'a>) -> Vec<Outputs<'a>> {
    let config = job.source.config();
    let mut heads = HashMap::new();
    for layer in 0..config.n_layers {
        for (name, part, bias) in job.source.head_tensors(layer) {
            heads.insert(name, HeadsOf { layer, part, bias });
        }
    }
    let mut shards: Vec<Vec<_>> = job.source.files().files.iter().map(|_| Vec::new()).collect();
    for (name, entry) in &job.source.files().tensors {
        let heads = heads.get(name).copied();
        let mut shape = entry.shape.clone();
        if let Some(HeadsOf { layer, part: Part::Key | Part::Value, .. }) = heads {
            shape[0] = job.layouts[layer].kv_rows.len() * config.head_dim;
        }
        shards[entry.shard].push((&**name, Tensor { job, name, entry, heads, shape }));
    }
    shards
}

fn write_shards(job: &Job<'_>, shards: Vec<Outputs<'_>>, directory: &Path) -> Result<(), FileError> {
    for (shard, tensors) in job.source.files().files.iter().zip(shards) {
        let path = directory.join(&shard.file);
        let written = safetensors::serialize_to_file(tensors, shard.metadata.clone(), &path);
        job.outcome()?;
        let failed = |e| FileError::io("write", &path, e);
        written.map_err(|e| match e {
            SafeTensorError::IoError(e) => failed(e),
            other => failed(io::Error::other(other)),
        })?;
        fs::OpenOptions::new().write(true).open(&path).and_then(|f| f.sync_all()).map_err(failed)?;
        same_permissions(&shard.path, &path)?;
    }
    Ok(())
}

/// The small JSON files, config.json last: without it nothing looks like a model.
fn small_files(
    source: &Checkpoint,
    plan: &Plan,
    target: &dyn Target,
    shards: &[Outputs<'_>],
) -> Result<Vec<(&'static str, Vec<u8>)>, FileError> {
    let mut files = Vec::new();
    if let Some(index) = &source.files().index {
        files.push((INDEX, pretty(INDEX, &new_index(index, shards))?));
    }
    let note = if target.saves_memory() {
        "query heads are reordered group by group"
    } else {
        "shared heads are copied to all members of their group: saves no memory, for evaluation only"
    };
    let provenance = json!({
        "qcqa": env!("CARGO_PKG_VERSION"),
        "target": target.name(),
        "saves_memory": target.saves_memory(),
        "note": note,
        "plan": plan,
    });
    files.push((PROVENANCE, pretty(PROVENANCE, &provenance)?));
    let mut config = source.config().raw.clone();
    target.configure(&mut config, plan);
    files.push((CONFIG, pretty(CONFIG, &config)?));
    Ok(files)
}

/// The index of the source with the sizes of the output; tensors stay in their files.
fn new_index(index: &Map<String, Value>, shards: &[Outputs<'_>]) -> Map<String, Value> {
    let tensors = || shards.iter().flatten().map(|(_, tensor)| tensor);
    let count = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let mut index = index.clone();
    let metadata = index.entry("metadata").or_insert_with(|| json!({}));
    if let Value::Object(metadata) = metadata {
        let bytes: u64 = tensors().map(|t| t.data_len() as u64).sum();
        metadata.insert("total_size".to_string(), bytes.into());
        if let Some(before) = metadata.get("total_parameters").and_then(Value::as_u64) {
            let saved: u64 = tensors().map(|t| count(&t.entry.shape).saturating_sub(count(&t.shape))).sum();
            metadata.insert("total_parameters".to_string(), before.saturating_sub(saved).into());
        }
    }
    index
}

fn pretty(name: &str, value: &impl serde::Serialize) -> Result<Vec<u8>, FileError> {
    let mut text = serde_json::to_vec_pretty(value)
        .map_err(|source| FileError::Json { path: PathBuf::from(name), source })?;
    text.push(b'\n');
    Ok(text)
}

fn report(
    source: &Checkpoint,
    layouts: &[Layout],
    shards: &[Outputs<'_>],
    extras: &[Extra],
    small: &[(&str, Vec<u8>)],
) -> Report {
    let config = source.config();
    let stored = &source.files().files;
    let data = shards.iter().flatten().map(|(_, tensor)| tensor.data_len() as u64);
    let headers = stored.iter().map(|shard| shard.header as u64);
    let copied = extras.iter().map(|e| e.bytes);
    let kv_bytes = |heads| kv_bytes_per_token(heads, config.head_dim, source.dtype().bytes());
    Report {
        bytes: data.chain(headers).chain(copied).chain(small.iter().map(|(_, b)| b.len() as u64)).sum(),
        kv_bytes_before: kv_bytes(config.n_layers * config.kv_heads),
        kv_bytes_after: kv_bytes(layouts.iter().map(|layout| layout.kv_rows.len()).sum()),
        files: (stored.iter().map(|s| PathBuf::from(&s.file)))
            .chain(extras.iter().map(|e| e.to.clone()))
            .chain(small.iter().map(|(name, _)| PathBuf::from(name)))
            .collect(),
    }
}
