//! Commands that are broken off, and what must be true afterwards.
#![allow(dead_code, unreachable_pub, reason = "every test file uses its own share of this")]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use crate::models::{copied, snapshot};
use tempfile::TempDir;

/// Files below a place, or the one that it is, by their names in it.
pub type Held = BTreeMap<PathBuf, Vec<u8>>;

/// How often, unless the environment says it.
pub fn times(variable: &str, short: usize) -> usize {
    std::env::var(variable).map_or(short, |n| n.parse().unwrap())
}

/// The binary, or the one that QCQA_BINARY names.
pub fn binary() -> OsString {
    std::env::var_os("QCQA_BINARY").unwrap_or(env!("CARGO_BIN_EXE_qcqa").into())
}

/// A command that writes `out`.
pub struct Job {
    pub name: &'static str,
    args: Vec<String>,
    /// Whether something older is there, which `--force` replaces.
    pub older: bool,
    /// Whether it may end early with a whole output that says so, and go on later.
    pub goes_on: bool,
    /// What it writes, and how long that takes.
    pub whole: Held,
    pub takes: Duration,
}

/// A source, and a place for outputs.
pub struct Bench {
    root: TempDir,
    source: Held,
    pub jobs: Vec<Job>,
    older: [Held; 2],
}

fn held(place: &Path) -> Option<Held> {
    if place.is_dir() {
        let inside = |(path, bytes): (PathBuf, _)| (path.strip_prefix(place).unwrap().to_path_buf(), bytes);
        return Some(snapshot(place).into_iter().map(inside).collect());
    }
    fs::read(place).ok().map(|bytes| [(PathBuf::new(), bytes)].into())
}

