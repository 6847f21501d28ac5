use std::fmt::{self, Display};
use std::path::PathBuf;

use safetensors::SafeTensorError;

use crate::error::Error;
use crate::model::Unsupported;

/// What is wrong with a checkpoint, with another file, or with the place to write to: one variant for each rule.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A link whose goal is not there, as a download that was cut short leaves in a hub's cache.
    #[error(
        "{} is a link to {}, which is not there: the download is incomplete, or its files were moved; download the model again, or copy it with its links followed",
        path.display(), goal.display()
    )]
    Dangling {
        /// The link.
        path: PathBuf,
        /// What it names.
        goal: PathBuf,
    },
    /// A file is not what its name says: a stand-in for it, nothing, or something packed.
    #[error("{} {what}", path.display())]
    Mistaken {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do.
        what: &'static str,
    },
    /// The saved state of a distillation is of another one, or damaged.
    #[error("{}: not the state of this distillation; go on with what it was begun with, or remove it", path.display())]
    DistillState {
        /// The file.
        path: PathBuf,
    },
    /// There is nothing of that name.
    #[error("{} does not exist; give the directory of a model on this disk (what a hub has must be downloaded first)", path.display())]
    NoDirectory {
        /// The path given.
        path: PathBuf,
    },
    /// What should be a directory is something else.
    #[error("{} is not a directory; give the directory that holds config.json and model.safetensors", path.display())]
    NotADirectory {
        /// The path given.
        path: PathBuf,
    },
    /// A file whose name is no text, which no list of files could hold.
    #[error("{}: its name is not UTF-8; rename the file, or move it away", path.display())]
    Name {
        /// The file, as far as it can be told.
        path: PathBuf,
    },
    /// A directory without config.json.
    #[error("{}: config.json is missing; {hint}", path.display())]
    NoConfig {
        /// The directory.
        path: PathBuf,
        /// Where there is one, or what to do.
        hint: String,
    },
    /// A JSON file is larger than any honest one.
    #[error("{}: larger than {limit} bytes, which no such file needs", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// The most that is read.
        limit: u64,
    },
    /// A file is not the JSON it should be.
    #[error("{}: {source}{hint}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
        /// What stands there, where that is known to be no JSON, and what to do; or nothing.
        hint: &'static str,
    },
    /// A directory that no conversion has written.
    #[error("{}: qcqa.json is missing; give a directory that a conversion has written", path.display())]
    NotConverted {
        /// The directory.
        path: PathBuf,
    },
    /// A file is JSON, but holds no plan.
    #[error("{}: holds no plan but {found}; give a plan, or the qcqa.json of a converted model", path.display())]
    NoPlan {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
    },
    /// A key that config.json must have.
    #[error("{}: `{key}` is missing", path.display())]
    ConfigMissing {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
    },
    /// A value of config.json (or of the index) that cannot be.
    #[error("{}: `{key}` must be {expected}, found {found}", path.display())]
    ConfigValue {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is allowed.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A model that this crate cannot deal with, or does not know.
    #[error("{}: {unsupported}", path.display())]
    Unsupported {
        /// The file that says so.
        path: PathBuf,
        /// What is not supported, and what to do.
        unsupported: Unsupported,
    },
    /// Neither one file of weights nor an index.
    #[error("{}: neither model.safetensors nor model.safetensors.index.json is there; found {found}{hint}", path.display())]
    NoWeights {
        /// The directory.
        path: PathBuf,
        /// Weight files that are there under other names.
        found: String,
        /// What to do with them.
        hint: &'static str,
    },
    /// The index names a shard by something other than a file name.
    #[error("{}: tensor {tensor} is said to be in {shard:?}, which is not the plain name of a .safetensors file", index.display())]
    ShardName {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The name given.
        shard: String,
    },
    /// The index names a shard that is not there.
    #[error("{}: names {shard} for tensor {tensor}, but there is no such file", index.display())]
    ShardMissing {
        /// The index.
        index: PathBuf,
        /// The shard.
        shard: String,
        /// A tensor that should be in it.
        tensor: String,
    },
    /// The index names a tensor that its shard does not have.
    #[error("{}: says that {shard} holds tensor {tensor}, but it does not", index.display())]
    IndexTensor {
        /// The index.
        index: PathBuf,
        /// The shard.
        shard: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor is in two shards.
    #[error("tensor {tensor} is both in {} and in {}; save or download the model again", first.display(), second.display())]
    TensorTwice {
        /// The tensor.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// A file of weights whose header is broken or does not fit its length.
    #[error("{}: not a whole safetensors file of {len} bytes: {source}; cut short or something else, make or download it again", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: usize,
        /// What the header breaks.
        source: SafeTensorError,
    },
    /// A tensor is not there.
    #[error("{}: tensor {tensor} is missing{}{hint}", path.display(), OfShape(expected))]
    TensorMissing {
        /// The file that should hold it, or the directory of several.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its shape, as config.json has it; empty where unknown.
        expected: Vec<usize>,
        /// What is there in its place, where something is, and what to do.
        hint: String,
    },
    /// A tensor has another shape than config.json implies.
    #[error("{}: tensor {tensor} must have shape {expected:?} by config.json, found {found:?}", path.display())]
    TensorShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape by config.json.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has a type that cannot be read, or not that of its siblings.
    #[error("{}: tensor {tensor} must be stored as {expected}, found {found}", path.display())]
    TensorDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Types allowed.
        expected: String,
        /// The type in the file.
        found: String,
    },
    /// Some layers have a bias and some do not.
    #[error("{}: tensor {tensor} is in some layers but not in all", path.display())]
    UnevenBias {
        /// The checkpoint.
        path: PathBuf,
        /// The bias that is missing, or there without its like in layer 0.
        tensor: String,
    },
    /// A matrix in a file of moments that is no second moment.
    #[error("{}: tensor {tensor} {rule}; measure it again", path.display())]
    Moment {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// Weights where moments belong.
    #[error("{}: holds the weights of a model (tensor {tensor}) and no moments; give moments, or a text to measure them on", path.display())]
    NoMoments {
        /// The file.
        path: PathBuf,
        /// One of its tensors.
        tensor: String,
    },
    /// Moments of another model.
    #[error(
        "{}: the moments are of another model: {what} is {found}, this model's is {expected}; calibrate this one", path.display()
    )]
    MomentsModel {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
        /// Of the model at hand.
        expected: String,
        /// Of the moments.
        found: String,
    },
    /// A weight is NaN or infinite.
    #[error("{}: tensor {tensor}: a value is NaN or infinite; every weight must be finite", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A merged weight does not fit the type it must be stored in.
    #[error(
        "tensor {tensor}: the merged value {value} is too large for {dtype}; use another pooler, or convert an f32 copy of the model"
    )]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The stored type.
        dtype: &'static str,
        /// The value.
        value: f32,
    },
    /// A plan file whose contents contradict one another or are of another version.
    #[error("{}: {source}", path.display())]
    Plan {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        source: Error,
    },
    /// The target cannot express the plan.
    #[error("target {target} cannot hold the plan: {source}")]
    TargetPlan {
        /// The target.
        target: &'static str,
        /// The limit that the plan breaks.
        source: Error,
    },
    /// A target lays out heads so that a query head would read the wrong KV head.
    #[error("target {target} lays out layer {layer} wrongly: {found}")]
    Layout {
        /// The target.
        target: &'static str,
        /// The layer.
        layer: usize,
        /// What is wrong.
        found: String,
    },
    /// A target describes an output that cannot be.
    #[error("target {target} describes an output that cannot be: {found}")]
    TargetOutput {
        /// The target.
        target: &'static str,
        /// What is wrong.
        found: String,
    },
    /// Something is already where the output should go.
    #[error("{} exists and is not replaced unless that is asked for", path.display())]
    OutputExists {
        /// The output.
        path: PathBuf,
    },
    /// What would be replaced is not, or not all, of this crate's making.
    #[error("{} {found}, so it is not replaced; choose another name, or move it away", path.display())]
    OutputForeign {
        /// The output.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
    /// An output is an input, or one of the two holds the other.
    #[error("the output {} and what is read from {} must not lie within one another; choose another place", path.display(), inner.display())]
    OutputOverlap {
        /// The output.
        path: PathBuf,
        /// The input, or one of its files.
        inner: PathBuf,
    },
    /// Not enough room to write.
    #[error("{}: {needed} bytes are needed, {available} are free; make room or choose another disk", path.display())]
    NoSpace {
        /// Where it should be written.
        path: PathBuf,
        /// Bytes to write.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// The old output could neither be replaced nor put back.
    #[error("{}: cannot move the new model in, nor the old one back ({source}); the old one is at {}", path.display(), kept.display())]
    OldKept {
        /// The output.
        path: PathBuf,
        /// Where the old one lies now.
        kept: PathBuf,
        /// Why it could not be moved back.
        source: std::io::Error,
    },
    /// More files than a model directory has.
    #[error("{}: more than {limit} files besides the weights; is it a model directory?", path.display())]
    TooManyFiles {
        /// The directory.
        path: PathBuf,
        /// The most that are copied.
        limit: usize,
    },
    /// A rule of the library was broken.
    #[error(transparent)]
    Core(#[from] Error),
}

/// ` (expected with shape [8, 16])`, or nothing.
struct OfShape<'a>(&'a [usize]);

impl Display for OfShape<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " (expected with shape {:?})", self.0) }
    }
}

impl From<FileError> for Error {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Core(error) => error,
            error => Self::plugin(error),
        }
    }
}
