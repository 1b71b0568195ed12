//! What a training left behind, as numbers over time: steps, losses, bytes. Nothing here reads a clock or a file.
//!
//! Every system's sites write one line a step: Beringia's `events.jsonl`, the peers' own JSON lines. The counters of a
//! site's network interface come as lines `seconds bytes` since 1970. All times become seconds since the sites were started.

use serde_json::Value;

/// Points of a stored curve: enough for a picture, few enough for a line of JSON.
const CURVE_POINTS_MAX: usize = 120;

/// The end of one inner step of one site.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Step {
    /// Since the sites were started.
    pub(crate) seconds: f64,
    /// The first is 1.
    pub(crate) step: u64,
    /// Training loss, nats per token.
    pub(crate) nats: f64,
}

/// Bytes that an interface had sent at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sent {
    /// Since the sites were started; before that below 0.
    pub(crate) seconds: f64,
    /// Counter of the interface.
    pub(crate) bytes: f64,
}

/// A point of a loss curve.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Point {
    /// Since the sites were started.
    pub(crate) seconds: f64,
    /// Trained by all sites.
    pub(crate) tokens: f64,
    /// Training loss of the last steps of all sites, nats per token.
    pub(crate) nats: f64,
}

/// The objects of a file of JSON lines; a torn line is left out.
fn objects(text: &str) -> impl Iterator<Item = Value> + '_ {
    text.lines().filter_map(|line| serde_json::from_str(line).ok())
}

/// The steps in a Beringia site's event log. A step that was made anew counts once, when it was made last.
pub(crate) fn beringia_steps(events: &str, started_unix: f64) -> Vec<Step> {
    let step = |event: Value| {
        let seconds = event["unix_ms"].as_f64()? / 1e3 - started_unix;
        Some(Step { seconds, step: event["step"].as_u64()?, nats: event["loss_nats"].as_f64()? })
    };
    let mut steps: Vec<Step> = Vec::new();
    for step in objects(events).filter(|event| event["event"] == "step").filter_map(step) {
        while steps.last().is_some_and(|last| last.step >= step.step) {
            steps.pop();
        }
        steps.push(step);
    }
    steps
}

/// The steps in a peer's log.
pub(crate) fn peer_steps(log: &str, started_unix: f64) -> Vec<Step> {
    let step = |line: Value| {
        let seconds = line["t"].as_f64()? - started_unix;
        Some(Step { seconds, step: line["step"].as_u64()?, nats: line["loss"].as_f64()? })
    };
    objects(log).filter_map(step).collect()
}

/// The validation loss in a peer's log, where it got that far.
pub(crate) fn peer_validation(log: &str) -> Option<f64> {
    objects(log).filter(|line| line["ev"] == "eval").find_map(|line| line["loss"].as_f64())
}

/// The readings of an interface's counter.
pub(crate) fn sent(readings: &str, started_unix: f64) -> Vec<Sent> {
    let reading = |line: &str| {
        let (unix, bytes) = line.split_once(' ')?;
        Some(Sent { seconds: unix.parse::<f64>().ok()? - started_unix, bytes: bytes.trim().parse().ok()? })
    };
    readings.lines().filter_map(reading).collect()
}

/// Bytes sent until `seconds`, linear between readings.
pub(crate) fn sent_until(readings: &[Sent], seconds: f64) -> f64 {
    let after = readings.partition_point(|reading| reading.seconds <= seconds);
    match (after.checked_sub(1).map(|before| readings[before]), readings.get(after)) {
        (Some(a), Some(b)) => a.bytes + (b.bytes - a.bytes) * (seconds - a.seconds) / (b.seconds - a.seconds),
        (Some(last), None) => last.bytes,
        (None, Some(first)) => first.bytes,
        (None, None) => f64::NAN,
    }
}

