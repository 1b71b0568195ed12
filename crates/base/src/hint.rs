//! How an error tells its reader what to do next.

/// An error that knows the command or the change that mends it.
///
/// `Display` says what happened and why; [`Hint::hint`] says what to do, without the word `hint:`,
/// which the binary adds when it prints.
pub trait Hint: std::error::Error {
    /// The literal command or edit that mends this error, where there is one.
    fn hint(&self) -> Option<String>;
}
