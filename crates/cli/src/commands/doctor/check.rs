//! One check: whether it is well, the fact, and what mends it.

use crate::failure::Failure;
use serde::Serialize;
use serde_json::{Map, Value};

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    /// Nothing to do.
    Ok,
    /// A run will work, but not as well, or not from everywhere.
    Warning,
    /// A run will not work.
    Failed,
}

impl Status {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "FAILED",
        }
    }
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Check {
    /// What was looked at, as `--json` and the report name it.
    pub(super) name: &'static str,
    /// How it ended.
    pub(super) status: Status,
    /// What was found, for people.
    pub(super) fact: String,
    /// The command or edit that mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) hint: Option<String>,
    /// What was found, for programs.
    #[serde(flatten)]
    pub(super) fields: Map<String, Value>,
}

impl Check {
    /// A check that is well.
    pub(super) fn ok(name: &'static str, fact: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, fact: fact.into(), hint: None, fields: Map::new() }
    }

    /// A check that is not as it should be, with what mends it.
    pub(super) fn warning(name: &'static str, fact: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Warning, hint: Some(hint.into()), ..Self::ok(name, fact) }
    }

    /// A check that failed, with what mends it.
    pub(super) fn failed(name: &'static str, fact: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status: Status::Failed, hint: Some(hint.into()), ..Self::ok(name, fact) }
    }

    /// A check that failed with an error.
    pub(super) fn of_failure(name: &'static str, failure: impl Into<Failure>) -> Self {
        let Failure { message, hint } = failure.into();
        Self::failed(name, message, hint)
    }

    /// The same check with a fact for programs. Its name is none of the check's own fields.
    pub(super) fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.fields.insert(field.to_owned(), value.into());
        self
    }

    /// Two lines at most: the fact, and the hint under it.
    pub(super) fn render(&self) -> String {
        let line = format!("{:<8} {:<16} {}", self.status.word(), self.name, self.fact);
        match &self.hint {
            Some(hint) => format!("{line}\n{:25} hint: {hint}", ""),
            None => line,
        }
    }
}

/// Bits a second with a decimal unit: `940 Mbit/s`.
pub(super) fn bit_rate(bits_per_second: f64) -> String {
    match bits_per_second {
        ..1e6 => format!("{:.0} kbit/s", bits_per_second / 1e3),
        ..1e9 => format!("{:.0} Mbit/s", bits_per_second / 1e6),
        _ => format!("{:.1} Gbit/s", bits_per_second / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_a_line_with_its_hint_under_it_and_an_object() {
        let check = Check::warning("disk", "1.0 GB free", "make room: `df -h .`").with("free_bytes", 1_000_000_000u64);
        assert_eq!(
            check.render(),
            "warning  disk             1.0 GB free\n                          hint: make room: `df -h .`"
        );
        let object = serde_json::to_value(&check).unwrap();
        let expected = serde_json::json!({
            "name": "disk", "status": "warning", "fact": "1.0 GB free", "hint": "make room: `df -h .`",
            "free_bytes": 1_000_000_000u64,
        });
        assert_eq!(object, expected);
        assert_eq!([5e4, 9.4e8, 2.5e10].map(bit_rate), ["50 kbit/s", "940 Mbit/s", "25.0 Gbit/s"]);
        assert!(Check::ok("clock", "runs").render().lines().count() == 1);
    }
}
