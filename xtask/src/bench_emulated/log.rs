//! What a site has written to its event log since it was last looked at: steps, and hashes of the global state.

use crate::runs::Failure;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::PathBuf;

/// A log that is still being written.
#[derive(Debug)]
pub(super) struct SiteLog {
    path: PathBuf,
    offset: u64,
    /// A line whose end is not written yet.
    rest: Vec<u8>,
    /// When each inner step ended, seconds since 1970.
    pub(super) steps: BTreeMap<u64, f64>,
    /// Hash of the global state after each round.
    pub(super) states: BTreeMap<u64, String>,
    /// Bytes of the other site's deltas, by round.
    pub(super) fetched: BTreeMap<u64, f64>,
}

impl SiteLog {
    /// A log that may not be there yet.
    pub(super) fn new(path: PathBuf) -> Self {
        let (steps, states, fetched) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { path, offset: 0, rest: Vec::new(), steps, states, fetched }
    }

    /// Reads what is new.
    ///
    /// # Errors
    /// The file cannot be read.
    pub(super) fn read(&mut self) -> Result<(), Failure> {
        let mut file = match File::open(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        file.seek(SeekFrom::Start(self.offset))?;
        self.offset += file.read_to_end(&mut self.rest)? as u64;
        let whole = self.rest.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let lines: Vec<u8> = self.rest.drain(..whole).collect();
        for line in lines.split(|byte| *byte == b'\n') {
            if let Ok(event) = serde_json::from_slice::<Value>(line) {
                self.take(&event);
            }
        }
        Ok(())
    }

    fn take(&mut self, event: &Value) -> Option<()> {
        let round = || event["round"].as_u64();
        match event["event"].as_str()? {
            "step" => {
                self.steps.insert(event["step"].as_u64()?, event["unix_ms"].as_f64()? / 1e3);
            }
            "round_applied" => {
                self.states.insert(round()?, event["state_hash"].as_str()?.to_owned());
            }
            "delta_fetched" => {
                self.fetched.insert(round()?, event["bytes"].as_f64()?);
            }
            _ => {}
        }
        Some(())
    }

    /// Inner steps made.
    pub(super) fn last_step(&self) -> u64 {
        self.steps.last_key_value().map_or(0, |(step, _)| *step)
    }
}

/// Steps a second of a site from the end of step `from` to the end of step `to`; where it has not got that far, to `now`.
pub(super) fn speed(log: &SiteLog, from: u64, to: u64, now: f64) -> Option<f64> {
    let start = log.steps.get(&from)?;
    match log.steps.get(&to) {
        Some(end) => Some((to - from) as f64 / (end - start)),
        None => Some((log.last_step() - from) as f64 / (now - start)),
    }
}

/// Rounds after which both hold a state, and the first after which they differ.
pub(super) fn agreement(first: &SiteLog, second: &SiteLog) -> (usize, Option<u64>) {
    let both = || first.states.iter().filter_map(|(round, state)| Some((round, state, second.states.get(round)?)));
    (both().count(), both().find(|(_, a, b)| a != b).map(|(round, ..)| *round))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_growing_log_is_read_line_by_line() {
        let folder = std::env::temp_dir().join(format!("beringia-site-log-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut log = SiteLog::new(folder.join("events.jsonl"));
        log.read().unwrap();
        assert_eq!(log.last_step(), 0);
        let mut file = File::create(folder.join("events.jsonl")).unwrap();
        let text = "{\"event\":\"step\",\"step\":1,\"unix_ms\":1500}\n{\"event\":\"step\",\"st";
        file.write_all(text.as_bytes()).unwrap();
        log.read().unwrap();
        assert_eq!(log.last_step(), 1);
        let text = "ep\":2,\"unix_ms\":2500}\n{\"event\":\"round_applied\",\"round\":1,\"state_hash\":\"ab\"}\n";
        file.write_all(text.as_bytes()).unwrap();
        log.read().unwrap();
        std::fs::remove_dir_all(folder).unwrap();
        assert_eq!((log.last_step(), log.steps[&2], log.states[&1].as_str()), (2, 2.5, "ab"));
    }

    fn log(steps: &[(u64, f64)], states: &[(u64, &str)]) -> SiteLog {
        let states = states.iter().map(|(round, state)| (*round, (*state).to_owned())).collect();
        SiteLog { steps: steps.iter().copied().collect(), states, ..SiteLog::new(PathBuf::new()) }
    }

    #[test]
    fn speed_is_counted_to_the_end_of_the_window_or_until_now() {
        let log = log(&[(4, 10.0), (5, 11.0), (6, 14.0)], &[]);
        assert_eq!(speed(&log, 4, 6, 99.0), Some(0.5));
        assert_eq!(speed(&log, 4, 8, 20.0), Some(0.2));
        assert_eq!(speed(&log, 3, 6, 20.0), None);
    }

    #[test]
    fn sites_agree_where_both_hold_a_state() {
        let first = log(&[], &[(1, "a"), (2, "b"), (3, "c")]);
        assert_eq!(agreement(&first, &log(&[], &[(1, "a"), (2, "b")])), (2, None));
        assert_eq!(agreement(&first, &log(&[], &[(2, "x"), (3, "c")])), (2, Some(2)));
    }
}
