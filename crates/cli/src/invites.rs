//! Invites as people give them: the word itself, or where it is. A word among the arguments can be read by everybody who may list the
//! machine's processes.

use crate::failure::Failure;
use std::fs::File;
use std::io::{self, Read};
use wire::Invite;
use wire::invite::INVITE_BYTES_MAX;

/// What stands before the name of a file.
const FILE_MARK: char = '@';

/// Standard input, in place of a word.
const STANDARD_INPUT: &str = "-";

/// The invite of an argument: a word, `@FILE` or `-` for standard input.
///
/// # Errors
/// It cannot be read, or is no invite.
pub(crate) fn invite_of(argument: &str) -> Result<Invite, Failure> {
    if argument == STANDARD_INPUT {
        return Ok(first_bytes(io::stdin().lock(), "standard input")?.trim().parse::<Invite>()?);
    }
    let Some(path) = argument.strip_prefix(FILE_MARK) else { return Ok(argument.parse::<Invite>()?) };
    let file = File::open(path).map_err(|error| unreadable(path, &error))?;
    Ok(first_bytes(file, path)?.trim().parse::<Invite>()?)
}

/// As many as an invite can have, and some white space.
fn first_bytes(from: impl Read, name: &str) -> Result<String, Failure> {
    let mut text = String::new();
    from.take(2 * INVITE_BYTES_MAX as u64).read_to_string(&mut text).map_err(|error| unreadable(name, &error))?;
    Ok(text)
}

fn unreadable(name: &str, error: &io::Error) -> Failure {
    Failure::new(
        format!("{name}: {error}"),
        "give the invite itself, @FILE with a file that holds it, or - and pipe it in",
    )
}
