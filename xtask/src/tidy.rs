//! House rules that no compiler knows. Each finding carries the reason of its rule.
//!
//! A rule here is one that review would otherwise have to repeat. Rust code is read as tokens, so that a word in
//! a comment or a string does not count; rules about words read every text file.

use crate::finding::Finding;
use crate::tokens::{Position, mentions, walk};
use proc_macro2::{Delimiter, TokenStream};
use std::path::{Component, Path, PathBuf};

/// Longest Rust source file, lines: about an hour of reading.
const RUST_LINES_MAX: usize = 1_000;

/// A comment that excuses one line, followed by why.
const EXCUSE: &str = "tidy: ";

/// Where homes lie on Linux and macOS. Written in halves so that this file passes its own rule.
const HOMES: &[&str] = &[concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/")];

/// Marks of unfinished work, in halves as above.
const UNFINISHED: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX")];

const REASON_LENGTH: &str = "a reader holds one file in mind at a time: split it by who needs which part";
const REASON_OPENING: &str = "a file opens with why it exists, its mathematics, and what it is not";
const REASON_IGNORED: &str = "no claim rests on a test that does not run: mend it or remove it";
const REASON_SLEEP: &str = "a test that sleeps is slow on a fast machine and flaky on a slow one: wait for the event";
const REASON_PATH: &str = "the path exists on one machine only, and tells its user's name";
const REASON_UNFINISHED: &str = "unfinished work is an issue, where somebody will see it";
const REASON_LINK: &str = "a newcomer follows the links of the documents first";
const REASON_LINTS: &str = "every crate is held to the same lints";

/// Checks one text file of the repository. `exists` tells whether a path relative to the root does.
pub(crate) fn check(
    path: &str,
    text: &str,
    tokens: Option<&TokenStream>,
    exists: &dyn Fn(&Path) -> bool,
) -> Vec<Finding> {
    let mut findings = words(path, text);
    if let Some(tokens) = tokens {
        findings.extend(rust_shape(path, text));
        findings.extend(rust_tests(path, text, tokens.clone()));
    }
    if path.ends_with(".md") {
        findings.extend(dead_links(path, text, exists));
    }
    if path.ends_with("/Cargo.toml") {
        findings.extend(lints_not_taken(path, text));
    }
    findings
}

fn words(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (line, content) in numbered(text) {
        if let Some(home) = HOMES.iter().find(|home| names_a_home(content, home)) {
            let message = format!("a path under {home}: make it relative, or take it as an argument");
            findings.push(Finding::at(path, line, message, REASON_PATH));
        }
        if let Some(mark) = UNFINISHED.iter().find(|mark| has_word(content, mark)) {
            findings.push(Finding::at(path, line, format!("{mark}: do it or file it"), REASON_UNFINISHED));
        }
    }
    findings
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(index, line)| (index + 1, line))
}

/// `home` as the start of an absolute path, not in the middle of a relative one or of an address.
fn names_a_home(line: &str, home: &str) -> bool {
    line.match_indices(home).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + home.len()..].chars().next();
        !before.is_some_and(|c| c.is_alphanumeric() || "-_.}~".contains(c)) && after.is_some_and(char::is_alphanumeric)
    })
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.into_iter().chain(after).any(|c| c.is_alphanumeric() || c == '_')
    })
}

fn rust_shape(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let lines = text.lines().count();
    if lines > RUST_LINES_MAX {
        let message = format!("{lines} lines, and {RUST_LINES_MAX} are allowed");
        findings.push(Finding::whole(path, message, REASON_LENGTH));
    }
    if !text.starts_with("//!") {
        findings.push(Finding::at(path, 1, "the file does not open with a `//!` comment", REASON_OPENING));
    }
    findings
}