fn put(place: &Path, what: &Held) {
    for (name, bytes) in what {
        let path = if name.as_os_str().is_empty() { place.to_path_buf() } else { place.join(name) };
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn remove(place: &Path) {
    if place.is_dir() { fs::remove_dir_all(place).unwrap() } else { drop(fs::remove_file(place)) }
}

impl Bench {
    /// With the outputs at `place`, or beside the source.
    pub fn new(place: Option<PathBuf>, distil: bool) -> Self {
        let (root, model) = copied();
        let [plan, quarter] = ["plan.json", "quarter.json"].map(|name| root.path().join(name));
        let work = place.unwrap_or_else(|| root.path().join("work"));
        fs::create_dir_all(&work).unwrap();
        let out = work.join("out").to_str().unwrap().to_string();
        let (model, text) =
            (model.to_str().unwrap(), model.join("calibration.txt").to_str().unwrap().to_string());
        let mut bench = Self { root, source: Held::new(), jobs: Vec::new(), older: Default::default() };
        for (kv, plan) in [("0.5", &plan), ("0.25", &quarter)] {
            let args = ["search", model, "--kv", kv, "--method", "gqa", "--out", plan.to_str().unwrap()];
            bench.ends_well(&args.map(str::to_string));
        }
        let [plan, quarter] = [&plan, &quarter].map(|plan| plan.to_str().unwrap());
        let args = |all: &[&str]| {
            all.iter().map(|arg| arg.to_string()).chain(["--out".into(), out.clone()]).collect()
        };
        let convert: Vec<String> = args(&["convert", model, "--plan", plan]);
        let calibrate = args(&["calibrate", model, "--text", &text, "--windows", "4"]);
        let compress = args(&[
            "compress",
            model,
            "--kv",
            "0.5",
            "--refit",
            "none",
            "--calibration",
            &text,
            "--calibration-windows",
            "4",
        ]);
        let before = args(&["convert", model, "--plan", quarter]);
        let before_moments = args(&["calibrate", model, "--text", &text, "--windows", "3"]);
        let mut jobs = vec![
            ("compress", compress.clone(), false, false),
            ("compress --force", compress.clone(), true, false),
            ("convert", convert.clone(), false, false),
            ("convert --force", convert, true, false),
            ("calibrate", calibrate.clone(), false, false),
            ("calibrate --force", calibrate, true, false),
        ];
        if distil {
            let args = [compress, vec!["--distill".into(), "2k".into()]].concat();
            jobs.push(("compress --distill", args, false, true));
        }
        bench.source = held(Path::new(model)).unwrap();
        bench.older = [before, before_moments].map(|args| bench.made(&args, &work.join("out")).0);
        for (name, args, older, goes_on) in jobs {
            let (whole, takes) = bench.made(&args, &work.join("out"));
            bench.jobs.push(Job { name, args, older, goes_on, whole, takes });
        }
        bench
    }

    /// What a command writes that nobody breaks off.
    fn made(&self, args: &[String], out: &Path) -> (Held, Duration) {
        let began = Instant::now();
        self.ends_well(args);
        let takes = began.elapsed();
        let whole = held(out).unwrap();
        remove(out);
        (whole, takes)
    }

    fn ends_well(&self, args: &[String]) -> Output {
        let output = Command::new(binary()).args(args).arg("--json").output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    fn out(&self, job: &Job) -> PathBuf {
        let at = job.args.iter().position(|arg| arg == "--out").unwrap();
        PathBuf::from(&job.args[at + 1])
    }

    /// What was there before.
    pub fn older(&self, job: &Job) -> Option<&Held> {
        job.older.then_some(&self.older[usize::from(job.name.starts_with("calibrate"))])
    }

    /// The command, begun, with what was there before in its place.
    pub fn begin(&self, job: &Job, shell: Option<&str>) -> Child {
        let out = self.out(job);
        if let Some(older) = self.older(job) {
            put(&out, older);
        }
        self.begin_over(job, shell, job.older)
    }

    /// The command, begun over whatever is there.
    pub fn begin_over(&self, job: &Job, shell: Option<&str>, force: bool) -> Child {
        let mut command = match shell {
            Some(before) => {
                let mut command = Command::new("bash");
                command.args(["-c", &format!("{before}; exec \"$@\""), "bash"]).arg(binary());
                command
            }
            None => Command::new(binary()),
        };
        let force = force.then_some("--force");
        command.args(&job.args).args(force).arg("--json");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Hidden names beside the output.
    pub fn hidden(&self, job: &Job) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.out(job).parent().unwrap()).unwrap();
        let all = entries.map(|entry| entry.unwrap().path());
        all.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(".qcqa.")).collect()
    }

    /// Checks what a run that was broken off has left, and says what that is. `clean`: it has ended by itself, and hides nothing.
    pub fn check(&self, job: &Job, clean: bool, of: &str) -> &'static str {
        let (out, model) = (self.out(job), self.root.path().join("model"));
        assert!(held(&model).unwrap() == self.source, "{of}: the source was touched");
        let state = PathBuf::from(format!("{}.distilling", out.display()));
        for entry in fs::read_dir(out.parent().unwrap()).unwrap() {
            let path = entry.unwrap().path();
            let known = path == out || path == state && job.goes_on || path.ends_with("filler");
            assert!(known || self.hidden(job).contains(&path), "{of}: left {}", path.display());
        }
        let hidden = self.hidden(job);
        assert!(!clean || hidden.is_empty(), "{of}: left {hidden:?}");
        match held(&out) {
            Some(found) if found == job.whole => "the new output",
            Some(found) if self.older(job) == Some(&found) => "the older output",
            Some(found) if job.goes_on && found.keys().eq(job.whole.keys()) => {
                "an output that says it is not done"
            }
            Some(found) => panic!("{of}: half an output: {:?}", found.keys()),
            None if !job.older => "nothing",
            // Killed between two renames.
            None => {
                let aside = hidden.iter().filter_map(|path| held(&path.join("model")));
                let kept = aside.filter(|found| self.older(job) == Some(found)).count();
                assert_eq!(kept, 1, "{of}: the older output is lost");
                "the older output, moved aside"
            }
        }
    }

    /// Runs it again: that ends well, as if nothing had been, and nothing is left.
    pub fn again(&self, job: &Job, of: &str) {
        let force = job.older || self.out(job).exists();
        let output = self.begin_over(job, None, force).wait_with_output().unwrap();
        assert!(output.status.success(), "{of}, again: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(self.check(job, true, of), "the new output", "{of}, again");
        remove(&self.out(job));
        let left = fs::read_dir(self.out(job).parent().unwrap()).unwrap().map(|entry| entry.unwrap().path());
        let left: Vec<_> = left.filter(|path| !path.ends_with("filler")).collect();
        assert!(left.is_empty(), "{of}, again: left {left:?}");
    }

    pub fn forget(&self, job: &Job) {
        remove(&self.out(job));
    }
}

/// Sends a signal; a process that has ended is none to send it to.
pub fn signal(child: &Child, name: &str) {
    let mut kill = Command::new("kill");
    kill.args([&format!("-{name}"), &child.id().to_string()]).stderr(Stdio::null()).status().unwrap();
}

/// Whether it has ended by itself.
pub fn by_itself(status: ExitStatus) -> bool {
    status.signal().is_none()
}
