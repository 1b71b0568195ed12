//! How far a long step has come: a bar with the time left on a terminal, a plain line at every tenth elsewhere,
//! once it takes long enough to wonder.

use crate::output::Output;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// Plain lines written for one step.
const PLAIN_LINES: u64 = 10;
/// What is done before this needs no lines.
const QUIET: Duration = Duration::from_secs(2);

/// One long step.
pub(crate) struct Progress<'a> {
    output: &'a Output,
    what: &'static str,
    bar: ProgressBar,
    total: u64,
    tenths_written: u64,
    started: Instant,
}

impl<'a> Progress<'a> {
    /// A step of `total` units, in which `what` is done.
    pub(crate) fn new(output: &'a Output, what: &'static str, total: u64) -> Self {
        let bar = if output.is_terminal() { ProgressBar::new(total) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{msg} {wide_bar} {percent:>3} %, {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_message(what);
        Self { output, what, bar, total, tenths_written: 0, started: Instant::now() }
    }

    /// `done` units of the total are done.
    pub(crate) fn set(&mut self, done: u64) {
        self.bar.set_position(done);
        let tenths = done.min(self.total) * PLAIN_LINES / self.total.max(1);
        let is_watched = self.output.is_terminal() || self.output.is_json();
        if tenths > self.tenths_written && !is_watched && self.started.elapsed() >= QUIET {
            self.tenths_written = tenths;
            self.output.notice(format_args!("{}: {} %", self.what, tenths * 100 / PLAIN_LINES));
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
