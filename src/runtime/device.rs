//! Where models run. Everything else takes its device from the model.

use std::sync::OnceLock;

use candle_core::{Device as Place, Error, cuda};

use super::RuntimeError;
use crate::run::Device;

/// The GPU, opened once: tensors of two openings cannot meet.
static CUDA: OnceLock<Place> = OnceLock::new();

/// Opens a device.
///
/// On a GPU products of f32 round their factors to TF32 (10 bits of mantissa) and sum in f32. Work is queued in one stream,
/// whichever thread it comes from: candle's own choice, a stream for each thread, orders nothing between them.
///
/// # Errors
/// [`RuntimeError::Device`] in a build without CUDA, and on a machine without a GPU for it.
pub(super) fn open(device: Device) -> Result<Place, RuntimeError> {
    match (device, CUDA.get()) {
        (Device::Cpu, _) => Ok(Place::Cpu),
        (Device::Cuda, Some(place)) => Ok(place.clone()),
        (Device::Cuda, None) => {
            cuda::set_gemm_reduced_precision_f32(true);
            let opened = Place::new_cuda_with_stream(0).map_err(|error| RuntimeError::Device {
                device,
                reason: match error {
                    Error::NotCompiledWithCudaSupport => {
                        "this build has none; build with the feature `cuda`".into()
                    }
                    error => error.to_string(),
                },
            })?;
            Ok(CUDA.get_or_init(|| opened).clone())
        }
    }
}

/// What an opened device is.
pub(super) fn of(place: &Place) -> Device {
    if place.is_cpu() { Device::Cpu } else { Device::Cuda }
}
