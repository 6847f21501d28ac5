//! Shared heads that learn from their source: as the last stage of compress, or on what was written before.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use qcqa::checkpoint::Checkpoint;
use qcqa::distil::{Distill, Effort};
use qcqa::evaluation::{Evaluation, Reference};
use qcqa::output::{Provenance, convert, read_back};
use qcqa::plan::{SharedHeads, Trained};
use qcqa::runtime::Model;
use qcqa::{Error, Run};
use serde_json::json;

use crate::Done;
use crate::args::{path, target};
use crate::calibrated::CalibrationArgs;
use crate::convert::{Written, tell};
use crate::hints::{CliError, about};
use crate::report::{Output, evaluation_json, table};

/// Shared heads of a converted directory, distilled.
#[derive(Debug, Args)]
pub(super) struct DistillArgs {
    /// Directory that convert or compress has written
    #[arg(value_name = "DIR", value_parser = path())]
    model: PathBuf,
    /// Directory of the model that it was made of
    #[arg(long, value_name = "MODEL", value_parser = path())]
    source: PathBuf,
    /// How long: tokens (500k, 2M) or time (30min, 2h)
    #[arg(long = "for", value_name = "EFFORT", value_parser = effort)]
    effort: Effort,
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    pub(super) calibration: CalibrationArgs,
    #[command(flatten)]
    written: Written,
}

/// What a distillation trains.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Calibration")]
pub(super) struct TrainArgs {
    /// What is distilled: the attention, or norms and MLPs, too [default: attention]
    ///
    /// All weights end nearer to the source after as many tokens, which take longer; every layer is then written anew, not its attention
    /// alone. Experts are not trained.
    #[arg(long, value_name = "WHAT", value_parser = ["attention", "all"], hide_short_help = true)]
    pub(super) train: Option<String>,
}

impl TrainArgs {
    fn trained(&self) -> Trained {
        if self.train.as_deref() == Some("all") { Trained::All } else { Trained::Attention }
    }
}

/// Tokens or time: 500k, 2M, 90s, 30min, 2h.
pub(super) fn effort(text: &str) -> Result<Effort, String> {
    let wrong = || {
        format!(
            "{text} is neither tokens nor time: 500k or 2M tokens, 90s, 30min or 2h, above 0 and less than a year"
        )
    };
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().ok().filter(|n| *n > 0.0).ok_or_else(wrong)?;
    let (factor, time) = match unit {
        "" => (1.0, false),
        "k" => (1e3, false),
        "M" => (1e6, false),
        "s" => (1.0, true),
        "min" => (60.0, true),
        "h" => (3600.0, true),
        _ => return Err(wrong()),
    };
    let all = number * factor;
    let fits = if time { all < 366.0 * 86400.0 } else { (1.0..1e15).contains(&all) };
    if !fits {
        return Err(wrong());
    }
    Ok(if time { Effort::Time(Duration::from_secs_f64(all)) } else { Effort::Tokens(all as u64) })
}

/// A distillation whose state lies beside the output while it goes on.
pub(super) fn beside(effort: Effort, train: &TrainArgs, out: &Path) -> Distill {
    Distill::new(effort).train(train.trained()).state(state(out))
}

pub(super) fn state(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".distilling");
    out.with_file_name(name)
}

/// How a distillation went, in lines.
pub(super) fn told(course: &[(u64, f64)], interrupted: bool, out: &Path) -> String {
    let mut text = String::new();
    if let (Some((_, start)), Some((tokens, _))) = (course.first(), course.last()) {
        let (at, least) = course.iter().fold(
            (0, f64::INFINITY),
            |best, &(at, kl)| {
                if kl < best.1 { (at, kl) } else { best }
            },
        );
        text += &format!(
            "distilled over {tokens} tokens: KL on validation {start:.4} -> {least:.4} (best after {at} tokens)\n"
        );
    }
    if interrupted {
        text += &format!(
            "broken off: what was best until then is kept; the same command with --force goes on from {}\n",
            state(out).display()
        );
    }
    text
}

