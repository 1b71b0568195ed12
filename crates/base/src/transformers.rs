//! `[transformers]` in a `run.toml`: a model other than Llama, which `transformers` builds from its own configuration.
//!
//! Only the PyTorch engine computes such a model. Everything else (deltas, hashes, checkpoints, sizes known beforehand)
//! needs no more than the names and shapes of its tensors, so these stand in the file, as the checkpoint has them.

use crate::schema::ParameterSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Most elements of a model: those of the largest Llama that [`crate::ModelShape::validate`] lets through, 2^40.
const ELEMENTS_MAX: usize = 1 << 40;

/// `[transformers]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformersSection {
    /// Text of the model's `config.json`.
    pub config: String,
    /// Each tensor as `name rows x columns x ...`, in canonical order: `transformer.wte.weight 512 x 64`.
    pub parameters: Vec<String>,
}

impl TransformersSection {
    /// The section of a model with these tensors.
    pub fn new(config: String, schema: &ParameterSchema) -> Self {
        let line = |parameter: &crate::ParameterSpec| {
            let dimensions: Vec<String> = parameter.shape.iter().map(usize::to_string).collect();
            format!("{} {}", parameter.name, dimensions.join(" x "))
        };
        Self { config, parameters: schema.parameters().iter().map(line).collect() }
    }

    /// Names and shapes of the tensors.
    ///
    /// # Errors
    /// A line that is not of that form, a name given twice, or more than 2^40 elements.
    pub fn schema(&self) -> Result<ParameterSchema, String> {
        let mut names = BTreeSet::new();
        let mut elements = 0_usize;
        let mut tensors = Vec::with_capacity(self.parameters.len());
        for line in &self.parameters {
            let (name, shape) = parse(line).ok_or_else(|| format!("'{line}' is not 'name rows x columns'"))?;
            let tensor_elements = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
            elements = tensor_elements.and_then(|count| elements.checked_add(count)).unwrap_or(usize::MAX);
            if elements > ELEMENTS_MAX {
                return Err(format!("more than {ELEMENTS_MAX} elements at '{name}'"));
            }
            if !names.insert(name) {
                return Err(format!("'{name}' stands there twice"));
            }
            tensors.push((name.to_owned(), shape));
        }
        if tensors.is_empty() { Err("no tensor is named".to_owned()) } else { Ok(ParameterSchema::new(tensors)) }
    }
}

fn parse(line: &str) -> Option<(&str, Vec<usize>)> {
    let (name, dimensions) = line.split_once(' ')?;
    let sizes: Option<Vec<usize>> =
        dimensions.split(" x ").map(|size| size.parse().ok().filter(|size| *size > 0)).collect();
    Some((name, sizes?)).filter(|(name, _)| !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(lines: &[&str]) -> TransformersSection {
        TransformersSection {
            config: "{}".to_owned(),
            parameters: lines.iter().map(|line| (*line).to_owned()).collect(),
        }
    }

    #[test]
    fn schema_and_lines_are_one() {
        let lines = section(&["transformer.wte.weight 512 x 64", "transformer.ln_f.bias 64"]);
        let schema = lines.schema().unwrap();
        assert_eq!(schema.elements(), 512 * 64 + 64);
        assert_eq!(TransformersSection::new("{}".to_owned(), &schema), lines);
    }

    #[test]
    fn what_is_no_tensor_is_refused() {
        for lines in [
            &[][..],
            &["name"],
            &["name 2 x"],
            &["name 0 x 3"],
            &[" 3"],
            &["a 3", "a 3"],
            &["a 99999999999 x 99999999999"],
            &["a 1099511627776", "b 1"],
        ] {
            assert!(section(lines).schema().is_err(), "{lines:?}");
        }
    }
}
