//! Progress bars on a terminal, silence in a pipe, and Ctrl-C.

use std::io::{IsTerminal, stderr};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

use qcqa::{Observer, Progress};

/// The stages that get a bar, with what they are called; other stages are shown beside it.
const BARS: [(&str, &str); 15] = [
    ("layers", "reading layers"),
    ("search", "searching"),
    ("pool", "sharing heads"),
    ("write", "writing"),
    ("evaluate", "evaluating"),
    ("sample", "writing text"),
    ("calibrate", "calibrating"),
    ("sensitivity", "weighing layers"),
    ("choose", "choosing"),
    ("probe", "probing heads"),
    ("mix", "mixing"),
    ("recall", "asking"),
    ("refit", "refitting"),
    ("distil", "distilling"),
    ("choices", "answering"),
];

/// Draws a bar with the time left when standard error is a terminal, and breaks off after Ctrl-C or SIGTERM.
#[derive(Debug)]
pub(super) struct Watch {
    interrupted: Arc<AtomicBool>,
    terminal: bool,
    bar: Mutex<Option<(&'static str, ProgressBar)>>,
}

impl Watch {
    pub(super) fn new() -> Result<Self, ctrlc::Error> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&interrupted);
        ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))?;
        Ok(Self { interrupted, terminal: stderr().is_terminal(), bar: Mutex::new(None) })
    }

    /// Takes the bar away.
    pub(super) fn finish(&self) {
        if let Some((_, bar)) = self.bar.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.finish_and_clear();
        }
    }

    fn draw(&self, progress: &Progress<'_>) {
        let named = BARS.iter().find(|(stage, _)| *stage == progress.stage);
        let mut shown = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        match (named, &mut *shown) {
            (Some((stage, _)), Some((current, bar))) if current == stage => {
                bar.set_length(progress.total);
                bar.set_prefix(progress.detail.to_string());
                bar.set_position(progress.done);
            }
            (Some((stage, name)), shown) => {
                if let Some((_, old)) = shown.take() {
                    old.finish_and_clear();
                }
                let bar = ProgressBar::new(progress.total).with_message(*name);
                let style = ProgressStyle::with_template(
                    "{msg:16} {wide_bar} {pos}/{len}  {prefix} {elapsed} (left: {eta})",
                );
                if let Ok(style) = style {
                    bar.set_style(style);
                }
                bar.set_position(progress.done);
                *shown = Some((stage, bar));
            }
            (None, Some((_, bar))) => bar.tick(),
            (None, None) => {}
        }
    }
}

impl Observer for Watch {
    fn observe(&self, progress: &Progress<'_>) -> ControlFlow<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        if self.terminal {
            self.draw(progress);
        }
        ControlFlow::Continue(())
    }
}
