//! Walks the tokens of a Rust file, so that a rule sees code and not the words in comments and strings.
//!
//! This is no parser: it knows brackets, attributes and which of them open test code, which is all that the
//! rules ask.

use proc_macro2::{Delimiter, Group, Ident, TokenStream, TokenTree};

/// One position in a file: the tokens from here to the end of the enclosing bracket.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Position<'a> {
    rest: &'a [TokenTree],
    /// Inside an item marked `#[test]`, `#[cfg(test)]` or alike.
    pub(crate) in_test: bool,
}

impl<'a> Position<'a> {
    /// The identifier `offset` tokens further.
    pub(crate) fn ident(&self, offset: usize) -> Option<&'a Ident> {
        match self.rest.get(offset) {
            Some(TokenTree::Ident(ident)) => Some(ident),
            _ => None,
        }
    }

    /// The bracket `offset` tokens further, where it is of this kind.
    pub(crate) fn group(&self, offset: usize, delimiter: Delimiter) -> Option<&'a Group> {
        match self.rest.get(offset) {
            Some(TokenTree::Group(group)) if group.delimiter() == delimiter => Some(group),
            _ => None,
        }
    }

    /// Whether the token `offset` further is this punctuation.
    pub(crate) fn is_punct(&self, offset: usize, character: char) -> bool {
        matches!(self.rest.get(offset), Some(TokenTree::Punct(punct)) if punct.as_char() == character)
    }

    /// The content of an outer attribute `#[...]` that begins here.
    pub(crate) fn attribute(&self) -> Option<&'a Group> {
        self.is_punct(0, '#').then(|| self.group(1, Delimiter::Bracket)).flatten()
    }

    /// Line of the token at this position, the first being 1.
    pub(crate) fn line(&self) -> usize {
        self.rest.first().map_or(1, |token| token.span().start().line)
    }
}

/// Calls `visit` at every token of `stream`, outermost first.
pub(crate) fn walk(stream: TokenStream, in_test: bool, visit: &mut dyn FnMut(Position<'_>)) {
    let tokens: Vec<TokenTree> = stream.into_iter().collect();
    let mut item_is_test = false;
    for index in 0..tokens.len() {
        let position = Position { rest: &tokens[index..], in_test: in_test || item_is_test };
        visit(position);
        if let Some(attribute) = position.attribute() {
            item_is_test |= marks_test(attribute);
        }
        match &tokens[index] {
            TokenTree::Group(group) => {
                walk(group.stream(), in_test || item_is_test, visit);
                // The body ends the item that the attribute stood before.
                item_is_test &= group.delimiter() != Delimiter::Brace;
            }
            TokenTree::Punct(punct) if punct.as_char() == ';' => item_is_test = false,
            _ => {}
        }
    }
}

/// Whether the identifier `name` occurs anywhere in `stream`.
pub(crate) fn mentions(stream: TokenStream, name: &str) -> bool {
    stream.into_iter().any(|token| match token {
        TokenTree::Ident(ident) => ident == name,
        TokenTree::Group(group) => mentions(group.stream(), name),
        _ => false,
    })
}

fn marks_test(attribute: &Group) -> bool {
    mentions(attribute.stream(), "test") && !mentions(attribute.stream(), "not")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idents_in_tests(text: &str) -> Vec<String> {
        let mut found = Vec::new();
        walk(text.parse().unwrap(), false, &mut |position| {
            if let (true, Some(ident)) = (position.in_test, position.ident(0)) {
                found.push(ident.to_string());
            }
        });
        found
    }

    #[test]
    fn test_code_ends_with_its_item() {
        let text = "fn a() {} #[cfg(test)] mod tests { fn b() { c } } fn d() {} #[test] fn e(f: G) { h } fn i() {}";
        assert_eq!(
            idents_in_tests(text),
            ["cfg", "test", "mod", "tests", "fn", "b", "c", "test", "fn", "e", "f", "G", "h"]
        );
    }

    #[test]
    fn code_without_tests_is_not_test_code() {
        let text = "#[cfg(not(test))] fn a() {} #[cfg(test)] mod tests; fn b() {}";
        assert_eq!(idents_in_tests(text), ["cfg", "test", "mod", "tests"]);
    }
}
