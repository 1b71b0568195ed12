//! What `transformers` makes of a configuration: the parameters of a model that has no checkpoint yet, and their
//! initial values.

use crate::engine::read_whole;
use crate::options::TorchOptions;
use crate::places::Places;
use crate::process::TorchProcess;
use crate::protocol::{Initialised, Request, Train, count_elements};
use base::config::TrainSection;
use base::{NamedTensors, ParameterSchema};
use engine::EngineError;
use serde_json::Value;

/// A model that was built, read and let go.
#[derive(Debug, Clone, PartialEq)]
pub struct DescribedModel {
    /// Names and shapes in the order of `named_parameters`; tied tensors once.
    pub schema: ParameterSchema,
    /// Weights as the model's own initialisation draws them.
    pub initial: NamedTensors,
}

/// Builds the causal language model that `config` (the object of a `config.json`) describes, with its weights drawn
/// from `seed`, and reads it: what the first checkpoint of a run is made of.
///
/// # Errors
/// As [`TorchProcess::start`]; [`EngineError::Shape`] where `config` describes no such model.
pub fn describe_model(config: &Value, seed: u64, options: &TorchOptions) -> Result<DescribedModel, EngineError> {
    TorchProcess::start(options)?.describe(config, seed)
}

impl TorchProcess {
    /// As [`describe_model`], in a process that runs already.
    ///
    /// # Errors
    /// As [`describe_model`].
    pub fn describe(&mut self, config: &Value, seed: u64) -> Result<DescribedModel, EngineError> {
        let train = Train::from(&TrainSection::default());
        let built: Initialised = self.ask_in_time(&Request::Init { model: config, train, seed: Some(seed) })?;
        count_elements(&built.parameters).map_err(|reason| self.distrust(reason))?;
        let schema = ParameterSchema::new(built.parameters.iter().cloned());
        let places = Places::new(&schema, &built.parameters)?;
        let values = read_whole(self, &schema, &places)?;
        Ok(DescribedModel { initial: schema.unflatten(&values), schema })
    }
}
