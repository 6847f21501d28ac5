//! Which models compute as llama.cpp's Llama does.

use crate::checkpoint::{Checkpoint, Dtype};
use crate::families::architecture;
use crate::files::FileError;
use crate::model::{
    Activation, Architecture, AttentionSpec, Block, FeedForward, Forward, HeadNorm, Linear, Mlp, Norm,
    NormKind, NormOver, Rotary, Rotation, Stretch,
};
use crate::output::Metadata;

/// A model as llama.cpp runs it.
pub(super) struct Form<'a> {
    pub(super) forward: &'a Forward,
    /// How positions turn all heads.
    pub(super) rotary: &'a Rotary,
    /// Whether all layers must have as many heads.
    pub(super) one_k: bool,
    /// Whether dimensions that turn together lie side by side.
    pub(super) pairs: bool,
    layers: &'a [AttentionSpec],
    blocks: Vec<Parts<'a>>,
    norm: &'a Norm,
    hidden: usize,
}

/// A layer besides its heads.
struct Parts<'a> {
    norms: [&'a Norm; 2],
    head_norms: Option<[&'a Norm; 2]>,
    mlp: &'a Mlp,
    gate: &'a Linear,
}

impl<'a> Form<'a> {
    /// The form of a model, or what stands against it.
    pub(super) fn of(model: &'a Architecture) -> Result<Self, String> {
        let forward = model.forward.as_ref().map_err(|unsupported| unsupported.what.clone())?;
        let ends = [
            (
                forward.embedding_scale == 1.0 && forward.logit_scale == 1.0,
                "multipliers of embeddings or logits",
            ),
            (forward.learned.is_none(), "learned positions"),
            (forward.embedding_norm.is_none(), "a norm of embeddings"),
            (forward.logit_cap.is_none(), "a bound of logits"),
            (forward.head_bias.is_none(), "a bias of logits"),
        ];
        all(&ends)?;
        let norm = rms(forward.norm.as_ref())?;
        let first = model.layers.first().ok_or("no layers")?;
        let rotary = first.rotary.as_ref().ok_or("layers without rotary positions")?;
        let blocks: Result<Vec<_>, String> = model
            .layers
            .iter()
            .zip(&forward.blocks)
            .map(|(attention, block)| {
                check(attention, first, forward.positions)?;
                Parts::of(attention, block)
            })
            .collect();
        let blocks = blocks?;
        let all_norms = blocks
            .iter()
            .flat_map(|parts| parts.norms.into_iter().chain(parts.head_norms.into_iter().flatten()));
        if all_norms.into_iter().any(|other| other.epsilon != norm.epsilon) {
            return Err("norms with different epsilons".to_string());
        }
        let normed = blocks.iter().filter(|parts| parts.head_norms.is_some()).count();
        if normed != 0 && (normed != blocks.len() || !matches!(first.rotation(), Rotation::HalfSplit { .. }))
        {
            return Err("norms of queries and keys in some layers, or with interleaved rotation".to_string());
        }
        let (one_k, pairs) = (normed > 0, normed == 0);
        Ok(Self { forward, rotary, one_k, pairs, layers: &model.layers, blocks, norm, hidden: model.hidden })
    }

    /// Names of all tensors besides heads, in the file and in the source.
    pub(super) fn rest(&self, mut take: impl FnMut(String, &str)) {
        take("token_embd.weight".to_string(), &self.forward.embedding);
        if self.forward.head != self.forward.embedding {
            take("output.weight".to_string(), &self.forward.head);
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

    /// What describes a model whose layers have these query heads and KV heads, which turn with frequencies of this base.
    pub(super) fn metadata(
        &self,
        heads: &[[usize; 2]],
        base: f64,
        source: &Checkpoint,
    ) -> Result<Vec<(String, Metadata)>, FileError> {
        let alike = heads.iter().all(|layer| *layer == heads[0]);
        let arch = architecture(self.one_k, alike);
        let count = |n: usize| Metadata::Count(u32::try_from(n).unwrap_or(u32::MAX));
        let counts = |which: usize| match alike {
            true => count(heads[0][which]),
            false => Metadata::Counts(heads.iter().map(|layer| layer[which] as i32).collect()),
        };
        let mut widths = Vec::with_capacity(self.blocks.len());
        for Parts { mlp, .. } in &self.blocks {
            let shape = source.tensors().shape(&mlp.up.weight);
            widths
                .push(*shape.and_then(<[usize]>::first).ok_or_else(|| source.missing(&mlp.up.weight, &[]))?
                    as i32);
        }
        let of_type = match source.dtype() {
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

impl<'a> Parts<'a> {
    fn of(attention: &'a AttentionSpec, block: &'a Block) -> Result<Self, String> {
        all(&[
            (
                block.attention_output_norm.is_none() && block.mlp_output_norm.is_none(),
                "norms of what layers add",
            ),
            (!block.parallel, "attention and MLP in parallel"),
            (block.residual == 1.0, "multipliers of what layers add"),
        ])?;
        let FeedForward::Mlp(mlp) = &block.mlp else { return Err("experts".to_string()) };
        let gate = mlp.gate.as_ref().filter(|_| mlp.activation == Activation::Silu);
        let gate = gate.ok_or("MLPs without a gate, or with another activation than SiLU")?;
        let plain = |linear: &Linear| linear.part == (0, 1) && !linear.transposed && linear.stacked.is_none();
        all(&[(
            [gate, &mlp.up, &mlp.down].into_iter().all(plain),
            "projections of MLPs that share a tensor",
        )])?;
        let head = |norm: &'a HeadNorm| match norm.over {
            NormOver::Head => rms(Some(&norm.norm)),
            NormOver::Width => Err("norms over all heads of a token".to_string()),
        };
        let head_norms = match &attention.norms {
            [None, None] => None,
            [Some(query), Some(key)] => Some([head(query)?, head(key)?]),
            _ => return Err("a norm of queries or of keys alone".to_string()),
        };
        let norms = [rms(block.attention_norm.as_ref())?, rms(block.mlp_norm.as_ref())?];
        Ok(Self { norms, head_norms, mlp, gate })
    }
}

/// The first that does not hold.
fn all(conditions: &[(bool, &str)]) -> Result<(), String> {
    conditions.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, found)| Err((*found).to_string()))
}

fn rms(norm: Option<&Norm>) -> Result<&Norm, String> {
    let plain = |norm: &&Norm| {
        norm.kind == NormKind::Rms && norm.weight.is_some() && norm.bias.is_none() && norm.offset == 0.0
    };
    norm.filter(plain).ok_or_else(|| "norms other than RMS with a weight".to_string())
}

/// Checks what a layer does between projection and output, and that it is as in the first.
fn check(attention: &AttentionSpec, first: &AttentionSpec, positions: usize) -> Result<(), String> {
    let usual = (attention.head_dim as f64).sqrt().recip();
    let rotary = attention.rotary.as_ref();
    all(&[
        (attention.mask.reach() >= positions, "attention in windows"),
        (attention.cap.is_none(), "a bound of scores"),
        (attention.alibi.is_none(), "linear biases of scores"),
        (attention.sinks.is_none(), "sinks"),
        (
            (attention.scale / usual - 1.0).abs() < 1e-6,
            "scores scaled by other than the root of the head's width",
        ),
        (attention.head_dim == first.head_dim, "heads of different widths"),
        (rotary == first.rotary.as_ref(), "layers that positions turn differently"),
        (attention.rotation().dims() == attention.head_dim, "heads that positions turn in part"),
        (rotary.is_some_and(|rotary| rotary.factor == 1.0), "turned heads that are multiplied besides"),
        (
            rotary.is_some_and(|rotary| rotary.stretch == Stretch::Fixed),
            "frequencies that change in long texts",
        ),
    ])
}
