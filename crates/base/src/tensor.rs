//! Named f32 tensors on the host: what engines save and checkpoints hold.

use crate::schema::ParameterSchema;
use std::collections::BTreeMap;

/// One f32 tensor on the host.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostTensor {
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Its elements.
    pub values: Vec<f32>,
}

/// Tensors by their Hugging Face names.
pub type NamedTensors = BTreeMap<String, HostTensor>;

/// A tensor that is missing, of another shape, or not the model's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tensor '{name}': {reason}")]
pub struct TensorMismatch {
    /// The tensor's name.
    pub name: String,
    /// Expected and found.
    pub reason: String,
}

impl ParameterSchema {
    /// Cuts a flat vector (canonical order) into named tensors. `flat` must be as long as the schema.
    pub fn unflatten(&self, flat: &[f32]) -> NamedTensors {
        assert_eq!(flat.len(), self.elements(), "a flat vector of this schema");
        let tensor = |range: std::ops::Range<usize>, shape: &Vec<usize>| HostTensor {
            shape: shape.clone(),
            values: flat[range].to_vec(),
        };
        self.parameters().iter().map(|p| (p.name.clone(), tensor(p.range.clone(), &p.shape))).collect()
    }

    /// Lays named tensors out as one flat vector in canonical order.
    ///
    /// # Errors
    /// A tensor that is missing, has another shape, or is not in the schema.
    pub fn flatten(&self, tensors: &NamedTensors) -> Result<Vec<f32>, TensorMismatch> {
        let mismatch = |name: &str, reason: String| TensorMismatch { name: name.to_owned(), reason };
        let mut flat = vec![0.0; self.elements()];
        for parameter in self.parameters() {
            let Some(tensor) = tensors.get(&parameter.name) else {
                return Err(mismatch(&parameter.name, "is missing".to_owned()));
            };
            if tensor.shape != parameter.shape || tensor.values.len() != parameter.range.len() {
                let reason = format!("shape {:?} where the model has {:?}", tensor.shape, parameter.shape);
                return Err(mismatch(&parameter.name, reason));
            }
            flat[parameter.range.clone()].copy_from_slice(&tensor.values);
        }
        match tensors.keys().find(|name| self.find(name).is_none()) {
            Some(name) => Err(mismatch(name, "is not a parameter of this model".to_owned())),
            None => Ok(flat),
        }
    }
}
