//! Where models run. Everything else takes its device from the model.

use candle_core::Device;

/// The device that models are loaded to: the CPU, for which the ops are written.
pub(super) fn device() -> Device {
    Device::Cpu
}
