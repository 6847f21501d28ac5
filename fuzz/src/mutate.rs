//! Changes to inputs: of bytes, and of the values in JSON, alone or behind its length as in safetensors.
#![allow(dead_code, unreachable_pub)]

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::{Value, json};

/// What numbers, texts and lists are when they are not what is expected.
fn extreme(rng: &mut ChaCha8Rng) -> Value {
    let all = [
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(2),
        json!(3),
        json!(-1),
        json!(1e308),
        json!(-0.0),
        json!(1e-320),
        json!(0.5),
        json!(u64::MAX),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(1_u64 << 32),
        json!(u32::MAX),
        json!(65_536),
        json!(1_000_000_007),
        json!(""),
        json!("default"),
        json!("../secret.safetensors"),
        json!("@ROOT@/secret.safetensors"),
        json!("a\u{0}b"),
        json!("\u{feff}▁\u{10ffff}"),
        json!([]),
        json!({}),
        json!([[]]),
        json!([0, 0]),
        json!({ "": null }),
        json!("x".repeat(300)),
    ];
    all[rng.random_range(0..all.len())].clone()
}

/// The number of values in a value, itself included.
fn size(value: &Value) -> usize {
    1 + match value {
        Value::Array(all) => all.iter().map(size).sum(),
        Value::Object(all) => all.values().map(size).sum(),
        _ => 0,
    }
}

/// The n-th value in a value.
fn nth(value: &mut Value, mut n: usize) -> Option<&mut Value> {
    if n == 0 {
        return Some(value);
    }
    n -= 1;
    let inner: Vec<&mut Value> = match value {
        Value::Array(all) => all.iter_mut().collect(),
        Value::Object(all) => all.values_mut().collect(),
        _ => return None,
    };
    for one in inner {
        let own = size(one);
        if n < own {
            return nth(one, n);
        }
        n -= own;
    }
    None
}

fn change(value: &mut Value, rng: &mut ChaCha8Rng) {
    let count = size(value);
    let other = nth(value, rng.random_range(0..count)).cloned();
    let Some(at) = nth(value, rng.random_range(0..count)) else { return };
    let how = rng.random_range(0..8);
    match at {
        Value::Array(all) if how < 5 && !all.is_empty() => {
            let i = rng.random_range(0..all.len());
            match how {
                0 => drop(all.remove(i)),
                1 => all.push(all[i].clone()),
                2 => all.swap(0, i),
                3 => all.truncate(i),
                _ => all[i] = extreme(rng),
            }
        }
        Value::Object(all) if how < 5 && !all.is_empty() => {
            let key = all.keys().nth(rng.random_range(0..all.len())).cloned().unwrap_or_default();
            match how {
                0 | 1 => drop(all.remove(&key)),
                2 => drop(all.insert(key + "x", extreme(rng))),
                _ => drop(all.insert(key, extreme(rng))),
            }
        }
        Value::Number(number) if how < 5 => {
            let by = rng.random_range(-2..=2);
            *at = match number.as_i64() {
                Some(whole) if how < 4 => json!(whole.wrapping_add(by)),
                _ => json!(number.as_f64().unwrap_or(1.0) * by as f64),
            };
        }
        Value::String(text) if how < 4 => {
            let place =
                text.char_indices().map(|(i, _)| i).nth(rng.random_range(0..=text.len())).unwrap_or(0);
            match how {
                0 => text.truncate(place),
                1 => text.insert(place, char::from(rng.random_range(0..128_u8))),
                2 => text.insert_str(place, "../"),
                _ => text.push_str(&text.clone()[..place]),
            }
        }
        at => *at = other.filter(|_| how % 2 == 0).unwrap_or_else(|| extreme(rng)),
    }
}

fn changed(mut value: Value, rng: &mut ChaCha8Rng) -> Vec<u8> {
    for _ in 0..rng.random_range(1..4) {
        change(&mut value, rng);
    }
    value.to_string().into_bytes()
}

/// The value in a text, or in the header of safetensors.
fn of_json(data: &[u8], rng: &mut ChaCha8Rng) -> Option<Vec<u8>> {
    if let Ok(value) = serde_json::from_slice(data) {
        return Some(changed(value, rng));
    }
    if let Some((length, rest)) = data.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*length)).ok().filter(|&length| length <= rest.len());
        if let Some((header, tensors)) = length.map(|length| rest.split_at(length)) {
            let header = changed(serde_json::from_slice(header).ok()?, rng);
            let length = (header.len() as u64).to_le_bytes();
            return Some([&length[..], &header, tensors].concat());
        }
    }
    // A byte that chooses, and then the file.
    let (first, rest) = data.split_first()?;
    let value = serde_json::from_slice(rest).ok()?;
    Some([&[*first], &changed(value, rng)[..]].concat())
}

fn of_bytes(data: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    let mut bytes = data.to_vec();
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..=bytes.len());
        let end = (at + rng.random_range(0..17)).min(bytes.len());
        match rng.random_range(0..6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = rng.random(),
            2 => drop(bytes.drain(at..end)),
            3 => bytes.truncate(at),
            4 => bytes.extend_from_within(at..end),
            _ => bytes.insert(at, rng.random()),
        }
    }
    bytes
}

/// An input, changed: the same for the same seed.
pub fn mutated(data: &[u8], seed: u64) -> Vec<u8> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let whole = rng.random_range(0..4) > 0;
    whole.then(|| of_json(data, rng)).flatten().unwrap_or_else(|| of_bytes(data, rng))
}

/// As libFuzzer wants it: in the place of the old one.
pub fn in_place(data: &mut [u8], size: usize, max_size: usize, seed: u64) -> usize {
    let new = mutated(&data[..size], seed);
    let size = new.len().min(max_size).min(data.len());
    data[..size].copy_from_slice(&new[..size]);
    size
}
