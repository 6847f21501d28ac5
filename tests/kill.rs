//! Whenever a run ends, nothing is lost: killed, interrupted, on a full disk, or beside another on the same output. The long forms
//! are `.ci/trust`.
#![cfg(all(feature = "cli", target_os = "linux"))]

mod killing;
mod models;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;

use killing::{Bench, by_itself, signal, times};
use models::says;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// What was found, how often.
type Found = BTreeMap<String, usize>;

fn tell(what: &str, found: &Found) {
    found.iter().for_each(|(of, n)| println!("{what}: {of}: {n}"));
}

#[test]
fn killed_at_any_moment() {
    let kills = times("QCQA_KILLS", 18);
    let bench = Bench::new(None, kills > 100);
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    let mut found = Found::new();
    for n in 0..kills {
        // Few of the job that takes longest.
        let job = if bench.jobs.len() > 6 && n % 40 == 39 { &bench.jobs[6] } else { &bench.jobs[n % 6] };
        let name = ["KILL", "TERM", "INT"][n / 6 % 3];
        let mut child = bench.begin(job, None);
        let after = job.takes.mul_f64(rng.random_range(0.0..1.02));
        sleep(after);
        signal(&child, name);
        let status = child.wait().unwrap();
        let of = format!("{} {name} after {after:?} of {:?}", job.name, job.takes);
        assert!(matches!(status.code(), None | Some(0 | 130)), "{of}: {status}");
        let left = bench.check(job, by_itself(status), &of);
        let hid = if bench.hidden(job).is_empty() { "" } else { ", and what is hidden" };
        *found.entry(format!("{}, {name}: {left}{hid}", job.name)).or_default() += 1;
        bench.again(job, &of);
    }
    tell("killed", &found);
    assert_eq!(found.values().sum::<usize>(), kills);
}

/// A file may not grow beyond a limit: writing fails, or the process is killed by the system.
#[test]
fn files_that_may_not_grow() {
    let places = times("QCQA_FULL", 6);
    let bench = Bench::new(None, false);
    let mut found = Found::new();
    for n in 0..places {
        let job = &bench.jobs[n % 6];
        let largest = job.whole.values().map(Vec::len).max().unwrap() as u64 / 1024;
        let blocks = largest * (n as u64 / 6) / (places as u64).div_ceil(6);
        let fails = n / 6 % 2 == 0;
        let before = format!("ulimit -f {blocks}{}", if fails { "; trap '' XFSZ" } else { "" });
        let output = bench.begin(job, Some(&before)).wait_with_output().unwrap();
        let of = format!("{} {before}", job.name);
        let error = String::from_utf8_lossy(&output.stderr);
        if by_itself(output.status) {
            assert_eq!(output.status.code(), Some(1), "{of}: {error}");
            says(&error, &["cannot write", "File too large"]);
        }
        let left = bench.check(job, by_itself(output.status), &of);
        assert_ne!(left, "the new output", "{of}");
        *found
            .entry(format!("{}, {}: {left}", job.name, if fails { "error" } else { "killed" }))
            .or_default() += 1;
        bench.again(job, &of);
    }
    tell("file too large", &found);
}

/// A disk that fills up, where QCQA_SMALL_DISK names a directory of one of a few megabytes.
#[test]
fn a_disk_that_fills_up() {
    let Some(disk) = std::env::var_os("QCQA_SMALL_DISK").map(PathBuf::from) else {
        println!("skipped: QCQA_SMALL_DISK names no small disk");
        return;
    };
    let places = times("QCQA_FULL", 6);
    let bench = Bench::new(Some(disk.clone()), false);
    let (mut found, filler) = (Found::new(), disk.join("filler"));
    for n in 0..places {
        let job = &bench.jobs[n % 6];
        let size = job.whole.values().map(|bytes| bytes.len().next_multiple_of(4096)).sum::<usize>() as u64;
        let older = bench
            .older(job)
            .map_or(0, |all| all.values().map(|b| b.len().next_multiple_of(4096)).sum::<usize>())
            as u64;
        let room = older + size * (n as u64 / 6) / (places as u64).div_ceil(6);
        let free = fs4::available_space(&disk).unwrap();
        fs::write(&filler, vec![0; free.saturating_sub(room) as usize / 4096 * 4096]).unwrap();
        let output = bench.begin(job, None).wait_with_output().unwrap();
        let of = format!("{} with room for {room}", job.name);
        assert_eq!(output.status.code(), Some(1), "{of}: {:?}", String::from_utf8_lossy(&output.stderr));
        let left = bench.check(job, true, &of);
        assert_ne!(left, "the new output", "{of}");
        *found.entry(format!("{}: {left}", job.name)).or_default() += 1;
        fs::remove_file(&filler).unwrap();
        bench.again(job, &of);
    }
    tell("disk full", &found);
}

/// Two runs on one output: one of them has it whole, and who has it not says so.
#[test]
fn two_on_one_output() {
    let pairs = times("QCQA_PAIRS", 6);
    let bench = Bench::new(None, false);
    let rng = &mut ChaCha8Rng::seed_from_u64(2);
    let mut found = Found::new();
    for n in 0..pairs {
        let job = &bench.jobs[n % 6];
        let first = bench.begin(job, None);
        sleep(job.takes.mul_f64(rng.random_range(0.0..0.2)));
        let second = bench.begin_over(job, None, job.older);
        let ended = [first, second].map(|child| child.wait_with_output().unwrap());
        let of = format!("two of {}", job.name);
        for output in &ended {
            let error = String::from_utf8_lossy(&output.stderr);
            match output.status.code() {
                Some(0) => {}
                Some(1) if job.older => says(&error, &["out", "cannot"]),
                Some(1) => says(&error, &["out exists"]),
                _ => panic!("{of}: {}: {error}", output.status),
            }
        }
        let winners = ended.iter().filter(|output| output.status.success()).count();
        assert!(winners == 1 || winners == 2 && job.older, "{of}: {winners} have written");
        assert_eq!(bench.check(job, false, &of), "the new output", "{of}");
        *found.entry(format!("{}: {winners} have written", job.name)).or_default() += 1;
        bench.forget(job);
        bench.again(job, &of);
    }
    tell("two on one output", &found);
}
