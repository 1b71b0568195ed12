//! Pure crates do not reach for the world in their sources either.
//!
//! [`crate::arrows`] keeps impure libraries out of floors 0 and 1; this keeps the standard library's doors shut.
//! Test code is free: what matters is what ships.

use crate::finding::Finding;
use crate::tokens::{Position, walk};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// Modules of `std` that read or change something which is not an argument.
const IMPURE_MODULES: &[&str] = &["env", "fs", "io", "net", "os", "process", "thread", "time"];

/// Macros that write to the process's streams.
const IMPURE_MACROS: &[&str] = &["print", "println", "eprint", "eprintln", "dbg"];

const REASON: &str = "decisions take time, randomness and membership as arguments, so that the simulator drives the \
                      shipped code and every site computes the same bits";

/// Everything impure in the shipped part of one source file of a pure crate.
pub(crate) fn check(place: &str, tokens: TokenStream) -> Vec<Finding> {
    let mut findings = Vec::new();
    walk(tokens, false, &mut |position| {
        if !position.in_test {
            findings.extend(impure_names(position).into_iter().map(|name| {
                let message = format!("{name} in a pure crate: {}", instead_of(&name));
                Finding::at(place, position.line(), message, REASON)
            }));
        }
    });
    findings
}

fn instead_of(name: &str) -> &'static str {
    match name {
        "std::time" => "take the time as an argument (a length of time is core::time::Duration)",
        _ => "do it in a crate of floor 2 or above and pass the result in",
    }
}

fn impure_names(position: Position<'_>) -> Vec<String> {
    let Some(ident) = position.ident(0) else { return Vec::new() };
    if position.is_punct(1, '!') && IMPURE_MACROS.iter().any(|name| ident == name) {
        return vec![format!("{ident}!")];
    }
    if ident != "std" || !position.is_punct(1, ':') || !position.is_punct(2, ':') {
        return Vec::new();
    }
    let imported = match (position.ident(3), position.group(3, Delimiter::Brace)) {
        (Some(module), _) => vec![module.to_string()],
        (None, Some(group)) => imported_modules(group),
        (None, None) => Vec::new(),
    };
    imported
        .into_iter()
        .filter(|module| IMPURE_MODULES.contains(&module.as_str()))
        .map(|module| format!("std::{module}"))
        .collect()
}

/// First names of the comma-separated paths of `use std::{...}`.
fn imported_modules(group: &Group) -> Vec<String> {
    let mut modules = Vec::new();
    let mut begins_path = true;
    for token in group.stream() {
        match token {
            TokenTree::Ident(ident) if begins_path => {
                modules.push(ident.to_string());
                begins_path = false;
            }
            TokenTree::Punct(punct) if punct.as_char() == ',' => begins_path = true,
            _ => begins_path = false,
        }
    }
    modules
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(text: &str) -> Vec<String> {
        check("crates/rounds/src/lib.rs", text.parse().unwrap())
            .into_iter()
            .map(|finding| format!("{}: {}", finding.line.unwrap(), finding.message))
            .collect()
    }

    #[test]
    fn a_clock_a_file_and_a_stream_are_found_where_they_stand() {
        let text = "use std::time::Instant;\nfn f() {\n    ::std::fs::read(\"x\");\n    println!(\"x\");\n}";
        let found = messages(text);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with("1: std::time in a pure crate: take the time as an argument"));
        assert!(found[1].starts_with("3: std::fs "));
        assert!(found[2].starts_with("4: println! "));
    }

    #[test]
    fn grouped_imports_are_seen_through() {
        let found = messages("use std::{collections::BTreeMap, env, fmt::{self, io}, thread::spawn};");
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("std::env") && found[1].contains("std::thread"));
    }

    #[test]
    fn words_tests_and_pure_modules_pass() {
        let text = "//! Never std::time.\nuse std::{collections::BTreeMap, fmt};\nconst A: &str = \"std::fs\";\n\
                    fn f(d: core::time::Duration) {}\n#[cfg(test)] mod tests { use std::fs; }";
        assert_eq!(messages(text), Vec::<String>::new());
    }
}
