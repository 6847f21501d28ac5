use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Number type of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16: 8 bits of exponent, 7 of fraction.
    Bf16,
    /// IEEE half precision: 5 bits of exponent, 10 of fraction.
    F16,
    /// IEEE single precision.
    F32,
}

/// Numbers converted at once by way of the stack: stored bytes need not be aligned.
const BLOCK: usize = 256;

impl Dtype {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// `"bf16"`, `"f16"` or `"f32"`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// The type by its safetensors tag; `None` for what this crate does not read.
    pub(crate) fn from_stored(dtype: safetensors::Dtype) -> Option<Self> {
        match dtype {
            safetensors::Dtype::BF16 => Some(Self::Bf16),
            safetensors::Dtype::F16 => Some(Self::F16),
            safetensors::Dtype::F32 => Some(Self::F32),
            _ => None,
        }
    }

    /// Its safetensors tag.
    pub(crate) fn stored(self) -> safetensors::Dtype {
        match self {
            Self::Bf16 => safetensors::Dtype::BF16,
            Self::F16 => safetensors::Dtype::F16,
            Self::F32 => safetensors::Dtype::F32,
        }
    }

    /// A number as it would be stored; infinite where it does not fit.
    pub fn round(self, value: f32) -> f32 {
        match self {
            Self::Bf16 => bf16::from_f32(value).to_f32(),
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::F32 => value,
        }
    }

    /// Decodes little-endian numbers; `bytes` holds exactly `out.len()` of them, aligned or not.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.bytes(), "as many numbers as places");
        match self {
            Self::Bf16 => {
                // A bfloat16 is the upper half of an f32; this loop becomes vector shifts.
                for (b, out) in bytes.chunks_exact(2).zip(out) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                }
            }
            Self::F16 => {
                let mut block = [f16::ZERO; BLOCK];
                for (bytes, out) in bytes.chunks(2 * BLOCK).zip(out.chunks_mut(BLOCK)) {
                    let block = &mut block[..out.len()];
                    for (b, half) in bytes.chunks_exact(2).zip(&mut *block) {
                        *half = f16::from_le_bytes([b[0], b[1]]);
                    }
                    block.convert_to_f32_slice(out);
                }
            }
            Self::F32 => {
                for (b, out) in bytes.chunks_exact(4).zip(out) {
                    *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
        }
    }

    /// Appends `values`, rounded to nearest even.
    ///
    /// # Errors
    /// The first finite value that becomes an infinity.
    pub(crate) fn encode(self, values: impl IntoIterator<Item = f32>, out: &mut Vec<u8>) -> Result<(), f32> {
        for value in values {
            let fits = match self {
                Self::Bf16 => {
                    let stored = bf16::from_f32(value);
                    out.extend(stored.to_le_bytes());
                    stored.is_finite()
                }
                Self::F16 => {
                    let stored = f16::from_f32(value);
                    out.extend(stored.to_le_bytes());
                    stored.is_finite()
                }
                Self::F32 => {
                    out.extend(value.to_le_bytes());
                    true
                }
            };
            if !fits && value.is_finite() {
                return Err(value);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every finite 16-bit number survives the way there and back, at any alignment.
    #[test]
    fn every_finite_half_survives() {
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let mut bytes = vec![0];
            bytes.extend((0..=u16::MAX).flat_map(u16::to_le_bytes));
            let mut values = vec![0.0; 1 << 16];
            dtype.decode(&bytes[1..], &mut values);
            for (bits, &value) in (0..=u16::MAX).zip(&values) {
                let slow = match dtype {
                    Dtype::Bf16 => bf16::from_bits(bits).to_f32(),
                    _ => f16::from_bits(bits).to_f32(),
                };
                assert!(value == slow || (value.is_nan() && slow.is_nan()), "{} {bits:#x}", dtype.name());
                if value.is_finite() {
                    let mut back = Vec::new();
                    dtype.encode([value], &mut back).expect("finite values of the type fit it");
                    assert_eq!(back, bits.to_le_bytes(), "{} {bits:#x}", dtype.name());
                }
            }
        }
    }

    #[test]
    fn rounds_to_nearest_even_and_names_overflow() {
        let encode = |dtype: Dtype, value: f32| {
            let mut out = Vec::new();
            dtype.encode([value], &mut out).map(|()| out)
        };
        // 1 + 2⁻⁸ lies halfway between the bfloat16 1 and 1 + 2⁻⁷; 1 + 3·2⁻⁸ between the latter and 1 + 2⁻⁶.
        assert_eq!(encode(Dtype::Bf16, 1.0 + 1.0 / 256.0), Ok(0x3f80_u16.to_le_bytes().to_vec()));
        assert_eq!(encode(Dtype::Bf16, 1.0 + 3.0 / 256.0), Ok(0x3f82_u16.to_le_bytes().to_vec()));
        assert_eq!(encode(Dtype::F16, 65504.0), Ok(0x7bff_u16.to_le_bytes().to_vec()));
        assert_eq!(encode(Dtype::F16, 70000.0), Err(70000.0));
        assert_eq!(encode(Dtype::Bf16, f32::MAX), Err(f32::MAX));
    }
}