fn rust_tests(path: &str, text: &str, tokens: TokenStream) -> Vec<Finding> {
    let lines: Vec<&str> = text.lines().collect();
    let all_tests = path.contains("/tests/") || is_test_module(path);
    let mut findings = Vec::new();
    walk(tokens, all_tests, &mut |position| {
        let line = position.line();
        if is_ignore(position) {
            findings.push(Finding::at(path, line, "an ignored test", REASON_IGNORED));
        }
        if position.in_test && is_sleep(position) && !is_excused(&lines, line) {
            let message = format!("a test sleeps: wait for what it waits for, or say why with `// {EXCUSE}...`");
            findings.push(Finding::at(path, line, message, REASON_SLEEP));
        }
    });
    findings
}

/// A source file that holds only test code, by its name: `tests.rs` or `ledger_tests.rs`.
pub(crate) fn is_test_module(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.ends_with("_tests.rs")
}

fn is_ignore(position: Position<'_>) -> bool {
    position.attribute().is_some_and(|attribute| {
        let first = attribute.stream().into_iter().next().map(|token| token.to_string());
        match first.as_deref() {
            Some("ignore") => true,
            Some("cfg_attr") => mentions(attribute.stream(), "ignore"),
            _ => false,
        }
    })
}

/// A call of something named `sleep`, not its definition.
fn is_sleep(position: Position<'_>) -> bool {
    position.ident(0).is_some_and(|ident| ident == "sleep") && position.group(1, Delimiter::Parenthesis).is_some()
}

/// The excuse stands on the line itself or on the one above.
fn is_excused(lines: &[&str], line: usize) -> bool {
    lines[line.saturating_sub(2)..line]
        .iter()
        .any(|content| content.split_once("//").is_some_and(|(_, comment)| comment.contains(EXCUSE)))
}

fn lints_not_taken(path: &str, text: &str) -> Option<Finding> {
    let mut lines = text.lines().map(str::trim).skip_while(|line| *line != "[lints]").skip(1);
    let taken = lines.next() == Some("workspace = true");
    let message = "the crate does not take the workspace's lints: add `[lints]` with `workspace = true`";
    (!taken).then(|| Finding::whole(path, message, REASON_LINTS))
}

fn dead_links(path: &str, text: &str, exists: &dyn Fn(&Path) -> bool) -> Vec<Finding> {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    let mut findings = Vec::new();
    for (line, content) in prose(text) {
        for target in link_targets(&content).into_iter().filter(|target| is_local(target)) {
            let file = target.split(['#', '?']).next().unwrap_or_default();
            let resolved = resolve(folder, file);
            if !resolved.as_deref().is_some_and(exists) {
                let message = format!("the link to {target} leads nowhere");
                findings.push(Finding::at(path, line, message, REASON_LINK));
            }
        }
    }
    findings
}

/// Lines of a Markdown text outside fenced blocks, with code spans taken out.
fn prose(text: &str) -> Vec<(usize, String)> {
    let mut fenced = false;
    let mut lines = Vec::new();
    for (line, content) in numbered(text) {
        if content.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            lines.push((line, content.split('`').step_by(2).collect()));
        }
    }
    lines
}

/// Targets of `[words](target)` and `![words](target)`.
fn link_targets(line: &str) -> Vec<&str> {
    line.match_indices("](")
        .filter_map(|(at, opening)| line[at + opening.len()..].split_once(')'))
        .map(|(target, _)| target.split_whitespace().next().unwrap_or_default())
        .collect()
}

fn is_local(target: &str) -> bool {
    !target.starts_with('#') && !target.contains("://") && !target.starts_with("mailto:")
}

