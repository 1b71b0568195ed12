//! What a user sees when a command cannot do its work: what happened, why, and what mends it.

use base::Hint;
use serde::Serialize;

/// For the rare error that does not know what mends it.
const HINT_DEFAULT: &str = "`beringia --help` lists the commands and what they need";

/// A failed command. Every failure has a hint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Failure {
    /// What happened and why.
    #[serde(rename = "error")]
    pub(crate) message: String,
    /// The command or edit that mends it, without the word `hint:`.
    pub(crate) hint: String,
}

impl Failure {
    /// A failure that is known by the command itself.
    pub(crate) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }

    /// The same, with what it is about in front.
    pub(crate) fn about(self, what: &str) -> Self {
        Self { message: format!("{what}: {}", self.message), hint: self.hint }
    }
}

impl<E: Hint + 'static> From<E> for Failure {
    /// The error, and those of its causes that its text does not hold already.
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(source) = cause {
            let text = source.to_string();
            if !message.contains(&text) {
                message = format!("{message}: {text}");
            }
            cause = source.source();
        }
        Self { message, hint: error.hint().unwrap_or_else(|| HINT_DEFAULT.to_owned()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error;
    use std::fmt;

    #[derive(Debug)]
    struct Nested(&'static str, Option<Box<Nested>>);

    impl fmt::Display for Nested {
        fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str(self.0)
        }
    }

    impl Error for Nested {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|source| source as &(dyn Error + 'static))
        }
    }

    impl Hint for Nested {
        fn hint(&self) -> Option<String> {
            None
        }
    }

    #[test]
    fn causes_are_added_once_and_a_hint_is_always_there() {
        let cause = Nested("disk on fire", None);
        let repeated = Nested("writing x: disk on fire", Some(Box::new(cause)));
        let failure = Failure::from(Nested("saving", Some(Box::new(repeated))));
        assert_eq!(failure.message, "saving: writing x: disk on fire");
        assert_eq!(failure.hint, HINT_DEFAULT);
    }
}
