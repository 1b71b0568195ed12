//! Two orders of the same parameters: ours, canonical, which checkpoints and fragments go by, and that of Python's
//! `named_parameters`.

use base::{Fragment, ParameterSchema};
use engine::EngineError;
use std::collections::BTreeMap;
use std::ops::Range;

/// Where each of our parameters starts in Python's flat vector.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    /// Canonical ranges, ascending and without gaps, and their starts on the other side.
    parameters: Vec<(Range<usize>, usize)>,
}

/// A piece of a fragment that lies in one stretch on both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Elements of Python's flat vector.
    pub(crate) theirs: Range<usize>,
    /// Elements of the fragment's values.
    pub(crate) values: Range<usize>,
}

impl Places {
    /// Matches what Python built with the schema: every name once, with the same shape, and no other.
    pub(crate) fn new(schema: &ParameterSchema, found: &[(String, Vec<usize>)]) -> Result<Self, EngineError> {
        let mismatch = |what: &str, reason: String| EngineError::Shape { what: what.to_owned(), reason };
        let mut starts = BTreeMap::new();
        let mut end = 0;
        for (name, shape) in found {
            let expected = schema.find(name).ok_or_else(|| mismatch(name, not_in_schema(shape)))?;
            if expected.shape != *shape {
                let reason = format!("PyTorch's model has shape {shape:?}, the checkpoint {:?}", expected.shape);
                return Err(mismatch(name, reason));
            }
            if starts.insert(name.as_str(), end).is_some() {
                return Err(mismatch(name, "PyTorch's model has it twice".to_owned()));
            }
            // Shapes are the schema's from here on: the sum is at most its length.
            end += expected.range.len();
        }
        let place = |parameter: &base::ParameterSpec| match starts.get(parameter.name.as_str()) {
            Some(start) => Ok((parameter.range.clone(), *start)),
            None => Err(mismatch(&parameter.name, "is not in PyTorch's model".to_owned())),
        };
        Ok(Self { parameters: schema.parameters().iter().map(place).collect::<Result<_, _>>()? })
    }

    /// Pieces of `fragment`, in the order of its values. The fragment must lie within the schema.
    pub(crate) fn pieces(&self, fragment: &Fragment) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::new();
        let mut position = 0;
        for range in &fragment.ranges {
            let first = self.parameters.partition_point(|(ours, _)| ours.end <= range.start);
            for (ours, start) in &self.parameters[first..] {
                let overlap = ours.start.max(range.start)..ours.end.min(range.end);
                if overlap.is_empty() {
                    break;
                }
                let theirs = start + overlap.start - ours.start;
                push(&mut pieces, theirs..theirs + overlap.len(), position);
                position += overlap.len();
            }
        }
        pieces
    }
}

/// Adds a piece, to the last one where it continues it.
fn push(pieces: &mut Vec<Piece>, theirs: Range<usize>, position: usize) {
    let values = position..position + theirs.len();
    match pieces.last_mut() {
        Some(last) if last.theirs.end == theirs.start => {
            last.theirs.end = theirs.end;
            last.values.end = values.end;
        }
        _ => pieces.push(Piece { theirs, values }),
    }
}

fn not_in_schema(shape: &[usize]) -> String {
    format!("PyTorch's model has it with shape {shape:?}, the checkpoint does not")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
        names.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect()
    }

    fn schema() -> ParameterSchema {
        ParameterSchema::new(named(&[("a", &[2, 3]), ("b", &[4]), ("c", &[5])]))
    }

    #[test]
    fn equal_orders_make_one_piece_of_a_range() {
        let places = Places::new(&schema(), &named(&[("a", &[2, 3]), ("b", &[4]), ("c", &[5])])).unwrap();
        assert_eq!(places.pieces(&schema().whole()), [Piece { theirs: 0..15, values: 0..15 }]);
        let fragment = Fragment { index: 0, ranges: vec![1..3, 5..11, 15..15] };
        let expected = [Piece { theirs: 1..3, values: 0..2 }, Piece { theirs: 5..11, values: 2..8 }];
        assert_eq!(places.pieces(&fragment), expected);
    }

    #[test]
    fn other_orders_are_cut_at_the_borders_of_parameters() {
        // On the other side: c at 0, a at 5, b at 11.
        let places = Places::new(&schema(), &named(&[("c", &[5]), ("a", &[2, 3]), ("b", &[4])])).unwrap();
        let fragment = Fragment { index: 0, ranges: std::iter::once(5..12).collect() };
        // Ours 5 is a's last element, 10 there, which b (6..10, there 11..15) continues; then c begins.
        let expected = [Piece { theirs: 10..15, values: 0..5 }, Piece { theirs: 0..2, values: 5..7 }];
        assert_eq!(places.pieces(&fragment), expected);
    }

    #[test]
    fn another_model_is_named() {
        let refused = |found: &[(&str, &[usize])]| match Places::new(&schema(), &named(found)) {
            Err(EngineError::Shape { what, reason }) => format!("{what} {reason}"),
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&[("a", &[2, 3]), ("c", &[5])]), "b is not in PyTorch's model");
        assert!(refused(&[("a", &[3, 2])]).starts_with("a PyTorch's model has shape [3, 2], the checkpoint [2, 3]"));
        assert!(refused(&[("d", &[usize::MAX, usize::MAX])]).starts_with("d "));
        assert_eq!(refused(&[("b", &[4]), ("b", &[4])]), "b PyTorch's model has it twice");
    }
}