/// How well each text is read with these shared heads.
fn compared(
    model: &Model,
    references: &[(&str, Reference<'_>)],
    shared: &SharedHeads<'_>,
    run: Run<'_>,
) -> Result<Vec<Evaluation>, CliError> {
    let model = model.with_shared(shared)?;
    references.iter().map(|(_, reference)| Ok(reference.compare(&model, run)?)).collect()
}

pub(super) fn distill(args: &DistillArgs, run: Run<'_>) -> Done {
    let source = Checkpoint::open(&args.source)?;
    let Provenance { plan, target: name, .. } = Provenance::read(&args.model)?;
    let target = target(&name)?;
    let (out, options) = (&args.written.out, args.written.writing.options());
    let written = Checkpoint::open(&args.model)?;
    let read = args.calibration.files().collect::<Vec<_>>();
    args.written.check(&[&source, &written], &read)?;
    let work = beside(args.effort, &args.train, out);
    args.written.check_state(&work, &[&source, &written], &read)?;
    let shared = read_back(&source, &written, &plan, target).map_err(|e| about(&args.model, e))?;
    let (model, texts) = args.calibration.texts(&source, run)?;

    let named = texts.each().iter().filter_map(|text| Some((text.name(), text.validation()?)));
    let references = named.map(|(name, windows)| Ok((name, Reference::new(&model, windows, run)?)));
    let references: Vec<_> = references.collect::<Result<_, Error>>()?;
    let before = compared(&model, &references, &shared, run)?;
    if args.written.writing.dry_run {
        let report = convert(&source, &shared, target, out, options, run)?;
        let (text, json) = tell(&args.written, target, &report);
        return Ok(Output { text, json }.noting(&source));
    }
    let found = work.run(&model, shared, texts.fit(), texts.validation(), run)?;
    // Whoever breaks off from here on wants what there is.
    let run = run.to_the_end();
    let after = compared(&model, &references, &found.shared, run)?;
    let report = convert(&source, &found.shared, target, out, options, run)?;
    if !found.interrupted {
        work.forget()?;
    }

    let kl = |evaluation: &Evaluation| evaluation.divergence.map_or(f64::NAN, |d| d.kl);
    let header = ["validation text", "tokens", "source", "before", "after", "KL before", "KL after"];
    let row =
        |(((name, reference), before), after): (((&&str, &Reference<'_>), &Evaluation), &Evaluation)| {
            let perplexity = |evaluation: &Evaluation| format!("{:.2}", evaluation.perplexity());
            let numbers = [reference.source(), before, after].map(perplexity);
            let [source, was, is] = numbers;
            let kls = [before, after].map(|evaluation| format!("{:.4}", kl(evaluation)));
            let [kl_before, kl_after] = kls;
            [name.to_string(), after.tokens.to_string(), source, was, is, kl_before, kl_after]
        };
    let pairs = || references.iter().map(|(name, reference)| (name, reference)).zip(&before).zip(&after);
    let rows: Vec<_> = pairs().map(row).collect();
    let (told_written, output) = tell(&args.written, target, &report);
    let pace = format!("{:.0} tokens a second, validation left out\n", found.tokens_per_second);
    let text =
        told(&found.course, found.interrupted, out) + &pace + &table(header, rows) + "\n" + &told_written;
    let each = pairs().map(|(((name, reference), before), after)| {
        json!({
            "text": name, "source": evaluation_json(reference.source()), "before": evaluation_json(before),
            "after": evaluation_json(after),
        })
    });
    let json = json!({
        "output": output, "course": found.course, "losses": found.losses, "interrupted": found.interrupted,
        "tokens_per_second": found.tokens_per_second, "validation": each.collect::<Vec<_>>(),
    });
    Ok(Output { text, json }.noting(&source))
}