/// `file` as seen from `folder`, without `.` and `..`; `None` where it leaves the repository.
fn resolve(folder: &Path, file: &str) -> Option<PathBuf> {
    let mut resolved = PathBuf::new();
    for component in folder.join(file).components() {
        match component {
            Component::Normal(name) => resolved.push(name),
            Component::CurDir => {}
            Component::ParentDir if resolved.pop() => {}
            _ => return None,
        }
    }
    Some(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINE: &str = "//! Why.\nfn main() {}\n";

    fn reasons(path: &str, text: &str) -> Vec<(Option<usize>, &'static str)> {
        let tokens = path.ends_with(".rs").then(|| text.parse().unwrap());
        let exists = |path: &Path| path == Path::new("docs/wire.md") || path == Path::new("README.md");
        check(path, text, tokens.as_ref(), &exists).into_iter().map(|f| (f.line, f.reason)).collect()
    }

    #[test]
    fn a_plain_file_passes() {
        assert_eq!(reasons("crates/base/src/lib.rs", FINE), []);
    }

    #[test]
    fn a_long_file_and_a_silent_one_are_found() {
        let long = FINE.to_owned() + &"// more\n".repeat(RUST_LINES_MAX - 1);
        assert_eq!(reasons("crates/base/src/lib.rs", &long), [(None, REASON_LENGTH)]);
        assert_eq!(reasons("crates/base/src/lib.rs", "fn main() {}"), [(Some(1), REASON_OPENING)]);
    }

    #[test]
    fn an_ignored_test_is_found_in_each_spelling() {
        for attribute in ["#[ignore]", "#[ignore = \"slow\"]", "#[cfg_attr(unix, ignore)]"] {
            let text = format!("//! Why.\n#[test]\n{attribute}\nfn a() {{}}\n");
            assert_eq!(reasons("crates/base/src/lib.rs", &text), [(Some(3), REASON_IGNORED)], "{attribute}");
        }
        let word = "//! Why.\n// #[ignore]\nconst A: &str = \"#[ignore]\";\n";
        assert_eq!(reasons("crates/base/src/lib.rs", word), []);
    }

    #[test]
    fn a_sleeping_test_is_found_unless_it_says_why() {
        let sleeping = "//! Why.\n#[test]\nfn a() {\n    std::thread::sleep(b);\n}\n";
        assert_eq!(reasons("crates/wire/src/lib.rs", sleeping), [(Some(4), REASON_SLEEP)]);
        let excused = sleeping.replace("sleep(b);", "sleep(b); // tidy: the peer's silence is the subject");
        assert_eq!(reasons("crates/wire/src/lib.rs", &excused), []);
        let shipped = "//! Why.\nfn retry() {\n    sleep(b);\n}\n";
        assert_eq!(reasons("crates/wire/src/lib.rs", shipped), []);
        for path in ["crates/wire/tests/peers.rs", "crates/wire/src/tests.rs", "crates/wire/src/frame_tests.rs"] {
            assert_eq!(reasons(path, shipped), [(Some(3), REASON_SLEEP)], "{path}");
        }
    }

    #[test]
    fn a_path_of_one_machine_is_found_in_any_text_file() {
        for home in HOMES {
            let text = format!("fine\nsee {home}ada/texts\n");
            assert_eq!(reasons("docs/guide.md", &text), [(Some(2), REASON_PATH)], "{home}");
        }
        let relative = format!("https://example.org{}a and build{}b", HOMES[0], HOMES[1]);
        assert_eq!(reasons("run.toml", &relative), []);
    }

    #[test]
    fn unfinished_work_is_found_as_a_word() {
        for mark in UNFINISHED {
            assert_eq!(reasons("a.py", &format!("# {mark}: later")), [(Some(1), REASON_UNFINISHED)]);
            assert_eq!(reasons("a.py", &format!("{mark}S_{mark}")), []);
        }
    }

    #[test]
    fn a_dead_link_is_found_and_a_good_one_is_not() {
        let text = "[a](wire.md#frames) [b](../README.md) [c](https://example.org) [d](#here)\n`[e](no.md)`\n\
                    ```\n[f](no.md)\n```\n[g](missing.md)\n![h](../../out.png)\n";
        assert_eq!(reasons("docs/guide.md", text), [(Some(6), REASON_LINK), (Some(7), REASON_LINK)]);
    }

    #[test]
    fn a_crate_that_skips_the_lints_is_found() {
        assert_eq!(reasons("crates/wire/Cargo.toml", "[package]\n[lints]\n"), [(None, REASON_LINTS)]);
        assert_eq!(reasons("crates/wire/Cargo.toml", "[package]\n\n[lints]\nworkspace = true\n"), []);
    }
}
