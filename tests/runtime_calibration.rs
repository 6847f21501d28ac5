//! Moments and the errors they calibrate, against their definitions.
#![cfg(feature = "runtime")]

mod models;
mod running;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;

use approx::assert_relative_eq;
use ndarray::{Array1, Array2, Axis, concatenate};
use qcqa::calibration::{Calibration, Moments, TextSource};
use qcqa::evaluation::Trial;
use qcqa::files::WriteOptions;
use qcqa::fitness::WeightSharingError;
use qcqa::heads::{HeadSource, Heads, Moment, Projection};
use qcqa::partition::Partition;
use qcqa::plan::{Pooling, SharedHeads};
use qcqa::pooler::{LowRankPooler, MeanPooler};
use qcqa::spec::Spec;
use qcqa::text::Windows;
use qcqa::{FitnessFn, KvPooler, Progress, Run};
use running::{Slow, calibration_text, novels, ready};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

#[test]
fn moments_are_their_definition() {
    let (_root, checkpoint, model, windows) = ready(6);
    let moments = Moments::measure(&model, &windows, Run::new(0)).unwrap();
    assert_eq!((moments.n_layers(), moments.tokens()), (2, 48));
    let slow = Slow { checkpoint: &checkpoint, shared: None };
    let mut sums = vec![Array2::<f64>::zeros((25, 25)); 2];
    for window in windows.tokens().chunks(8) {
        for (sum, x) in sums.iter_mut().zip(slow.run(window).1) {
            let x = concatenate![Axis(1), x, Array2::ones((8, 1))];
            *sum += &x.t().dot(&x);
        }
    }
    for (i, sum) in sums.into_iter().enumerate() {
        let (found, expected) = (moments.layers()[i].matrix(), sum / 48.0);
        assert_eq!(found[[24, 24]], 1.0);
        for ((at, &found), &expected) in found.indexed_iter().zip(&expected) {
            assert_relative_eq!(found, expected, epsilon = 1e-5, max_relative = 1e-5);
            assert_eq!(found, moments.layers()[i].matrix()[[at.1, at.0]]);
        }
        let heads = moments.attach(checkpoint.heads(i).unwrap()).unwrap();
        assert_eq!(heads.moment(), Some(&moments.layers()[i]));
    }
    let beyond = checkpoint.heads(0).unwrap().with_layer(2);
    let error = moments.attach(beyond).unwrap_err().to_string();
    models::says(&error, &["layer 2 does not exist", "2 layers"]);
}

#[test]
fn moments_come_back_from_their_file() {
    let (root, _, model, windows) = ready(6);
    let moments = Moments::measure(&model, &windows, Run::new(0)).unwrap();
    let path = root.path().join("moments.safetensors");
    moments.write(&path, WriteOptions::default()).unwrap();
    assert_eq!(Moments::read(&path, model.id()).unwrap(), moments);
    models::says(&moments.write(&path, WriteOptions::default()).unwrap_err().to_string(), &["exists"]);
    moments.write(&path, WriteOptions::default().force(true)).unwrap();
    assert_eq!(Moments::read(&path, model.id()).unwrap(), moments);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 2, "nothing else is left");

    // The same moments are the same bytes, whatever a hash map thinks of it.
    let bytes = std::fs::read(&path).unwrap();
    for _ in 0..16 {
        moments.write(&path, WriteOptions::default().force(true)).unwrap();
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
}

/// What a pooler makes of a moment that is none is told of its layer.
#[test]
fn a_moment_that_is_none_names_its_layer() {
    let (root, checkpoint, model, _) = ready(6);
    let path = root.path().join("moments.safetensors");
    let good = Array2::<f64>::eye(25);
    foreign(&path, &[9], &[good.clone(), good + 1e3 * corner()], None);
    let moments = Moments::read(&path, model.id()).unwrap();
    let groups = vec![Partition::one_group(6).unwrap(); 2];
    let calibration = Calibration::new(&checkpoint, moments).unwrap();
    let pooling = Pooling::new(Spec::new("low-rank")).with_calibration(calibration.calibration());
    let plan = models::pooled_plan(&checkpoint, &groups, pooling);
    let shared = SharedHeads::new(&plan, &calibration).unwrap();
    shared.layer(0).unwrap();
    let refused = shared.layer(1).unwrap_err();
    models::says(&refused.to_string(), &["layer 1", "no negative eigenvalue", "measure it again"]);
    let windows = Windows::new((0..16).collect(), 8).unwrap();
    let pooler = LowRankPooler::default();
    let trial = Trial::new(&calibration, &model, &pooler, &windows);
    models::says(&trial.grouped(&groups).unwrap_err().to_string(), &["layer 1", "no negative eigenvalue"]);
}

