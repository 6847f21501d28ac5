//! Models on a GPU, and where there is none. The tensor operations that a GPU is given are tested on the CPU, beside the code.
#![cfg(feature = "runtime")]

mod models;
mod running;

use qcqa::calibration::Calibration;
use qcqa::checkpoint::Checkpoint;
use qcqa::runtime::{Model, RuntimeError};
use qcqa::{Device, Run};
use running::{calibration_text, novels};

/// Opens a model and a calibration of it there; the windows of the text are few.
fn opened_on(device: Device, checkpoint: &Checkpoint) -> Result<(Model, Calibration<'_>), RuntimeError> {
    let run = Run::new(0).on(device);
    let calibration = Calibration::from_text(checkpoint, &calibration_text(), 4, run)?;
    Ok((Model::load_on(checkpoint, run.device())?, calibration))
}

#[test]
fn models_run_where_they_are_told() {
    let checkpoint = novels();
    assert_eq!(Model::load(&checkpoint).unwrap().device(), Device::Cpu);
    let (model, calibration) = opened_on(Run::new(0).device(), &checkpoint).unwrap();
    let (reader, _) = calibration.text().unwrap();
    assert_eq!([model.device(), reader.device()], [Device::Cpu; 2]);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_cuda_no_model_and_no_calibration_is_put_there() {
    let checkpoint = novels();
    let whole = opened_on(Device::Cuda(0), &checkpoint).map(|_| ()).unwrap_err();
    let model = Model::load_on(&checkpoint, Device::Cuda(0)).map(|_| ()).unwrap_err();
    for error in [whole, model] {
        assert!(matches!(error, RuntimeError::Device { device: Device::Cuda(0), .. }), "{error}");
        models::says(&error.to_string(), &["CUDA device 0", "feature `cuda`"]);
    }
}

/// Where a GPU is: it computes what the CPU computes, but for its rounding of products.
#[cfg(feature = "cuda")]
mod cuda {
    use approx::assert_relative_eq;
    use ndarray::array;
    use qcqa::HeadSource;
    use qcqa::evaluation::{Evaluation, choose_model, evaluate_against, evaluate_through_cache};
    use qcqa::plan::{Refit, SharedHeads};
    use qcqa::refit::refit;
    use qcqa::text::Windows;
    use running::{evaluation_text, neighbours, opened, runnable, windows};
    use safetensors::Dtype;

    use super::*;

    /// The two, unless this machine has no GPU.
    fn both(checkpoint: &Checkpoint) -> Option<[Model; 2]> {
        match Model::load_on(checkpoint, Device::Cuda(0)) {
            Ok(gpu) => Some([Model::load(checkpoint).unwrap(), gpu]),
            Err(error) => {
                println!("skipped: {error}");
                None
            }
        }
    }

    fn same(cpu: &Evaluation, gpu: &Evaluation) {
        assert_eq!((cpu.tokens, cpu.windows), (gpu.tokens, gpu.windows));
        assert_relative_eq!(cpu.loss, gpu.loss, max_relative = 1e-3);
        let Some((cpu, gpu)) = cpu.divergence.zip(gpu.divergence) else { return };
        assert_relative_eq!(cpu.kl, gpu.kl, max_relative = 1e-2, epsilon = 1e-5);
        assert_relative_eq!(cpu.same_top, gpu.same_top, epsilon = 5e-3);
    }

    #[test]
    fn a_gpu_evaluates_as_the_cpu_does() {
        let checkpoint = novels();
        let Some([cpu, gpu]) = both(&checkpoint) else { return };
        let windows = windows(&checkpoint, &cpu, &evaluation_text()).first(19);
        let plan = neighbours(&checkpoint, 2);
        let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
        let run = Run::new(0);
        let [on_cpu, on_gpu] = [&cpu, &gpu].map(|source| {
            let planned = source.with_shared(&shared).unwrap();
            let (before, after) = evaluate_against(source, &[&planned], &windows, run).unwrap();
            let (_, losses) = choose_model(&[source.clone(), planned.clone()], &windows, run).unwrap();
            assert_relative_eq!(before.loss, losses[0], max_relative = 1e-5);
            assert_relative_eq!(after[0].loss, losses[1], max_relative = 1e-5);
            let cached = evaluate_through_cache(&planned, &windows.clone().first(3), 100, run).unwrap();
            [before, after[0].clone(), cached]
        });
        on_cpu.iter().zip(&on_gpu).for_each(|(cpu, gpu)| same(cpu, gpu));
        let mixed = evaluate_against(&cpu, &[&gpu], &windows, run).unwrap_err();
        assert!(matches!(mixed, RuntimeError::Device { .. }), "{mixed}");
    }

    #[test]
    fn every_family_gives_the_same_logits() {
        for (family, bias) in [("llama", false), ("mistral", false), ("qwen2", true)] {
            let (_root, checkpoint) = opened(&runnable(family, Dtype::F32, 3, bias));
            let Some([cpu, gpu]) = both(&checkpoint) else { return };
            let tokens = array![[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]];
            let [a, b] = [&cpu, &gpu].map(|model| model.logits(tokens.view()).unwrap());
            let most = a.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-2 * most), "{family}");
        }
    }

    #[test]
    fn calibration_and_refits_are_those_of_the_cpu() {
        let checkpoint = novels();
        if both(&checkpoint).is_none() {
            return;
        }
        let plan = neighbours(&checkpoint, 2);
        let [cpu, gpu] = [Device::Cpu, Device::Cuda(0)].map(|device| {
            let (model, calibration) = opened_on(device, &checkpoint).unwrap();
            let moment = calibration.heads(2).unwrap().moment().unwrap().matrix().to_owned();
            let windows: &Windows = calibration.text().unwrap().1;
            let shared = SharedHeads::new(&plan, &checkpoint).unwrap();
            (moment, refit(shared, &model, windows, Refit::Output, Run::new(0)).unwrap().errors)
        });
        let most = cpu.0.iter().fold(0.0, |most: f64, v| most.max(v.abs()));
        assert!(cpu.0.iter().zip(&gpu.0).all(|(a, b)| (a - b).abs() < 1e-2 * most));
        for (a, b) in cpu.1.iter().flatten().zip(gpu.1.iter().flatten()) {
            assert_relative_eq!(a, b, max_relative = 1e-2);
        }
    }
}
