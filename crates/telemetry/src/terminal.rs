//! Progress while training: a bar on a terminal, plain lines at a bounded rate everywhere else.
//!
//! The time left is a model of its own ([`EtaModel`]): a run also validates and saves, and a bar that forgets it
//! promises an end that never comes. Time is an argument; nothing here reads a clock to decide.

use crate::view::{counted, duration};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};
use std::ffi::OsStr;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// Weight of the newest measurement in a moving average: the last 20 or so count.
const NEWEST_WEIGHT: f64 = 0.1;
/// Time between two plain lines, seconds: a day's log stays under 10,000 lines.
pub const LINE_SECONDS: f64 = 10.0;
/// Narrowest bar that is drawn.
const COLUMNS_MIN: u16 = 40;

/// An exponential moving average that starts at its first value.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Average(Option<f64>);

impl Average {
    fn observe(&mut self, value: f64) {
        if value.is_finite() && value >= 0.0 {
            self.0 = Some(self.0.map_or(value, |old| old + NEWEST_WEIGHT * (value - old)));
        }
    }
}

/// How often something is done between steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cadence {
    /// Inner steps between two of them; 0 for never.
    pub every_steps: u64,
    /// Whether one more comes after the last step, if none falls there.
    pub at_end: bool,
}

impl Cadence {
    /// Never.
    pub const NEVER: Self = Self { every_steps: 0, at_end: false };

    /// How many are still to come after `step` of `steps` steps.
    fn left(self, step: u64, steps: u64) -> u64 {
        if step >= steps {
            return 0;
        }
        let done_by = |step: u64| step.checked_div(self.every_steps).unwrap_or(0);
        let falls_on_end = self.every_steps > 0 && steps.is_multiple_of(self.every_steps);
        done_by(steps) - done_by(step) + u64::from(self.at_end && !falls_on_end)
    }
}

/// Time left = steps left × seconds a step + validations left × seconds each + saves left × seconds each.
///
/// A duration that was not measured yet counts as nothing, so the estimate grows once, at the first validation.
#[derive(Debug, Clone, PartialEq)]
pub struct EtaModel {
    steps: u64,
    validations: Cadence,
    saves: Cadence,
    step_seconds: Average,
    validation_seconds: Average,
    save_seconds: Average,
}

impl EtaModel {
    /// A run of `steps` inner steps.
    pub fn new(steps: u64, validations: Cadence, saves: Cadence) -> Self {
        Self {
            steps,
            validations,
            saves,
            step_seconds: Average::default(),
            validation_seconds: Average::default(),
            save_seconds: Average::default(),
        }
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// One inner step took that long; synchronisation is a part of it.
    pub fn observe_step(&mut self, seconds: f64) {
        self.step_seconds.observe(seconds);
    }

    /// One validation took that long.
    pub fn observe_validation(&mut self, seconds: f64) {
        self.validation_seconds.observe(seconds);
    }

    /// One save took that long.
    pub fn observe_save(&mut self, seconds: f64) {
        self.save_seconds.observe(seconds);
    }

    /// Time left after `step` steps; `None` before a step was measured.
    pub fn seconds_left(&self, step: u64) -> Option<f64> {
        let of = |average: Average| average.0.unwrap_or(0.0);
        let steps_left = self.steps.saturating_sub(step) as f64;
        let validations_left = self.validations.left(step, self.steps) as f64;
        let saves_left = self.saves.left(step, self.steps) as f64;
        Some(
            steps_left * self.step_seconds.0?
                + validations_left * of(self.validation_seconds)
                + saves_left * of(self.save_seconds),
        )
    }
}

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mode {
    /// A bar that is drawn again and again.
    Bar {
        /// Width of the terminal, characters.
        columns: u16,
    },
    /// A line now and then, without control sequences.
    Lines {
        /// Least time between two lines.
        seconds_between: f64,
    },
}

impl Mode {
    /// A bar on a terminal, unless `NO_COLOR` is set and not empty (<https://no-color.org>) or the terminal is too
    /// narrow: then no control sequence is written at all.
    pub fn choose(is_terminal: bool, no_color: Option<&OsStr>, columns: u16) -> Self {
        let plain = no_color.is_some_and(|value| !value.is_empty());
        if is_terminal && !plain && columns >= COLUMNS_MIN {
            Self::Bar { columns }
        } else {
            Self::Lines { seconds_between: LINE_SECONDS }
        }
    }
}

/// Where training stands.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Position {
    /// Inner steps made.
    pub step: u64,
    /// Rounds committed.
    pub round: u64,
    /// Training loss, nats a token.
    pub loss_nats: f64,
    /// Training speed.
    pub tokens_per_second: f64,
    /// The last validation.
    pub bits_per_byte: Option<f64>,
}

