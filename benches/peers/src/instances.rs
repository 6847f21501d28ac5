//! The layers on which everything is compared.

use std::path::{Path, PathBuf};

use qcqa::checkpoint::Checkpoint;
use qcqa::fitness::WeightSharingError;
use qcqa::HeadSource;
use qcqa::heads::HeadRows;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

/// Numbers of a head: keys and values of 64 dimensions over 128 inputs. Real rows are longer still.
pub const ROW: usize = 16384;

/// Instances of one kind and size, with a seed each.
pub struct Set {
    pub name: String,
    pub heads: usize,
    pub layers: Vec<(u64, WeightSharingError)>,
}

struct Rows {
    heads: usize,
    numbers: Vec<f32>,
}

impl HeadRows for Rows {
    fn n_heads(&self) -> usize {
        self.heads
    }

    fn row_len(&self) -> usize {
        self.numbers.len() / self.heads
    }

    fn read(&self, head: usize, start: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.numbers[head * self.row_len() + start..][..out.len()]);
    }
}

fn gaussian(count: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    StandardNormal.sample_iter(rng).take(count).collect()
}

/// Independent Gaussian heads.
pub fn iid(heads: usize, seed: u64) -> WeightSharingError {
    let numbers = gaussian(heads * ROW, &mut ChaCha8Rng::seed_from_u64(seed));
    WeightSharingError::new(&Rows { heads, numbers }).expect("finite numbers")
}

/// Heads u · (p + noise / 2) around H/4 prototypes p, drawn for each, with norms u of 0.3 to 1.7.
pub fn prototypes(heads: usize, seed: u64) -> WeightSharingError {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let centres = gaussian(heads / 4 * ROW, &mut rng);
    let mut numbers = Vec::with_capacity(heads * ROW);
    for _ in 0..heads {
        let centre = &centres[rng.random_range(0..heads / 4) * ROW..][..ROW];
        let norm = rng.random_range(0.3f32..1.7);
        numbers.extend(centre.iter().zip(gaussian(ROW, &mut rng)).map(|(c, noise)| norm * (c + noise / 2.0)));
    }
    WeightSharingError::new(&Rows { heads, numbers }).expect("finite numbers")
}

/// The layers of the models in the folder that QCQA_MODELS names, else of the one in the tree.
pub fn models(seed: u64) -> Vec<Set> {
    let novels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/novels-1m");
    let paths: Vec<PathBuf> = match std::env::var_os("QCQA_MODELS") {
        Some(folder) => ["novels-1m", "novels-14m"].map(|name| Path::new(&folder).join(name)).into(),
        None => {
            eprintln!("QCQA_MODELS is not set: novels-1m alone");
            vec![novels]
        }
    };
    let set = |path: &PathBuf| {
        let model = Checkpoint::open(path).expect("a model");
        let heads = model.architecture().kv_heads();
        let layer = |i: usize| {
            let rows = model.rows(i).expect("a layer");
            (seed + i as u64, WeightSharingError::new(rows.as_ref()).expect("finite weights"))
        };
        Set {
            name: path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default(),
            heads: heads[0],
            layers: (0..heads.len()).map(layer).collect(),
        }
    };
    paths.iter().map(set).collect()
}
