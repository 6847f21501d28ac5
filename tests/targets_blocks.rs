//! Layers that differ in their KV heads and share a number of query heads: block by block, as Nemotron-NAS describes them.
#![cfg(feature = "runtime")]

mod models;
mod running;
mod written;

use models::says;
use qcqa::Run;
use qcqa::allocator::ExactAllocation;
use qcqa::budget::{Budget, Limits};
use qcqa::checkpoint::Checkpoint;
use qcqa::heads::HeadSource;
use qcqa::output::{Target, check_plan};
use qcqa::partition::{Partition, SearchSpace};
use qcqa::pipeline::{Compress, Preset};
use qcqa::plan::Plan;
use qcqa::targets::Deci;
use safetensors::Dtype;
use serde_json::{Value, json};
use written::{Written, config, fours_and_threes, partitions, runnable, uneven};

#[test]
fn blocks_have_their_own_numbers_of_kv_heads() {
    let pairs: &[&[usize]] = &[&[0, 5], &[1, 4], &[2, 3]];
    for (model_type, bias) in [("llama", false), ("llama", true), ("mistral", false), ("qwen2", true)] {
        let mut model = runnable(model_type, Dtype::F32, 6, bias).set("sliding_window", Value::Null);
        if model_type == "llama" && bias {
            let output = models::Tensor { shape: vec![24], ..model.tensors["model.norm.weight"].clone() };
            for i in 0..2 {
                model.tensors.insert(format!("model.layers.{i}.self_attn.o_proj.bias"), output.clone());
            }
        }
        let written = Written::new(&model, &partitions(6, [pairs, &[&[0, 1, 2, 3, 4, 5]]]));
        let blocks = written.holds(&Deci);
        let config = config(&blocks);
        assert_eq!(config["model_type"], "nemotron-nas");
        assert_eq!(config["block_configs"][0]["attention"]["n_heads_in_group"], 2);
        assert_eq!(config["block_configs"][1]["attention"]["n_heads_in_group"], 6);
        assert_eq!(config["block_configs"][1]["ffn"]["intermediate_size"], 5);
        assert_eq!(config["attention_bias"], bias);
        assert!(config.get("sliding_window").is_none() && config.get("num_key_value_heads").is_none());
        assert!(blocks.path().join("configuration_decilm.py").is_file());
        if bias {
            let output = blocks.tensor("model.layers.1.self_attn.o_proj.bias").unwrap();
            assert_eq!(output.iter().all(|&x| x == 0.0), model_type == "qwen2");
        }
        // Blocks of others may lack attention altogether.
        models::configured(blocks.path(), |config| {
            drop(config.as_object_mut().unwrap().remove("qcqa_heads"))
        });
        says(&Checkpoint::open(blocks.path()).unwrap_err().to_string(), &["block_configs", "qcqa_heads"]);
    }
    let written = Written::new(
        &runnable("mistral", Dtype::F32, 6, false).set("sliding_window", json!(8)),
        &partitions(6, [pairs; 2]),
    );
    let error = check_plan(&written.source, &written.plan, &Deci).unwrap_err();
    says(&error.to_string(), &["attention in windows"]);
}

/// The fewest query heads of all layers that every layer's groups divide: those of unlike sizes are filled up.
#[test]
fn blocks_of_unlike_groups_share_a_number_of_query_heads() {
    let layers = |kv_heads: usize| match kv_heads {
        // Three places each, and two of nine layers' query heads are zeros.
        6 => (uneven(6), 9, [3, 3]),
        // Two groups of two heads of two query heads each, and one of all.
        3 => (partitions(3, [&[&[0, 2], &[1]], &[&[0, 1, 2]]]), 8, [4, 8]),
        _ => (partitions(2, [&[&[0, 1]], &[&[0], &[1]]]), 6, [6, 3]),
    };
    for (model_type, kv_heads) in [("llama", 6), ("llama", 3), ("qwen2", 6), ("mistral", 3), ("llama", 2)] {
        let model = runnable(model_type, Dtype::F32, kv_heads, model_type == "qwen2");
        let (layers, queries, in_group) = layers(kv_heads);
        let written = Written::new(&model.set("sliding_window", Value::Null), &layers);
        let config = config(&written.holds(&Deci));
        assert_eq!(config["num_attention_heads"], queries);
        let heads: Vec<_> = layers.iter().map(|groups| json!([queries, groups.n_groups()])).collect();
        assert_eq!(config["qcqa_heads"], json!(heads));
        for (block, n) in config["block_configs"].as_array().unwrap().iter().zip(in_group) {
            assert_eq!(block["attention"]["n_heads_in_group"], n);
        }
    }
    // One layer alone may be filled up so far, all together may not.
    let written = Written::new(&runnable("llama", Dtype::F32, 6, false), &fours_and_threes());
    assert!(Deci.limits(written.source.architecture()).check(written.plan.groups()).is_ok());
    let error = check_plan(&written.source, &written.plan, &Deci).unwrap_err();
    says(&error.to_string(), &["target deci", "none up to 9 (150% of 6)", "[4, 3]"]);
    let wide = partitions(6, [&[&[0, 1, 2, 3, 4], &[5]]; 2]);
    let written = Written::new(&runnable("llama", Dtype::F32, 6, false), &wide);
    let error = check_plan(&written.source, &written.plan, &Deci).unwrap_err();
    says(&error.to_string(), &["[5, 1]", "at most 150%"]);
}

/// What a search finds within the limits of blocks can be written, whatever the budget.
#[test]
fn the_search_keeps_to_what_blocks_hold() {
    // Nine query heads on three: all heads kept, two groups and one fit under twelve.
    let mut model = runnable("llama", Dtype::F32, 3, false);
    model.config["num_attention_heads"] = json!(9);
    for i in 0..2 {
        let attention = format!("model.layers.{i}.self_attn");
        for (name, shape) in [("q_proj", [36, 24]), ("o_proj", [24, 36])] {
            let tensor = model.tensor(&format!("{attention}.{name}.weight"));
            let bytes = tensor.bytes.iter().copied().cycle().take(36 * 24 * 4).collect();
            *tensor = models::Tensor { shape: shape.to_vec(), bytes, ..tensor.clone() };
        }
    }
    let (_root, source) = running::opened(&model);
    let mut found = Vec::new();
    for heads in 2..=6 {
        let compress = Compress::new(Preset::QcqaAc).allocator(ExactAllocation).target(&Deci);
        let plan = compress.budget(Budget::Heads(heads)).plan(&source, Run::new(0)).unwrap();
        assert_eq!(plan.method.dividing, Some(12));
        check_plan(&source, &plan, &Deci).unwrap();
        found.extend(plan.group_counts());
        let stored = serde_json::to_string(&plan).unwrap();
        assert_eq!(serde_json::from_str::<Plan>(&stored).unwrap(), plan);
    }
    found.sort_unstable();
    found.dedup();
    assert_eq!(found, [1, 2, 3]);
    let limits = Limits { dividing: Some(12), ..Limits::default() };
    let five = Partition::from_labels(&[0, 1, 2, 3, 4, 0]).unwrap();
    says(&limits.check([&five]).unwrap_err().to_string(), &["has 5 groups", "must divide 12"]);
    // Where all heads can be kept under the source's number alone, groups are equal.
    let novels = Checkpoint::open(models::novels()).unwrap();
    assert_eq!(Deci.search_limits(novels.architecture()).space, SearchSpace::equal());
}