/// Writes a file of moments as somebody else might.
fn foreign(path: &Path, tokens: &[i64], layers: &[Array2<f64>], fingerprint: Option<&str>) {
    let bytes: Vec<Vec<u8>> =
        layers.iter().map(|l| l.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let counts: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    let mut views = HashMap::new();
    for (i, (layer, bytes)) in layers.iter().zip(&bytes).enumerate() {
        views.insert(
            format!("layers.{i}"),
            TensorView::new(Dtype::F64, layer.shape().to_vec(), bytes).unwrap(),
        );
    }
    views.insert("tokens".into(), TensorView::new(Dtype::I64, vec![tokens.len()], &counts).unwrap());
    let metadata = fingerprint.map(|f| HashMap::from([("fingerprint".to_string(), f.to_string())]));
    std::fs::write(path, safetensors::serialize(views, metadata).unwrap()).unwrap();
}

#[test]
fn moments_that_do_not_fit_are_refused() {
    let (root, _, model, _) = ready(6);
    let path = root.path().join("moments.safetensors");
    let good = Array2::<f64>::eye(25);
    let spoilt = |at: (usize, usize), value: f64| {
        let mut moment = good.clone();
        moment[at] = value;
        moment
    };
    let error = |tokens: &[i64], layers: &[Array2<f64>], fingerprint: Option<&str>| {
        foreign(&path, tokens, layers, fingerprint);
        Moments::read(&path, model.id()).unwrap_err().to_string()
    };
    let two = |second: Array2<f64>| [good.clone(), second];
    let value = |at, v| error(&[9], &two(spoilt(at, v)), None);
    models::says(&value((3, 4), f64::NAN), &["moments.safetensors", "layers.1", "NaN"]);
    models::says(&value((3, 3), f64::INFINITY), &["layers.1", "infinities"]);
    models::says(&value((3, 4), 0.5), &["layers.1", "not symmetric"]);
    models::says(&value((3, 3), -0.5), &["layers.1", "negative diagonal"]);
    models::says(&value((24, 24), 2.0), &["layers.1", "end with 1"]);
    let unseen = Array2::from_diag(&Array1::from_shape_fn(25, |i| f64::from(u8::from(i == 24))));
    models::says(&error(&[9], &two(unseen), None), &["moments.safetensors", "layers.1", "0 for every input"]);
    models::says(&error(&[9], &two(Array2::eye(17)), None), &["another model", "width", "17", "25"]);
    models::says(&error(&[9], &two(Array2::zeros((25, 5))), None), &["layers.1", "[25, 25]", "[25, 5]"]);
    models::says(
        &error(&[9], std::slice::from_ref(&good), None),
        &["another model", "number of layers", "1", "2"],
    );
    models::says(&error(&[9], &two(good.clone()), Some("sha256:00")), &["another model", "fingerprint"]);
    models::says(&error(&[0], &two(good.clone()), None), &["tokens", "above 0", "found 0"]);
    models::says(&error(&[1, 2], &two(good.clone()), None), &["tokens", "found I64 [2]"]);
    foreign(&path, &[9], &two(good.clone()), None);
    assert_eq!(Moments::read(&path, model.id()).unwrap().tokens(), 9);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let message = Moments::read(&path, model.id()).unwrap_err().to_string();
    models::says(&message, &["not a whole safetensors file", "make or download it again"]);
}

/// The calibrated error by its definition: errors of keys and values over actual inputs.
#[test]
fn the_calibrated_error_is_its_definition() {
    let (_root, checkpoint, model, windows) = ready(6);
    let moments = Moments::measure(&model, &windows, Run::new(0)).unwrap();
    let slow = Slow { checkpoint: &checkpoint, shared: None };
    let inputs: Vec<_> = windows.tokens().chunks(8).map(|window| slow.run(window).1).collect();
    for layer in 0..2 {
        let heads = moments.attach(checkpoint.heads(layer).unwrap()).unwrap();
        let fitness = WeightSharingError::calibrated(&heads).unwrap();
        let mha = mean_error(&heads, &Partition::singletons(6).unwrap(), layer, &inputs);
        assert_eq!((fitness.evaluate(&Partition::singletons(6).unwrap()).unwrap(), mha), (0.0, 0.0));
        for labels in [[0, 1, 0, 2, 1, 1], [0; 6], [0, 0, 1, 1, 2, 2]] {
            let partition = Partition::from_labels(&labels).unwrap();
            let expected = mean_error(&heads, &partition, layer, &inputs);
            assert_relative_eq!(fitness.evaluate(&partition).unwrap(), expected, max_relative = 1e-4);
        }
    }
}

/// The mean over tokens of the squared errors of keys and values that a partition makes.
fn mean_error(heads: &Heads, groups: &Partition, layer: usize, inputs: &[Vec<Array2<f64>>]) -> f64 {
    let pooled = MeanPooler.pool(heads, groups).unwrap();
    let (mut sum, mut tokens) = (0.0, 0);
    for x in inputs.iter().flat_map(|window| window[layer].rows()) {
        tokens += 1;
        for (own, shared) in [(heads.key(), &pooled.key), (heads.value(), &pooled.value)] {
            for head in 0..heads.n_heads() {
                let of = |p: &Projection, i: usize| -> Array1<f64> {
                    let weight = p.weight().index_axis(Axis(0), i).mapv(f64::from);
                    weight.dot(&x) + p.bias().unwrap().row(i).mapv(f64::from)
                };
                sum += (of(own, head) - of(shared, groups.group_of(head))).mapv(|e| e * e).sum();
            }
        }
    }
    sum / f64::from(tokens)
}

/// With the identity as moment the calibrated error is the plain one.
#[test]
fn the_calibrated_error_needs_a_moment() {
    let (_root, checkpoint, ..) = ready(3);
    let heads = checkpoint.heads(0).unwrap();
    models::says(&WeightSharingError::calibrated(&heads).unwrap_err().to_string(), &["no input moment"]);
    let plain = WeightSharingError::new(&heads).unwrap();
    let heads = heads.with_moment(Moment::new(Array2::eye(25)).unwrap()).unwrap();
    let calibrated = WeightSharingError::calibrated(&heads).unwrap();
    for (a, b) in plain.distances().iter().zip(calibrated.distances()) {
        assert_relative_eq!(a, b, max_relative = 1e-6);
    }
    assert_relative_eq!(plain.energy().unwrap(), calibrated.energy().unwrap(), max_relative = 1e-6);
    // Positive on its diagonal, but not for the difference of two inputs.
    let negative = Moment::new(Array2::eye(25) + 1e3 * corner()).unwrap();
    let negative = heads.with_moment(negative).unwrap();
    models::says(&WeightSharingError::calibrated(&negative).unwrap_err().to_string(), &["squared distances"]);
}

#[test]
fn moments_are_named_by_what_they_were_measured_on() {
    let (root, checkpoint, model, windows) = ready(6);
    let run = Run::new(0);
    let moments = Moments::measure(&model, &windows, run).unwrap();
    let name = moments.fingerprint();
    assert!(name.starts_with("sha256:") && name.len() == 71);
    assert_eq!(name, windows.fingerprint(model.id()));
    let path = root.path().join("moments.safetensors");
    moments.write(&path, WriteOptions::default()).unwrap();
    assert_eq!(Moments::read(&path, model.id()).unwrap().fingerprint(), name);
    assert_eq!(
        Calibration::open(&checkpoint, &[TextSource::file(&path)], 8, run).unwrap().moments(),
        &moments
    );

    // Another text, other windows of the same length of it, another model: another name.
    let tokens = windows.tokens().to_vec();
    let longer = Windows::new(tokens.clone(), 12).unwrap();
    let mut other = tokens;
    other[3] = (other[3] + 1) % 16;
    let other = Windows::new(other, 8).unwrap();
    let (_root, _, stranger, _) = ready(3);
    let names = [
        longer.fingerprint(model.id()),
        other.fingerprint(model.id()),
        windows.clone().first(2).fingerprint(model.id()),
        windows.fingerprint(stranger.id()),
    ];
    assert!(names.iter().all(|other| *other != name));

    // A file from elsewhere is named by its contents, and keeps the name.
    let layers = [Array2::eye(25), Array2::eye(25)];
    let foreign_name = |tokens: i64, layers: &[Array2<f64>]| {
        foreign(&path, &[tokens], layers, None);
        Moments::read(&path, model.id()).unwrap()
    };
    let read = foreign_name(9, &layers);
    assert_eq!(read.fingerprint(), foreign_name(9, &layers).fingerprint());
    assert_ne!(read.fingerprint(), foreign_name(8, &layers).fingerprint());
    assert_ne!(
        read.fingerprint(),
        foreign_name(9, &[Array2::eye(25), Array2::eye(25) + 1e-4 * corner()]).fingerprint()
    );
    // It is no file of ours that might be replaced.
    let error = read.write(&path, WriteOptions::default().force(true)).unwrap_err().to_string();
    models::says(&error, &["that qcqa wrote", "move it away"]);
    std::fs::remove_file(&path).unwrap();
    read.write(&path, WriteOptions::default()).unwrap();
    assert_eq!(Moments::read(&path, model.id()).unwrap().fingerprint(), read.fingerprint());

    // A name that is none is refused, with the file.
    let bytes = std::fs::read(&path).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let digest = stored.tensor("calibration").unwrap();
    assert_eq!((digest.dtype(), digest.shape()), (Dtype::U8, &[32][..]));
    assert!(read.fingerprint().ends_with(&format!("{:02x}", digest.data()[31])));
    for (dtype, shape) in [(Dtype::U8, vec![16]), (Dtype::U8, vec![2, 16]), (Dtype::I64, vec![4])] {
        let length = shape.iter().product::<usize>() * if dtype == Dtype::I64 { 8 } else { 1 };
        let wrong = TensorView::new(dtype, shape, &digest.data()[..length]).unwrap();
        let others = stored.tensors().into_iter().filter(|(name, _)| name != "calibration");
        let all = others.chain([("calibration".to_string(), wrong)]);
        std::fs::write(&path, safetensors::serialize(all, None).unwrap()).unwrap();
        let message = Moments::read(&path, model.id()).unwrap_err().to_string();
        models::says(&message, &["moments.safetensors", "tensor calibration", "U8 [32]"]);
    }
}

/// A calibration is the model with moments: from a text or from the file of them, and refused where a plan names another.
#[test]
fn a_calibration_attaches_its_moments() {
    let (checkpoint, run, root) = (novels(), Run::new(0), tempfile::tempdir().unwrap());
    let text = Calibration::from_text(&checkpoint, &calibration_text(), 2, run).unwrap();
    assert!(text.text().is_some_and(|(model, texts)| model.n_layers() == 4 && texts.fit().count() == 1));
    let path = root.path().join("moments.safetensors");
    text.moments().write(&path, WriteOptions::default()).unwrap();
    let stored = Calibration::open(&checkpoint, &[TextSource::file(&path)], 2, run).unwrap();
    assert!(stored.text().is_none() && stored.moments() == text.moments());
    assert_eq!(stored.calibration(), text.calibration());
    assert_eq!(
        (stored.id().unwrap(), stored.architecture()),
        (checkpoint.id().unwrap(), checkpoint.architecture())
    );
    for layer in 0..4 {
        let heads = text.heads(layer).unwrap();
        assert_eq!((heads.layer(), heads.moment()), (layer, Some(&text.moments().layers()[layer])));
        assert_eq!(heads.key(), checkpoint.heads(layer).unwrap().key());
        assert_eq!(text.rows(layer).unwrap().row_len(), checkpoint.rows(layer).unwrap().row_len());
    }

    let groups = vec![Partition::one_group(8).unwrap(); 4];
    let pooling = Pooling::new(Spec::new("low-rank")).with_calibration(text.calibration());
    let plan = models::pooled_plan(&checkpoint, &groups, pooling);
    let for_plan = |path: &Path, windows, run| {
        Calibration::for_plan(&checkpoint, &[TextSource::file(path)], &plan, windows, run)
    };
    assert_eq!(for_plan(&path, 2, run).unwrap().calibration(), text.calibration());
    assert_eq!(for_plan(&calibration_text(), 2, run).unwrap().calibration(), text.calibration());
    // Before anything is measured.
    let idle = |_: &Progress<'_>| ControlFlow::Break(());
    let refused = for_plan(&calibration_text(), 1, run.with_observer(&idle)).unwrap_err().to_string();
    models::says(&refused, &["was made with the calibration", "as many windows"]);
    let shared = SharedHeads::new(&plan, &checkpoint).unwrap_err().to_string();
    models::says(&shared, &["none was given"]);

    let (_root, small, ..) = ready(6);
    let error = Calibration::new(&small, stored.moments().clone()).unwrap_err().to_string();
    models::says(&error, &["moments", "2", "4"]);
}

/// One number beside the diagonal, and its mirror image.
fn corner() -> Array2<f64> {
    let mut moment = Array2::zeros((25, 25));
    (moment[[0, 1]], moment[[1, 0]]) = (1.0, 1.0);
    moment
}
