//! What a check has to say about one place, and why the rule behind it exists.

use std::fmt;

/// One broken rule at one place. `Display` is one line that an editor can jump to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// File relative to the workspace root, or a crate's name.
    pub(crate) place: String,
    /// First line is 1; `None` where the whole file or crate is meant.
    pub(crate) line: Option<usize>,
    /// What is wrong and what to do instead.
    pub(crate) message: String,
    /// Why the rule exists.
    pub(crate) reason: &'static str,
}

impl Finding {
    /// A finding about a whole file or crate.
    pub(crate) fn whole(place: &str, message: impl Into<String>, reason: &'static str) -> Self {
        Self { place: place.to_owned(), line: None, message: message.into(), reason }
    }

    /// A finding at one line of a file.
    pub(crate) fn at(place: &str, line: usize, message: impl Into<String>, reason: &'static str) -> Self {
        Self { place: place.to_owned(), line: Some(line), message: message.into(), reason }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}\n    why: {}", self.place, self.message, self.reason),
            None => write!(f, "{}: {}\n    why: {}", self.place, self.message, self.reason),
        }
    }
}