impl Position {
    fn describe(&self) -> String {
        let mut text =
            format!("round {}  loss {:.4}  {} tokens/s", self.round, self.loss_nats, counted(self.tokens_per_second));
        if let Some(bits) = self.bits_per_byte {
            text.push_str(&format!("  validation {bits:.4} bits/byte"));
        }
        text
    }
}

/// A writer that the bar and the lines above it share.
#[derive(Clone)]
struct Shared(Arc<Mutex<Box<dyn Write + Send>>>);

impl Shared {
    fn with<T>(&self, write: impl FnOnce(&mut dyn Write) -> io::Result<T>) -> io::Result<T> {
        write(&mut **self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn line(&self, text: &str) {
        // Progress is not worth stopping for: a closed pipe loses lines, not the run.
        let _ = self.with(|writer| writeln!(writer, "{text}").and_then(|()| writer.flush()));
    }
}

/// The writer as indicatif sees a terminal.
struct Screen {
    writer: Shared,
    columns: u16,
}

impl std::fmt::Debug for Screen {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Screen").field("columns", &self.columns).finish_non_exhaustive()
    }
}

impl Screen {
    /// A control sequence with a count; a count of 0 would mean 1 to the terminal.
    fn control(&self, count: usize, code: char) -> io::Result<()> {
        if count == 0 { Ok(()) } else { self.writer.with(|writer| write!(writer, "\x1b[{count}{code}")) }
    }
}

impl TermLike for Screen {
    fn width(&self) -> u16 {
        self.columns
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.control(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.control(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.control(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.control(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.writer.with(|writer| writeln!(writer, "{text}"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.writer.with(|writer| writer.write_all(text.as_bytes()))
    }

    fn clear_line(&self) -> io::Result<()> {
        self.writer.with(|writer| writer.write_all(b"\r\x1b[2K"))
    }

    fn flush(&self) -> io::Result<()> {
        self.writer.with(|writer| writer.flush())
    }
}

enum Face {
    Bar(ProgressBar),
    Lines { seconds_between: f64, last_seconds: Option<f64> },
}

/// Shows progress on a writer.
pub struct Progress {
    writer: Shared,
    face: Face,
    steps: u64,
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Progress").field("steps", &self.steps).finish_non_exhaustive()
    }
}

impl Progress {
    /// Shows a run of `steps` inner steps on `writer`, standard error as a rule.
    pub fn new(writer: Box<dyn Write + Send>, mode: Mode, steps: u64) -> Self {
        let writer = Shared(Arc::new(Mutex::new(writer)));
        let face = match mode {
            Mode::Lines { seconds_between } => Face::Lines { seconds_between, last_seconds: None },
            Mode::Bar { columns } => Face::Bar(bar(&writer, columns, steps)),
        };
        Self { writer, face, steps }
    }

    /// Shows where training stands. `now_seconds` is any monotonic time; plain lines come at most once in
    /// [`LINE_SECONDS`], the first one and that of the last step always.
    pub fn update(&mut self, position: &Position, seconds_left: Option<f64>, now_seconds: f64) {
        let left =
            seconds_left.map_or_else(|| "time left unknown".to_owned(), |left| format!("{} left", duration(left)));
        let text = position.describe();
        match &mut self.face {
            Face::Bar(bar) => {
                bar.set_position(position.step);
                bar.set_message(format!("{left}  {text}"));
            }
            Face::Lines { seconds_between, last_seconds } => {
                let due = last_seconds.is_none_or(|last| now_seconds - last >= *seconds_between);
                if due || position.step >= self.steps {
                    *last_seconds = Some(now_seconds);
                    self.writer.line(&format!("step {}/{}  {left}  {text}", position.step, self.steps));
                }
            }
        }
    }

    /// Writes a line that stays, above the bar if there is one.
    pub fn say(&self, line: &str) {
        match &self.face {
            Face::Bar(bar) => bar.suspend(|| self.writer.line(line)),
            Face::Lines { .. } => self.writer.line(line),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Face::Bar(bar) = &self.face {
            bar.finish_and_clear();
        }
    }
}

fn bar(writer: &Shared, columns: u16, steps: u64) -> ProgressBar {
    // Four drawings a second: enough for an eye, nothing beside a training step.
    let screen = Screen { writer: writer.clone(), columns };
    let target = ProgressDrawTarget::term_like_with_hz(Box::new(screen), 4);
    let style = ProgressStyle::with_template("{bar:20} {pos}/{len}  {msg}")
        .unwrap_or_else(|error| unreachable!("the template is constant: {error}"))
        .progress_chars("=> ");
    ProgressBar::with_draw_target(Some(steps), target).with_style(style)
}

#[cfg(test)]
#[path = "terminal_tests.rs"]
mod terminal_tests;
