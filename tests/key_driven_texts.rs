//! Energies of keys as they are measured on texts, in files of moments, and as the command line asks for them.
#![cfg(feature = "cli")]

mod command;
mod models;
mod running;

use std::collections::HashMap;
use std::path::Path;

use command::{done, fails, json, text};
use models::says;
use ndarray::{Axis, s};
use qcqa::calibration::{Calibration, Moments};
use qcqa::files::WriteOptions;
use qcqa::grouping::DynamicKeyNorm;
use qcqa::heads::HeadSource;
use qcqa::plan::SharedHeads;
use qcqa::runtime::Model;
use qcqa::text::Windows;
use qcqa::{Error, Grouping, Run};
use running::{Slow, calibration_text, novels, planned, ready};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn measured(model: &Model, windows: &Windows) -> Moments {
    Moments::measure(model, windows, Run::new(0)).unwrap()
}

#[test]
fn energies_are_their_definition() {
    for kv_heads in [6, 2] {
        let (_root, checkpoint, model, windows) = ready(kv_heads);
        let moments = measured(&model, &windows);
        let slow = Slow { checkpoint: &checkpoint, shared: None };
        for (i, (found, moment)) in moments.key_energies().unwrap().iter().zip(moments.layers()).enumerate() {
            let heads = checkpoint.heads(i).unwrap();
            assert_eq!((found.windows(), found.n_heads()), (6, kv_heads));
            let rows = heads.key().augmented(0..heads.key().head_dim(), f64::from);
            let h = heads.key().head_dim();
            for (w, window) in windows.tokens().chunks(8).enumerate() {
                let x = &slow.run(window).1[i];
                for head in 0..kv_heads {
                    let rows = rows.slice(s![head * h..(head + 1) * h, ..]);
                    let (weight, bias) = (rows.slice(s![.., ..24]), rows.column(24));
                    let keys = x.dot(&weight.t()) + bias;
                    let (expected, found) = (keys.mapv(|v| v * v).sum() / 8.0, found.energies()[[w, head]]);
                    assert!(
                        (found - expected).abs() <= 1e-4 * expected,
                        "{i} {w} {head}: {found} {expected}"
                    );
                }
            }
            // Their mean over the windows is what the moment says.
            for (head, mean) in found.energies().mean_axis(Axis(0)).unwrap().into_iter().enumerate() {
                let rows = rows.slice(s![head * h..(head + 1) * h, ..]);
                let expected = (&rows.dot(&moment.matrix()) * &rows).sum();
                assert!((mean - expected).abs() <= 1e-4 * expected, "{i} {head}: {mean} {expected}");
            }
        }
    }
}

/// Of a model whose heads share already, in any order, the energies are those of its groups.
#[test]
fn energies_of_shared_heads_are_in_the_order_of_groups() {
    let (_root, checkpoint, _, windows) = ready(6);
    let groups = vec![qcqa::partition::Partition::from_labels(&[0, 0, 0, 1, 2, 2]).unwrap(); 2];
    let plan = models::plan(&checkpoint, &groups);
    let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
    let found = measured(&planned(&checkpoint, &shared), &windows);
    let of_first = &found.key_energies().unwrap()[0];
    let (key, moment) = (shared.layer(0).unwrap().1.key, found.layers()[0].matrix());
    let (rows, h) = (key.augmented(0..key.head_dim(), f64::from), key.head_dim());
    for (group, mean) in of_first.energies().mean_axis(Axis(0)).unwrap().into_iter().enumerate() {
        let rows = rows.slice(s![group * h..(group + 1) * h, ..]);
        let expected = (&rows.dot(&moment) * &rows).sum();
        assert!((mean - expected).abs() <= 1e-4 * expected, "{group}: {mean} {expected}");
    }
}

/// Shape and bytes of a tensor; `None` to leave it out.
type Stored = Option<(Vec<usize>, Vec<u8>)>;

