//! Where models run. Everything else takes its device from the model.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{Device as Place, DeviceLocation, Error, Result as Candle, cuda};

use super::{Model, RuntimeError};
use crate::checkpoint::Checkpoint;
use crate::run::{Device, Precision, Run};

/// The GPUs, each opened once: tensors of two openings cannot meet.
static OPENED: Mutex<BTreeMap<usize, Place>> = Mutex::new(BTreeMap::new());
/// The number under which the one of an Apple machine stands there.
const METAL: usize = usize::MAX;

/// Opens a device.
///
/// On a GPU products of f32 round their factors to TF32 (10 bits of mantissa) and sum in f32. Work is queued in one stream,
/// whichever thread it comes from: candle's own choice, a stream for each thread, orders nothing between them.
///
/// # Errors
/// [`RuntimeError::Device`] in a build without it, and on a machine without such a GPU.
pub(super) fn open(device: Device) -> Result<Place, RuntimeError> {
    let (number, feature, new): (_, _, fn(usize) -> Candle<Place>) = match device {
        Device::Cpu => return Ok(Place::Cpu),
        Device::Cuda(number) => (number, "cuda", Place::new_cuda_with_stream),
        Device::Metal => (METAL, "metal", |_| Place::new_metal(0)),
    };
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(place) = opened.get(&number) {
        return Ok(place.clone());
    }
    cuda::set_gemm_reduced_precision_f32(true);
    let place = new(number).map_err(|error| RuntimeError::Device {
        device,
        reason: match error {
            Error::NotCompiledWithCudaSupport | Error::NotCompiledWithMetalSupport => {
                format!("this build has none; build with the feature `{feature}`")
            }
            error => error.to_string(),
        },
    })?;
    opened.insert(number, place.clone());
    Ok(place)
}

/// The first GPU that this build knows and that answers, or the CPU.
pub fn best_device() -> Device {
    let gpus = [Device::Cuda(0), Device::Metal];
    gpus.into_iter().find(|&device| open(device).is_ok()).unwrap_or(Device::Cpu)
}

/// What an opened device is.
fn of(place: &Place) -> Device {
    match place.location() {
        DeviceLocation::Cpu => Device::Cpu,
        DeviceLocation::Cuda { gpu_id } => Device::Cuda(gpu_id),
        DeviceLocation::Metal { .. } => Device::Metal,
    }
}

impl Model {
    /// Opens a checkpoint as [`Model::open`] does, on the device and in the numbers of a run.
    ///
    /// # Errors
    /// As [`Model::open`]; [`RuntimeError::Device`] where a CPU is asked for [`Precision::Bf16`].
    pub fn open_for(checkpoint: &Checkpoint, run: Run<'_>) -> Result<Self, RuntimeError> {
        Self::open(checkpoint, run.device())?.in_numbers(run.precision())
    }

    /// This model, computing in these numbers.
    ///
    /// # Errors
    /// [`RuntimeError::Device`] where a CPU is asked for [`Precision::Bf16`].
    pub fn in_numbers(mut self, precision: Precision) -> Result<Self, RuntimeError> {
        match (precision, self.device()) {
            (Precision::F32, _) => {}
            (Precision::Bf16, device @ Device::Cpu) => {
                return Err(RuntimeError::Device { device, reason: "it computes in f32 alone".to_string() });
            }
            (Precision::Bf16, _) => self.shelf = Arc::new(self.shelf.rounding()),
        }
        self.precision = precision;
        Ok(self)
    }

    /// Where it runs.
    pub fn device(&self) -> Device {
        of(&self.device)
    }

    /// In what numbers it computes.
    pub fn precision(&self) -> Precision {
        self.precision
    }
}
