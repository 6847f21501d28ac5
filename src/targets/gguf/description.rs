//! What a file for llama.cpp says of a model, and what it calls its tensors.

use crate::checkpoint::{Checkpoint, Dtype};
use crate::families::architecture;
use crate::files::FileError;
use crate::model::Norm;
use crate::output::Metadata;
use crate::targets::form::{Form, Parts};

impl Form<'_> {
    /// Names of all tensors besides heads, in the file and in the source.
    pub(super) fn rest(&self, mut take: impl FnMut(String, &str)) {
        take("token_embd.weight".to_string(), &self.forward.embedding);
        if let Some(head) = self.forward.head.as_ref().filter(|head| **head != self.forward.embedding) {
            take("output.weight".to_string(), head);
        }
        let mut norm = |name: String, norm: &Norm| {
            if let Some(weight) = &norm.weight {
                take(format!("{name}.weight"), weight);
            }
        };
        norm("output_norm".to_string(), self.norm);
        for (i, parts) in self.blocks.iter().enumerate() {
            let [attention, mlp] = parts.norms;
            norm(format!("blk.{i}.attn_norm"), attention);
            norm(format!("blk.{i}.ffn_norm"), mlp);
            if let Some([query, key]) = parts.head_norms {
                norm(format!("blk.{i}.attn_q_norm"), query);
                norm(format!("blk.{i}.attn_k_norm"), key);
            }
        }
        for (i, Parts { mlp, gate, .. }) in self.blocks.iter().enumerate() {
            for (name, linear) in [("ffn_gate", gate), ("ffn_up", &&mlp.up), ("ffn_down", &&mlp.down)] {
                take(format!("blk.{i}.{name}.weight"), &linear.weight);
                if let Some(bias) = &linear.bias {
                    take(format!("blk.{i}.{name}.bias"), bias);
                }
            }
        }
    }

    /// What describes a model whose layers have these query heads and KV heads, which turn with frequencies of this base, and whose
    /// matrices are stored so.
    pub(super) fn described(
        &self,
        heads: &[[usize; 2]],
        base: f64,
        dtype: Dtype,
        source: &Checkpoint,
    ) -> Result<Vec<(String, Metadata)>, FileError> {
        let alike = heads.iter().all(|layer| *layer == heads[0]);
        let arch = architecture(self.one_k, alike);
        let count = |n: usize| Metadata::Count(u32::try_from(n).unwrap_or(u32::MAX));
        let counts = |which: usize| match alike {
            true => count(heads[0][which]),
            false => Metadata::Counts(heads.iter().map(|layer| layer[which] as i32).collect()),
        };
        let widths = self.widths(source)?.into_iter().map(|width| width as i32).collect();
        let of_type = match dtype {
            Dtype::F32 => 0,
            Dtype::F16 => 1,
            Dtype::Bf16 => 32,
        };
        let (h, forward) = (self.layers[0].head_dim, self.forward);
        let own = [
            ("block_count", count(self.layers.len())),
            ("context_length", count(forward.positions)),
            ("embedding_length", count(self.hidden)),
            ("vocab_size", count(forward.vocabulary)),
            ("feed_forward_length", Metadata::Counts(widths)),
            ("attention.head_count", counts(0)),
            ("attention.head_count_kv", counts(1)),
            ("attention.key_length", count(h)),
            ("attention.value_length", count(h)),
            ("attention.layer_norm_rms_epsilon", Metadata::Number(self.norm.epsilon as f32)),
            ("rope.dimension_count", count(h)),
            ("rope.freq_base", Metadata::Number(base as f32)),
        ];
        let general = [
            ("general.architecture", Metadata::Text(arch.to_string())),
            ("general.type", Metadata::Text("model".to_string())),
            ("general.file_type", Metadata::Count(of_type)),
            ("general.quantization_version", Metadata::Count(2)),
        ];
        let general = general.map(|(key, value)| (key.to_string(), value));
        Ok(general.into_iter().chain(own.map(|(key, value)| (format!("{arch}.{key}"), value))).collect())
    }
}
