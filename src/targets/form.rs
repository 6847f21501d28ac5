//! Which models compute as a Llama does: what runtimes that know no more can run.

use crate::checkpoint::Checkpoint;
use crate::files::FileError;
use crate::model::{
    Activation, Architecture, AttentionSpec, Block, FeedForward, Forward, HeadNorm, Linear, Mask, Mlp, Norm,
    NormKind, NormOver, Rotary, Rotation, Stretch,
};

/// A model as such runtimes see it.
pub(super) struct Form<'a> {
    pub(super) forward: &'a Forward,
    /// How positions turn all heads.
    pub(super) rotary: &'a Rotary,
    /// Whether all layers must have as many heads.
    pub(super) one_k: bool,
    /// Whether dimensions that turn together lie side by side.
    pub(super) pairs: bool,
    pub(super) layers: &'a [AttentionSpec],
    pub(super) blocks: Vec<Parts<'a>>,
    /// The last norm.
    pub(super) norm: &'a Norm,
    /// Width of the model.
    pub(super) hidden: usize,
}

/// A layer besides its heads.
pub(super) struct Parts<'a> {
    /// Those that attention and MLP read through.
    pub(super) norms: [&'a Norm; 2],
    /// Those of queries and keys.
    pub(super) head_norms: Option<[&'a Norm; 2]>,
    pub(super) mlp: &'a Mlp,
    pub(super) gate: &'a Linear,
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
            (forward.head.is_some(), "an encoder's hidden states in the place of logits"),
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

    /// Widths of the MLPs.
    pub(super) fn widths(&self, source: &Checkpoint) -> Result<Vec<usize>, FileError> {
        let of = |parts: &Parts<'_>| {
            let name = &parts.mlp.up.weight;
            source
                .tensors()
                .shape(name)
                .and_then(|shape| shape.first().copied())
                .ok_or_else(|| source.missing(name, &[]))
        };
        self.blocks.iter().map(of).collect()
    }
}

impl<'a> Parts<'a> {
    fn of(attention: &'a AttentionSpec, block: &'a Block) -> Result<Self, String> {
        all(&[
            (
                block.attention_output_norm.is_none() && block.mlp_output_norm.is_none(),
                "norms of what layers add",
            ),
            (block.sum_norms.iter().all(Option::is_none), "norms behind the sums"),
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
            NormOver::OwnHead => Err("norms of each head with weights of its own".to_string()),
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
        (attention.mask != Mask::Whole, "an attention to what follows"),
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
