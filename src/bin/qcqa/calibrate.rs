use std::path::PathBuf;

use clap::Args;
use qcqa::calibration::{Calibration, read_texts};
use qcqa::checkpoint::Checkpoint;
use qcqa::runtime::Model;
use qcqa::text::{Texts, WholeText};
use qcqa::{HeadSource, Run};
use serde_json::{Value, json};

use crate::Done;
use crate::args::{Writing, from_one, path};
use crate::caches::context;
use crate::calibrated::{extent, text_source};
use crate::eval::windows_of_ids;
use crate::hints::CliError;
use crate::report::{Output, merge, shown};
use crate::roles::{rests_on, rests_on_json};

#[derive(Debug, Args)]
pub(super) struct CalibrateArgs {
    /// Directory of the model
    #[arg(value_name = "MODEL", value_parser = path())]
    model: PathBuf,
    /// Texts to read, UTF-8; tokenised by the model's tokenizer.json
    ///
    /// Shares and `self` as `--calibration` of other commands takes them.
    #[arg(long, value_name = "FILE", num_args = 1.., help_heading = "Text", value_parser = path())]
    text: Vec<PathBuf>,
    /// Files of token ids to read instead
    ///
    /// Little-endian, 2 bytes each for vocabularies of up to 65536, else 4.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "text", help_heading = "Text", value_parser = path())]
    ids: Vec<PathBuf>,
    /// The most windows to read, of all texts together, spaced over the whole of each
    ///
    /// An eighth of those of each text, which other commands choose by, is left out.
    #[arg(long, value_name = "N", default_value = "128", value_parser = from_one())]
    #[arg(allow_negative_numbers = true)]
    windows: usize,
    /// Tokens of a window [default: all that the model has positions for, at most 512]
    #[arg(long, value_name = "N", value_parser = from_one())]
    #[arg(allow_negative_numbers = true)]
    context: Option<usize>,
    /// File of the moments
    #[arg(long, value_name = "FILE", value_parser = path())]
    out: PathBuf,
    #[command(flatten)]
    writing: Writing,
}

impl CalibrateArgs {
    fn texts(&self, checkpoint: &Checkpoint, run: Run<'_>) -> Result<(Model, Texts), CliError> {
        if !self.text.is_empty() {
            let sources: Vec<_> = self.text.iter().map(|path| text_source(path)).collect();
            return Ok(read_texts(checkpoint, &sources, extent(self.windows, self.context), run)?);
        }
        if self.ids.is_empty() {
            return Err(CliError::usage("a text is missing: --text FILE, or --ids FILE for token ids"));
        }
        let model = Model::open_for(checkpoint, run)?;
        let length = context(self.context, &model)?;
        let whole = self.ids.iter().map(|ids| {
            Ok::<_, CliError>(WholeText::new(ids.display().to_string(), windows_of_ids(ids, &model, length)?))
        });
        let texts = Texts::new(&whole.collect::<Result<Vec<_>, _>>()?, self.windows)?;
        Ok((model, texts))
    }
}

pub(super) fn calibrate(args: &CalibrateArgs, run: Run<'_>) -> Done {
    // Better now than after the reading.
    let read = [&args.model].into_iter().chain(&args.text).chain(&args.ids);
    args.writing.check(&args.out, &read.cloned().collect::<Vec<_>>())?;
    let checkpoint = Checkpoint::open(&args.model)?;
    let (model, texts) = args.texts(&checkpoint, run)?;
    let (layers, tokens) = (checkpoint.architecture().n_layers(), texts.fit().tokens().len());
    let dry_run = args.writing.dry_run;
    let (mut rests, mut fields) = (String::new(), Value::Null);
    if !dry_run {
        let calibration = Calibration::measured(&checkpoint, model, texts, run)?;
        calibration.moments().write(&args.out, args.writing.options())?;
        (rests, fields) = (rests_on(&calibration), rests_on_json(&calibration));
    }
    let done = if dry_run { "would be written to" } else { "written to" };
    let text = format!("moments of {layers} layers over {tokens} tokens {done} {}\n", args.out.display());
    let mut json = json!({ "out": shown(&args.out), "dry_run": dry_run, "layers": layers, "tokens": tokens });
    merge(&mut json, fields);
    Ok(Output { text: rests + &text, json }.noting(&checkpoint))
}
