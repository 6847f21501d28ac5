use std::path::PathBuf;

use clap::Args;
use qcqa::HeadSource;
use qcqa::budget::Budget;
use qcqa::checkpoint::Checkpoint;
use qcqa::model::{Architecture, AttentionSpec};
use qcqa::output::Provenance;
use qcqa::targets::{Stock, by_name, serving_notes};
use serde_json::json;

use crate::Done;
use crate::args::{fraction, path};
use crate::report::{Output, bytes, counts, file_bytes, percent, shown, table};

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL", value_parser = path())]
    model: PathBuf,
    /// Budgets to show
    #[arg(long, value_name = "FRACTIONS", value_delimiter = ',', value_parser = fraction)]
    #[arg(default_values = ["0.75", "0.5", "0.25", "0.125"])]
    kv: Vec<f64>,
}

pub(super) fn inspect(args: &InspectArgs) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let (model, id) = (checkpoint.architecture(), checkpoint.id()?);
    let (heads, size) = (model.kv_heads(), checkpoint.dtype().bytes());
    let before = model.kv_bytes_per_token(size);

    let mut rows = Vec::new();
    let mut budgets = Vec::new();
    for &kv in &args.kv {
        // Below one head a layer there is nothing to show but that.
        let Ok(most) = Budget::Fraction(kv).kv_heads(&heads) else {
            rows.push([kv.to_string(), "-".into(), "-".into(), "unreachable".into(), "-".into()]);
            budgets.push(json!({ "kv": kv, "reachable": false }));
            continue;
        };
        let equal = equal_groups(&heads, most);
        let share = most as f64 / heads.iter().sum::<usize>() as f64;
        let after = (before as f64 * share).round() as usize;
        let saved = 1.0 - after as f64 / before as f64;
        let part = (equal * heads.len()) as f64 / heads.iter().sum::<usize>() as f64;
        rows.push([
            kv.to_string(),
            most.to_string(),
            format!("{equal} ({})", percent(part)),
            bytes(after as u64),
            percent(saved),
        ]);
        budgets.push(json!({
            "kv": kv, "reachable": true, "kv_heads": most, "equal_groups": equal,
            "kv_bytes_per_token": after, "saved": saved,
        }));
    }
    let header = ["budget", "KV heads at most", "equal groups a layer", "KV bytes a token", "saved"];
    let bias = if has_bias(model) { ", biases" } else { "" };
    let tied = if model.tied_embeddings { ", tied embeddings" } else { "" };
    let each = |of: fn(&AttentionSpec) -> usize| counts(&model.layers.iter().map(of).collect::<Vec<_>>());
    let text = format!(
        "{}: {}, {} layers, {} query heads on {} KV heads of {}, width {}\n\
         weights: {}, {} in {} file(s){bias}{tied}\n\
         KV cache: {} a token\n\n{}",
        args.model.display(),
        model.model_type,
        model.n_layers(),
        each(|layer| layer.query_heads),
        each(|layer| layer.kv_heads),
        each(|layer| layer.head_dim),
        model.hidden,
        checkpoint.dtype().name(),
        file_bytes(checkpoint.weight_bytes()),
        checkpoint.shards(),
        bytes(before as u64),
        table(header, rows),
    );
    // What is served as an ordinary model, unless it was written here in another form.
    let written = Provenance::read(&args.model).ok().and_then(|written| by_name(&written.target));
    let served = serving_notes(
        written.unwrap_or(&Stock),
        &model.layers.iter().map(|layer| [layer.query_heads, layer.kv_heads]).collect::<Vec<_>>(),
    );
    let text = served.iter().fold(text, |text, note| text + &format!("to be known: {note}\n"));
    let json = json!({
        "serving_notes": served, "model": shown(&args.model), "source": id, "weight_bytes": checkpoint.weight_bytes(),
        "files": checkpoint.shards(), "bias": has_bias(model),
        "tied_embeddings": model.tied_embeddings, "kv_bytes_per_token": before, "budgets": budgets,
    });
    Ok(Output { text, json }.noting(&checkpoint))
}

/// The largest k that divides the heads of every layer and fits the budget.
fn equal_groups(heads: &[usize], most: usize) -> usize {
    let largest = heads.iter().copied().min().unwrap_or(1);
    let fits = |k: &usize| heads.iter().all(|h| h % k == 0) && k * heads.len() <= most;
    (1..=largest).rev().find(fits).unwrap_or(1)
}

/// Whether queries, keys or values have biases.
fn has_bias(model: &Architecture) -> bool {
    let stored = model.layers.iter().filter_map(|layer| layer.stored.as_ref());
    stored.flat_map(|stored| [&stored.query, &stored.key, &stored.value]).any(|part| part.bias.is_some())
}