/// Writes a file again, with its tensors changed.
fn rewritten(from: &Path, to: &Path, change: impl Fn(&str, &TensorView<'_>) -> Stored) {
    let bytes = std::fs::read(from).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let changed: Vec<_> = tensors
        .iter()
        .filter_map(|(name, tensor)| Some((name.to_string(), tensor.dtype(), change(name, &tensor)?)))
        .collect();
    let views: HashMap<_, _> = changed
        .iter()
        .map(|(name, dtype, (shape, data))| {
            (name.clone(), TensorView::new(*dtype, shape.clone(), data).unwrap())
        })
        .collect();
    std::fs::write(to, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn same(tensor: &TensorView<'_>) -> Stored {
    Some((tensor.shape().to_vec(), tensor.data().to_vec()))
}

#[test]
fn files_hold_the_energies_of_all_layers_or_none() {
    let (root, checkpoint, model, windows) = ready(6);
    let [path, other] = ["moments.safetensors", "other.safetensors"].map(|name| root.path().join(name));
    let moments = measured(&model, &windows);
    moments.write(&path, WriteOptions::default()).unwrap();
    let read = Moments::read(&path, model.id()).unwrap();
    assert_eq!(read.key_energies(), moments.key_energies());
    let calibration = Calibration::new(&checkpoint, read).unwrap();
    let heads = calibration.heads(1).unwrap();
    assert_eq!(heads.key_energies(), Some(&moments.key_energies().unwrap()[1]));
    assert!(DynamicKeyNorm::default().group(&heads, 3).unwrap().is_some());

    // A file from before there were any.
    rewritten(&path, &other, |name, tensor| same(tensor).filter(|_| !name.starts_with("keys.")));
    let old = Moments::read(&other, model.id()).unwrap();
    assert_eq!((old.key_energies(), old.layers()), (None, moments.layers()));
    assert_eq!(old.fingerprint(), moments.fingerprint(), "it names the same windows");
    let heads = Calibration::new(&checkpoint, old).unwrap().heads(0).unwrap();
    let missing = DynamicKeyNorm::default().group(&heads, 3).unwrap_err();
    says(&missing.to_string(), &["energies of keys", "not among these moments", "measure them again"]);

    // Without a name of their own, moments are named by all that they hold.
    let named = |change: &dyn Fn(&str, &TensorView<'_>) -> Stored| {
        rewritten(&path, &other, |name, tensor| change(name, tensor).filter(|_| name != "calibration"));
        Moments::read(&other, model.id()).map(|moments| moments.fingerprint())
    };
    let (with, without) = (
        named(&|_, tensor| same(tensor)).unwrap(),
        named(&|name, tensor| same(tensor).filter(|_| !name.starts_with("keys."))).unwrap(),
    );
    assert_ne!(with, without);

    let refused = |change: &dyn Fn(&TensorView<'_>) -> Stored| {
        let change = |name: &str, tensor: &TensorView<'_>| match name {
            "keys.1" => change(tensor),
            _ => same(tensor),
        };
        named(&change).unwrap_err().to_string()
    };
    let number = |value: f64| {
        move |tensor: &TensorView<'_>| {
            let (shape, mut data) = same(tensor)?;
            data[16..24].copy_from_slice(&value.to_le_bytes());
            Some((shape, data))
        }
    };
    says(&refused(&|_| None), &["other.safetensors", "keys.1", "F64 [windows, 6]", "nothing"]);
    says(&refused(&number(f64::NAN)), &["keys.1", "finite and at least 0", "measure it again"]);
    says(&refused(&number(-1.0)), &["keys.1", "at least 0"]);
    let reshaped = |shape: [usize; 2]| {
        move |tensor: &TensorView<'_>| {
            Some((shape.to_vec(), tensor.data()[..8 * shape[0] * shape[1]].to_vec()))
        }
    };
    says(&refused(&reshaped([6, 5])), &["keys.1", "[6, 5]"]);
    says(&refused(&reshaped([0, 6])), &["keys.1", "[0, 6]"]);
}

/// The command line: without a calibration, with a text, with moments of now and of before.
#[test]
fn dgqa_asks_for_a_calibration() {
    let root = tempfile::tempdir().unwrap();
    let [moments, old, plan] =
        ["m.safetensors", "old.safetensors", "p.json"].map(|name| root.path().join(name));
    let (model, words) = (models::novels(), calibration_text());
    let search = ["search", text(&model), "--kv", "0.5", "--method", "dgqa", "--out", text(&plan), "--force"];
    says(&fails(2, &search), &["energies of keys", "give a calibration text", "--calibration TEXT"]);
    let windows = ["--calibration-windows", "8"];
    let by_text = json(&[&search[..], &["--calibration", text(&words)], &windows].concat());
    let method = &by_text["plan"]["method"];
    assert_eq!((&method["name"], &method["search"][0]["name"]), (&"dgqa".into(), &"key-norm-ema".into()));
    assert!(method["calibration"].is_string() && by_text["note"].is_null(), "{method}");
    done(&["calibrate", text(&model), "--text", text(&words), "--windows", "8", "--out", text(&moments)]);
    let by_file = json(&[&search[..], &["--calibration", text(&moments)]].concat());
    assert_eq!(by_file["plan"]["layers"], by_text["plan"]["layers"]);
    assert_eq!(by_file["plan"]["method"]["calibration"], method["calibration"]);
    rewritten(&moments, &old, |name, tensor| same(tensor).filter(|_| !name.starts_with("keys.")));
    let again = fails(2, &[&search[..], &["--calibration", text(&old)]].concat());
    says(&again, &["not among these moments", "`qcqa calibrate`"]);
    // A plan of it is obeyed without the calibration that made it: nothing is pooled under moments.
    let short = root.path().join("short.txt");
    let start: String = std::fs::read_to_string(&words).unwrap().chars().take(3000).collect();
    std::fs::write(&short, start).unwrap();
    done(&["eval", text(&model), "--plan", text(&plan), "--text", text(&short)]);
    let compare = ["compare", text(&model), "--kv", "0.5", "--method", "dgqa,pgqa"];
    let compared = json(&[&compare[..], &["--calibration", text(&moments)]].concat());
    let names: Vec<_> = compared["lines"].as_array().unwrap().iter().map(|line| &line["method"]).collect();
    assert_eq!(names, ["dgqa", "pgqa"]);
}

#[test]
fn calibrations_measure_energies_on_what_fits() {
    let checkpoint = novels();
    let calibration = Calibration::from_text(&checkpoint, &calibration_text(), 4, Run::new(0)).unwrap();
    let heads = calibration.heads(0).unwrap();
    assert_eq!(heads.key_energies().unwrap().windows(), 2, "of four windows two fit");
    assert!(matches!(
        DynamicKeyNorm::default().group(&checkpoint.heads(0).unwrap(), 2),
        Err(Error::KeyEnergies(_))
    ));
}
