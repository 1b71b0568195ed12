//! The event log, which `beringia status` and the audit read back.

use crate::memory::Bound;
use crate::place::Place;
use std::path::Path;
use telemetry::audit::ProcessLog;
use telemetry::{Circumstances, EventLog, Record, RunLogs, RunView, audit};

/// An event of some hundred bytes in a line becomes one in memory; a poll reads into a buffer that grows by doubling.
const LOG: Bound = Bound { base_bytes: 1 << 20, per_byte: 64 };

/// A width at which a table is cut.
const WIDTH: usize = 60;

/// A log, torn or damaged anywhere: what is read is the same when it is written again, the status and the audit can be made of it, and a
/// process goes on writing after it.
pub fn event_log(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = Place::new();
    }
    PLACE.with(|place| {
        place.write("events.jsonl", bytes);
        let path = place.path().join("events.jsonl");
        let records = LOG.check(bytes.len(), || read(&path));
        for record in &records {
            let line = record.to_line();
            let again = Record::from_line(line.as_bytes()).expect("what was written can be read");
            assert_eq!(again.to_line(), line);
        }
        let view = RunView::of(&records);
        assert!(view.to_json().is_object());
        let _ = (view.render_table(WIDTH), view.eta_seconds(), view.tokens_per_second());
        let process = ProcessLog::read("site-0", &path).expect("the file is there");
        let logs = RunLogs { coordinator: process.clone(), sites: vec![process] };
        let _ = audit(&logs, &Circumstances::default());
        goes_on(&path, records);
    });
}

fn read(path: &Path) -> Vec<Record> {
    let records = telemetry::read(path).expect("the file is there");
    records.map(|record| record.expect("a temporary file can be read")).collect()
}

fn goes_on(path: &Path, before: Vec<Record>) {
    let mut log = EventLog::open(path, "site-0", Box::new(|| 0)).expect("a temporary file can be opened");
    let warning = telemetry::Event::Warning { message: "a \"word\"\n".to_owned(), hint: None };
    let record = log.stamp(warning);
    log.append(&record).expect("a temporary file can be written");
    let after = read(path);
    assert_eq!(after.last(), Some(&record), "a record is lost behind what was torn");
    // A last line that lacked only its end is completed by the one that follows.
    assert!(after.len() == before.len() + 1 || after.len() == before.len() + 2, "records are lost");
}
