//! The answers of the Python process as `crates/fuzz-bodies` gives them: the shipped parser without its process.

use crate::protocol::{Answer, Computed, Done, Hello, Initialised, Loss, Saved, Step, count_elements};
use crate::tail::printable;
use engine::EngineError;
use serde::Deserialize;

/// Reads a frame as the answer to every request; the errors that it is taken for, as people see them.
pub fn errors_in_answer(frame: &[u8]) -> Vec<String> {
    let mut errors = Vec::new();
    as_answer::<Hello>(frame, &mut errors);
    as_answer::<Done>(frame, &mut errors);
    as_answer::<Step>(frame, &mut errors);
    as_answer::<Loss>(frame, &mut errors);
    as_answer::<Saved>(frame, &mut errors);
    as_answer::<Computed>(frame, &mut errors);
    if let Some(initialised) = as_answer::<Initialised>(frame, &mut errors) {
        errors.extend(count_elements(&initialised.parameters).err());
    }
    errors
}

fn as_answer<T: for<'de> Deserialize<'de>>(frame: &[u8], errors: &mut Vec<String>) -> Option<T> {
    match Answer::<T>::parse(frame, "torch") {
        Answer::Fine(answer) => return Some(answer),
        Answer::Refused(error) => {
            if let EngineError::NotFinite { value, .. } = error {
                assert!(!value.is_finite(), "an engine's number is called not finite, and is {value}");
            }
            errors.push(error.to_string());
        }
        Answer::Broken(reason) => errors.push(reason),
    }
    None
}

/// A line of its stderr as it is quoted.
pub fn quoted(text: &str, characters_max: usize) -> String {
    printable(text, characters_max)
}
