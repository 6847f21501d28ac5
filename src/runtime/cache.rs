use candle_core::{Result, Tensor};

/// The keys and values of the tokens that a model has read, for each layer as many heads as it has groups.
///
/// ```
/// use qcqa::checkpoint::Checkpoint;
/// use qcqa::ndarray::array;
/// use qcqa::runtime::{KvCache, Model};
///
/// let model = Model::load(&Checkpoint::open("tests/data/novels-1m")?)?;
/// let mut cache = KvCache::default();
/// model.extend(&mut cache, array![[5, 7, 11]].view())?;
/// let logits = model.extend(&mut cache, array![[13]].view())?;
/// assert_eq!((logits.dim(), cache.tokens()), ((1, 1, 1024), 4));
/// assert_eq!(cache.bytes(), 4 * model.kv_bytes_per_token());
/// # Ok::<(), qcqa::runtime::RuntimeError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    pub(super) layers: Vec<LayerCache>,
    pub(super) tokens: usize,
}

impl KvCache {
    /// Tokens read so far, of each row of the batch.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let tensors = self.layers.iter().filter_map(|layer| layer.held.as_ref()).flat_map(|(k, v)| [k, v]);
        tensors.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

/// What one layer keeps.
#[derive(Debug, Clone, Default)]
pub(super) struct LayerCache {
    /// Keys and values, (B, k, S, h).
    held: Option<(Tensor, Tensor)>,
    /// Where the S tokens stand, ascending.
    positions: Vec<usize>,
}

impl LayerCache {
    /// Adds the keys and values (B, k, T, h) of the tokens at T further positions.
    ///
    /// Gives all keys and values, and their positions.
    pub(super) fn extend(
        &mut self,
        keys: Tensor,
        values: Tensor,
        positions: &[usize],
    ) -> Result<(Tensor, Tensor, &[usize])> {
        let (keys, values) = match &self.held {
            Some((old_keys, old_values)) => {
                (Tensor::cat(&[old_keys, &keys], 2)?, Tensor::cat(&[old_values, &values], 2)?)
            }
            None => (keys, values),
        };
        self.held = Some((keys.clone(), values.clone()));
        self.positions.extend_from_slice(positions);
        Ok((keys, values, &self.positions))
    }
}
