//! Tests of `terminal`: the estimate by hand, and what reaches the writer in each mode.

use super::*;

/// A writer whose content the test can see.
#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Captured {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Captured {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn every(every_steps: u64, at_end: bool) -> Cadence {
    Cadence { every_steps, at_end }
}

#[test]
fn occasions_left_are_counted_by_hand() {
    let thirds = every(3, false);
    assert_eq!((0..=10).map(|step| thirds.left(step, 10)).collect::<Vec<_>>(), [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0]);
    // Steps 3, 6, 9 and one more after step 10; none is added where one falls on the last step.
    assert_eq!(every(3, true).left(0, 10), 4);
    assert_eq!(every(3, true).left(9, 10), 1);
    assert_eq!(every(5, true).left(0, 10), 2);
    assert_eq!(every(5, true).left(10, 10), 0);
    assert_eq!(every(0, true).left(4, 10), 1);
    assert_eq!(Cadence::NEVER.left(0, 10), 0);
}

#[test]
fn the_time_left_includes_validation_and_saving() {
    let mut eta = EtaModel::new(100, every(10, true), every(50, true));
    assert_eq!(eta.seconds_left(0), None);
    eta.observe_step(0.5);
    assert_eq!(eta.seconds_left(0), Some(50.0));
    eta.observe_validation(2.0);
    eta.observe_save(3.0);
    assert_eq!(eta.seconds_left(0), Some(100.0 * 0.5 + 10.0 * 2.0 + 2.0 * 3.0));
    assert_eq!(eta.seconds_left(60), Some(40.0 * 0.5 + 4.0 * 2.0 + 3.0));
    assert_eq!(eta.seconds_left(100), Some(0.0));
    assert_eq!(eta.seconds_left(101), Some(0.0));
}

#[test]
fn the_estimate_follows_the_newest_and_ignores_nonsense() {
    let mut eta = EtaModel::new(10, Cadence::NEVER, Cadence::NEVER);
    eta.observe_step(1.0);
    eta.observe_step(2.0);
    assert!((eta.seconds_left(0).unwrap() - 11.0).abs() < 1e-9);
    for nonsense in [f64::NAN, f64::INFINITY, -1.0] {
        eta.observe_step(nonsense);
    }
    assert!((eta.seconds_left(0).unwrap() - 11.0).abs() < 1e-9);
    (0..200).for_each(|_| eta.observe_step(2.0));
    assert!((eta.seconds_left(0).unwrap() - 20.0).abs() < 1e-6);
}

#[test]
fn a_bar_needs_a_terminal_and_no_no_color() {
    let plain = Mode::Lines { seconds_between: LINE_SECONDS };
    assert_eq!(Mode::choose(true, None, 80), Mode::Bar { columns: 80 });
    assert_eq!(Mode::choose(true, Some(OsStr::new("")), 80), Mode::Bar { columns: 80 });
    assert_eq!(Mode::choose(true, Some(OsStr::new("1")), 80), plain);
    assert_eq!(Mode::choose(false, None, 80), plain);
    assert_eq!(Mode::choose(true, None, 10), plain);
}

fn position(step: u64) -> Position {
    Position { step, round: step / 10, loss_nats: 2.5, tokens_per_second: 1_400.0, bits_per_byte: Some(2.25) }
}

#[test]
fn plain_lines_are_bounded_in_rate_and_free_of_control_sequences() {
    let captured = Captured::default();
    let mut progress = Progress::new(Box::new(captured.clone()), Mode::Lines { seconds_between: 10.0 }, 100);
    for step in 1..=99 {
        progress.update(&position(step), Some(75.0), step as f64);
    }
    progress.say("sample: To be");
    progress.update(&position(100), Some(0.0), 99.5);
    progress.finish();
    let text = captured.text();
    let lines: Vec<&str> = text.lines().collect();
    // Steps 1, 11, 21 … 91, the sample, and the last step although it came early.
    assert_eq!(lines.len(), 12, "{text}");
    assert_eq!(lines[0], "step 1/100  1m 15s left  round 0  loss 2.5000  1.40 k tokens/s  validation 2.2500 bits/byte");
    assert_eq!(lines[10], "sample: To be");
    assert!(lines[11].starts_with("step 100/100  0s left"));
    assert!(!text.contains('\u{1b}') && !text.contains('\r'), "{text:?}");
}

#[test]
fn a_bar_shows_position_and_time_left_and_cleans_up() {
    let captured = Captured::default();
    let mut progress = Progress::new(Box::new(captured.clone()), Mode::Bar { columns: 120 }, 100);
    progress.update(&position(50), Some(75.0), 0.0);
    progress.say("sample: To be");
    let text = captured.text();
    assert!(text.contains("50/100") && text.contains("1m 15s left"), "{text:?}");
    assert!(text.contains("sample: To be\n"), "{text:?}");
    progress.finish();
    let after = captured.text();
    assert!(after[text.len()..].contains("\u{1b}[2K"), "{after:?}");
}

/// A closed pipe must not stop training.
#[test]
fn a_writer_that_fails_is_ignored() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    }
    for mode in [Mode::Lines { seconds_between: 0.0 }, Mode::Bar { columns: 80 }] {
        let mut progress = Progress::new(Box::new(Broken), mode, 2);
        progress.update(&position(1), None, 0.0);
        progress.say("still here");
        progress.update(&position(2), None, 1.0);
        progress.finish();
    }
}
