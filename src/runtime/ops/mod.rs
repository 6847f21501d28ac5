//! Steps of a layer in one pass over their numbers, shared out by rayon. Candle's own elementwise products wait for one
//! another on a pool of their own, which costs more than it gives where windows already run side by side.

mod causal_softmax;
mod gradients;
mod swiglu;

pub(crate) use causal_softmax::{CausalSoftmax, visible};
pub(super) use gradients::{rms_norm_backward, softmax_backward, swiglu_backward};
pub(super) use swiglu::SwiGlu;
