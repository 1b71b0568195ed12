//! Where a site's events go: the log on disk, and whoever watches.

use crate::event::{Event, Record};
use crate::log::EventLog;

/// Sees every record as it is made.
pub type Watcher = Box<dyn FnMut(&Record) + Send>;

/// Writes events to the log and shows them. A log that cannot be written never stops training: that is said once.
pub struct Reporter {
    log: EventLog,
    watcher: Watcher,
    warned: bool,
}

impl Reporter {
    /// Events to `log`, shown to `watcher`.
    pub fn new(log: EventLog, watcher: Watcher) -> Self {
        Self { log, watcher, warned: false }
    }

    /// Logs one event and gives it as it was recorded.
    pub fn emit(&mut self, event: Event) -> Record {
        let record = self.log.stamp(event);
        if let Err(error) = self.log.append(&record)
            && !std::mem::replace(&mut self.warned, true)
        {
            let message = format!("the event log cannot be written, training goes on: {error}");
            let warning = self.log.stamp(Event::Warning { message, hint: base::Hint::hint(&error) });
            (self.watcher)(&warning);
        }
        (self.watcher)(&record);
        record
    }

    /// Logs a warning with what mends it.
    pub fn warn(&mut self, message: String, hint: Option<String>) {
        self.emit(Event::Warning { message, hint });
    }
}
