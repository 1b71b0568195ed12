//! What the Python engine's process says.

use crate::memory::Bound;

/// JSON of a few bytes becomes strings and lists of 24 bytes each; a frame is read twice.
const ANSWER: Bound = Bound { base_bytes: 256 << 10, per_byte: 64 };

/// Characters of a quoted line.
const QUOTED_CHARACTERS: usize = 300;

/// A frame as the answer to any request: never a panic, never an error without words.
pub fn torch_answers(bytes: &[u8]) {
    let errors = ANSWER.check(bytes.len(), || engine_torch::fuzzing::errors_in_answer(bytes));
    assert!(errors.iter().all(|error| !error.is_empty()));
    let quoted = engine_torch::fuzzing::quoted(&String::from_utf8_lossy(bytes), QUOTED_CHARACTERS);
    assert!(quoted.chars().count() <= QUOTED_CHARACTERS && !quoted.contains(char::is_control));
}
