//! What a calibration rests on, and what became of the model on text that fitted nothing.

use qcqa::calibration::{Calibration, ENOUGH_TOKENS_PER_DIMENSION};
use qcqa::pipeline::{Compressed, Effect, Stage, TextEffect};
use qcqa::text::{Text, Windows};
use serde_json::{Value, json};

use crate::calibrated::OWN;
use crate::report::{counts, evaluation_json, percent, table};

/// Windows of a text that validate.
fn validation(text: &Text) -> usize {
    text.validation().map_or(0, Windows::count)
}

/// What a calibration was made of, and what it lacks, in lines.
pub(super) fn rests_on(calibration: &Calibration<'_>) -> String {
    let (tokens, share) = (calibration.moments().tokens(), calibration.tokens_per_dimension());
    let over = format!("{tokens} tokens, {share:.1} for each input dimension");
    let Some((_, texts)) = calibration.text() else {
        return format!("calibration: moments over {over}\n");
    };
    let choose = texts.validation().map_or(0, Windows::count);
    let first = format!("calibration: {} windows fit ({over}), {choose} validate", texts.fit().count());
    let of =
        |text: &Text| format!("- {}: {} fit, {} validate", text.name(), text.fit().count(), validation(text));
    let each = texts.each().iter().filter(|_| texts.each().len() > 1).map(of);
    let notes = notes(calibration).into_iter().map(|note| format!("note: {note}"));
    [first].into_iter().chain(each).chain(notes).map(|line| line + "\n").collect()
}

/// What a calibration by texts lacks.
fn notes(calibration: &Calibration<'_>) -> Vec<String> {
    let mut notes = Vec::new();
    for text in calibration.text().into_iter().flat_map(|(_, texts)| texts.each()) {
        let (name, read, distinct) = (text.name(), text.read(), text.distinct());
        if text.validation().is_none() && text.distinct() > 1 {
            notes.push(format!("an encoder has no loss to choose by: all windows of {name} fit"));
        } else if text.validation().is_none() {
            notes.push(format!(
                "{name} has one window: it fits, chooses nothing, and shows nothing of what became of the model"
            ));
        }
        if distinct < read {
            notes.push(format!(
                "{name} repeats itself or a text before it: of {read} windows read {distinct} are new"
            ));
        }
        if name == OWN {
            notes.push(
                "what the model writes itself is no substitute for text: with it a base model ended 5% further from its source, \
                 an instruct model at a third of its cache 1.8 to 2 times further"
                    .to_string(),
            );
        }
    }
    notes.extend(calibration.windows_needed().map(|windows| {
        format!(
            "below {ENOUGH_TOKENS_PER_DIMENSION} tokens for each input dimension more text still helps much: {windows} windows \
             would do (--calibration-windows, and texts that have as many)"
        )
    }));
    notes
}

/// That a text on which a model is evaluated is no other than the calibration's.
pub(super) fn known(calibration: Option<&Calibration<'_>>, windows: &Windows) -> Option<String> {
    let (_, texts) = calibration?.text()?;
    let (known, all) = (texts.known(windows), windows.count());
    (known > 0).then(|| format!("{known} of {all} windows of --text fitted or chose: its figures flatter"))
}

/// The numbers of [`rests_on`].
pub(super) fn rests_on_json(calibration: &Calibration<'_>) -> Value {
    let of = |text: &Text| {
        json!({
            "text": text.name(), "read": text.read(), "distinct": text.distinct(), "fit_windows": text.fit().count(),
            "validation_windows": validation(text),
        })
    };
    let texts = calibration.text().map(|(_, texts)| texts.each().iter().map(of).collect::<Vec<_>>());
    json!({
        "tokens": calibration.moments().tokens(), "tokens_per_dimension": calibration.tokens_per_dimension(),
        "windows_needed": calibration.windows_needed(), "texts": texts.unwrap_or_default(),
        "notes": notes(calibration),
    })
}