/// Training loss over time: at each step of any site the mean of the last `window` steps of all sites.
pub(crate) fn curve(sites: &[Vec<Step>], step_tokens: f64, window: usize) -> Vec<Point> {
    let mut steps: Vec<Step> = sites.iter().flatten().copied().collect();
    steps.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let stride = steps.len().div_ceil(CURVE_POINTS_MAX).max(1);
    let is_shown = |index: usize| (index + 1).is_multiple_of(stride) || index + 1 == steps.len();
    let point = |index: usize| {
        let last = &steps[(index + 1).saturating_sub(window.max(1))..=index];
        let nats = last.iter().map(|step| step.nats).sum::<f64>() / last.len() as f64;
        Point { seconds: steps[index].seconds, tokens: (index + 1) as f64 * step_tokens, nats }
    };
    (0..steps.len()).filter(|index| is_shown(*index)).map(point).collect()
}

/// The loss of a curve at a time; none before its first point and after its last.
pub(crate) fn loss_at(curve: &[Point], seconds: f64) -> Option<f64> {
    let after = curve.partition_point(|point| point.seconds < seconds);
    let (b, a) = (curve.get(after)?, curve.get(after.checked_sub(1)?)?);
    Some(a.nats + (b.nats - a.nats) * (seconds - a.seconds) / (b.seconds - a.seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_both_kinds_of_logs_are_read() {
        let events = r#"{"unix_ms":1500,"event":"step","step":1,"loss_nats":6.0}
{"unix_ms":1600,"event":"round_computed","round":1}
{"unix_ms":2000,"event":"step","step":2,"loss_nats":5.0}
{"unix_ms":2500,"ev"#;
        let first = Step { seconds: 0.5, step: 1, nats: 6.0 };
        assert_eq!(beringia_steps(events, 1.0), [first, Step { seconds: 1.0, step: 2, nats: 5.0 }]);
        let log = r#"{"ev": "start", "boot": 2.0, "t": 1.2, "tx": 0, "rx": 0}
{"step": 1, "dt": 0.5, "loss": 6.0, "t": 1.5, "tx": 10, "rx": 0}
{"ev": "end", "n": 1, "t": 1.6}
{"ev": "eval", "loss": 5.5, "t": 1.7}"#;
        assert_eq!(peer_steps(log, 1.0), [first]);
        assert_eq!(peer_validation(log), Some(5.5));
        assert_eq!(peer_validation(""), None);
    }

    #[test]
    fn steps_made_anew_count_once() {
        let line =
            |ms: u64, step: u64| format!("{{\"unix_ms\":{ms},\"event\":\"step\",\"step\":{step},\"loss_nats\":1.0}}\n");
        let events = [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3)].map(|(ms, step)| line(ms * 1000, step)).concat();
        let steps = beringia_steps(&events, 0.0);
        assert_eq!(
            steps.iter().map(|step| (step.step, step.seconds)).collect::<Vec<_>>(),
            [(1, 1.0), (2, 4.0), (3, 5.0)]
        );
    }

    #[test]
    fn counters_are_linear_between_readings() {
        let readings = sent("10.0 100\n12.0 300\ntorn\n", 10.0);
        assert_eq!(readings.len(), 2);
        for (seconds, bytes) in [(-1.0, 100.0), (0.0, 100.0), (1.0, 200.0), (2.0, 300.0), (9.0, 300.0)] {
            assert_eq!(sent_until(&readings, seconds), bytes);
        }
        assert!(sent_until(&[], 1.0).is_nan());
    }

    #[test]
    fn a_curve_is_the_mean_of_the_last_steps_of_all_sites() {
        let site = |offset: f64| {
            (1..=400).map(|step| Step { seconds: step as f64 + offset, step, nats: 4.0 }).collect::<Vec<_>>()
        };
        let points = curve(&[site(0.0), site(0.5)], 1024.0, 10);
        assert!(points.len() <= CURVE_POINTS_MAX + 1);
        let last = points.last().unwrap();
        assert_eq!((last.seconds, last.tokens, last.nats), (400.5, 800.0 * 1024.0, 4.0));
        assert_eq!(loss_at(&points, 200.0), Some(4.0));
        assert_eq!((loss_at(&points, 0.5), loss_at(&points, 500.0)), (None, None));
        assert!(curve(&[], 1.0, 10).is_empty());
        let two = [Step { seconds: 1.0, step: 1, nats: 4.0 }, Step { seconds: 2.0, step: 2, nats: 2.0 }];
        assert_eq!(curve(&[two.to_vec()], 1.0, 10)[1].nats, 3.0);
    }
}
