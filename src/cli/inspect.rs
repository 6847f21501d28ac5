use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::output::{Output, bytes, file_bytes, percent, table};
use super::{Done, fraction};
use crate::checkpoint::Checkpoint;
use crate::{Budget, SearchSpace, kv_bytes_per_token};

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Directory of the model: config.json and safetensors
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Budgets to show
    #[arg(long, value_name = "FRACTIONS", value_delimiter = ',', value_parser = fraction)]
    #[arg(default_values = ["0.75", "0.5", "0.25", "0.125"])]
    kv: Vec<f64>,
}

pub(super) fn inspect(args: &InspectArgs) -> Done {
    let checkpoint = Checkpoint::open(&args.model)?;
    let config = checkpoint.config();
    let source = checkpoint.source()?;
    let (layers, heads) = (config.n_layers, config.kv_heads);
    let kv_bytes = |kv_heads| kv_bytes_per_token(kv_heads, config.head_dim, checkpoint.dtype().bytes());
    let before = kv_bytes(layers * heads);
    let divisors = SearchSpace::equal().group_counts(heads)?;

    let mut rows = Vec::new();
    let mut budgets = Vec::new();
    for &kv in &args.kv {
        // Below one head a layer there is nothing to show but that.
        let Ok(most) = Budget::Fraction(kv).kv_heads(layers, heads) else {
            rows.push([kv.to_string(), "-".into(), "-".into(), "unreachable".into(), "-".into()]);
            budgets.push(json!({ "kv": kv, "reachable": false }));
            continue;
        };
        let equal = divisors.iter().copied().rfind(|k| k * layers <= most).unwrap_or(1);
        let after = kv_bytes(most);
        let saved = 1.0 - after as f64 / before as f64;
        rows.push([
            kv.to_string(),
            most.to_string(),
            format!("{equal} ({})", percent(equal as f64 / heads as f64)),
            bytes(after as u64),
            percent(saved),
        ]);
        budgets.push(json!({
            "kv": kv, "reachable": true, "kv_heads": most, "equal_groups": equal,
            "kv_bytes_per_token": after, "saved": saved,
        }));
    }
    let header = ["budget", "KV heads at most", "equal groups a layer", "KV bytes a token", "saved"];
    let bias = if checkpoint.has_bias() { ", biases" } else { "" };
    let tied = if config.tie_word_embeddings { ", tied embeddings" } else { "" };
    let text = format!(
        "{}: {}, {} layers, {} query heads on {} KV heads of {}, width {}\n\
         weights: {}, {} in {} file(s){bias}{tied}\n\
         KV cache: {} a token\n\n{}",
        args.model.display(),
        config.model_type,
        layers,
        config.query_heads,
        heads,
        config.head_dim,
        config.hidden,
        checkpoint.dtype().name(),
        file_bytes(checkpoint.weight_bytes()),
        checkpoint.shards(),
        bytes(before as u64),
        table(header, rows),
    );
    let json = json!({
        "model": args.model, "source": source, "weight_bytes": checkpoint.weight_bytes(),
        "files": checkpoint.shards(), "bias": checkpoint.has_bias(),
        "tied_embeddings": config.tie_word_embeddings, "kv_bytes_per_token": before, "budgets": budgets,
    });
    Ok(Output { text, json })
}