/// The stages, and the model before and after on every text.
pub(super) fn outcome(compressed: &Compressed<'_>) -> String {
    if compressed.effects.is_empty() {
        return "no window fitted nothing: what became of the model is to be measured on another text (qcqa eval)\n".to_string();
    }
    let stage = |stage: &Stage| {
        let kept = if stage.kept { " (kept)" } else { "" };
        format!("{} {:.4}{kept}", stage.name(), stage.kl())
    };
    let stages: Vec<String> = compressed.stages.iter().map(stage).collect();
    let perplexities = |Effect { before, after, .. }: &Effect| [before.perplexity(), after.perplexity()];
    let kl = |effect: &Effect| effect.after.divergence.map_or("-".into(), |d| format!("{:.4}", d.kl));
    let close = compressed.effects.iter().any(TextEffect::is_fitted_closely);
    let row = |effect: &TextEffect| {
        let TextEffect { name, validation, fitted, .. } = effect;
        let [before, after] = perplexities(validation).map(|p| format!("{p:.2}"));
        let same = validation.after.divergence.map_or("-".into(), |d| percent(d.same_top));
        let [fit_before, fit_after] = perplexities(fitted);
        let beside = format!("{fit_before:.2} → {fit_after:.2}, KL {}", kl(fitted));
        let beside = if effect.is_fitted_closely() { beside } else { "-".into() };
        [name.clone(), validation.after.tokens.to_string(), before, after, kl(validation), same, beside]
    };
    let header = [
        "on text that fitted nothing",
        "tokens",
        "before",
        "after",
        "KL to source",
        "same top token",
        "where it fitted",
    ];
    let rows = compressed.effects.iter().map(row);
    let table = if close {
        table(header, rows)
    } else {
        let [header @ .., _] = header;
        table(header, rows.map(|[row @ .., _]: [String; 7]| row))
    };
    format!("KL to source, stage by stage: {}\n\n{table}", stages.join(", "))
}

/// The numbers of [`outcome`]: a row for each text, and the stages.
pub(super) fn outcome_json(compressed: &Compressed<'_>) -> (Value, Value) {
    let fields = |effect: &Effect| {
        let mut fields = evaluation_json(&effect.after);
        fields["source_perplexity"] = json!(effect.before.perplexity());
        fields["source_loss"] = json!(effect.before.loss);
        fields
    };
    let text = |effect: &TextEffect| {
        let mut row = fields(&effect.validation);
        row["text"] = json!(effect.name);
        row["fitted"] = fields(&effect.fitted);
        row
    };
    let stage = |stage: &Stage| {
        let (name, kept) = (stage.name(), stage.kept);
        json!({ "stage": name, "pooling": stage.made, "kl": stage.kl(), "loss": stage.loss(), "kept": kept })
    };
    (compressed.effects.iter().map(text).collect(), compressed.stages.iter().map(stage).collect())
}

/// What the limits of the target cost, in a line; nothing where that was not measured.
pub(super) fn limit_cost(compressed: &Compressed<'_>) -> String {
    let Some(cost) = &compressed.limit_cost else { return String::new() };
    let target = compressed.plan().method.target.as_deref().unwrap_or_default();
    if cost.plan.groups().eq(compressed.plan().groups()) {
        return format!("what the limits of {target} cost: nothing, the plan without them is the same\n");
    }
    let figures = |of: fn(&Stage) -> f64| format!("{:.4} → {:.4}", of(&cost.without), of(&cost.within));
    format!(
        "what the limits of {target} cost, before any refit: loss {}, KL to source {} (without them {} groups)\n",
        figures(Stage::loss),
        figures(Stage::kl),
        counts(&cost.plan.group_counts()),
    )
}

/// The numbers of [`limit_cost`].
pub(super) fn limit_cost_json(compressed: &Compressed<'_>) -> Value {
    let fields = |stage: &Stage| json!({ "loss": stage.loss(), "kl": stage.kl() });
    compressed.limit_cost.as_ref().map_or(Value::Null, |cost| {
        json!({
            "target": compressed.plan().method.target, "loss": cost.loss(), "kl": cost.kl(),
            "without": fields(&cost.without), "within": fields(&cost.within), "plan_without": cost.plan,
        })
    })
}
