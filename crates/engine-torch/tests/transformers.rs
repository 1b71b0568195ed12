//! A model that this workspace does not know: `transformers` builds it from its configuration.

#![allow(clippy::unwrap_used)] // Helpers of tests may panic, as the tests do.

mod common;

use base::config::TrainSection;
use base::{Fragment, NamedTensors, ParameterSchema, TokenBatch};
use common::{Pool, has_module, options};
use engine::{Engine, EngineError};
use engine_torch::{DescribedModel, ModelDescription, TorchEngine};
use serde_json::{Value, json};

fn config() -> Value {
    json!({
        "model_type": "gpt2", "vocab_size": 29, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    })
}

/// The same parameters in another order than Python's.
fn by_name(schema: &ParameterSchema) -> ParameterSchema {
    let mut named: Vec<_> = schema.parameters().iter().map(|p| (p.name.clone(), p.shape.clone())).collect();
    named.sort();
    ParameterSchema::new(named)
}

fn batch(seed: u32) -> TokenBatch {
    let tokens = (0..4 * 13).map(|index: u32| (index * index + seed) % 29).collect();
    TokenBatch { samples: 4, sequence_length: 12, tokens }
}

fn parameters(engine: &mut TorchEngine) -> NamedTensors {
    let whole = engine.schema().whole();
    let mut values = vec![0.0; whole.elements()];
    engine.read_fragment(&whole, &mut values).unwrap();
    engine.schema().unflatten(&values)
}

#[test]
fn a_gpt2_is_described_trained_and_saved_in_any_order_of_its_tensors() {
    if !has_module("transformers") {
        return;
    }
    let pool = Pool::new(options());
    let mut process = pool.process();
    let DescribedModel { schema, initial } = process.describe(&config(), 7).unwrap();
    assert_eq!(process.describe(&config(), 7).unwrap().initial, initial);
    let unknown = process.describe(&json!({ "model_type": "no_such_family" }), 7).unwrap_err();
    assert!(matches!(&unknown, EngineError::Shape { .. }), "{unknown:?}");
    pool.put_back(process);
    assert!(schema.find("transformer.h.1.attn.c_attn.weight").is_some());
    assert!(schema.find("lm_head.weight").is_none(), "tied tensors come once");
    assert!(initial["transformer.wte.weight"].values.iter().any(|value| *value != 0.0));

    let train = TrainSection::default();
    let model = |schema| ModelDescription::HuggingFace { config: config(), schema };
    let run = |schema: ParameterSchema| {
        let mut engine = pool.engine_of(&model(schema), &train, &initial);
        assert_eq!(parameters(&mut engine), initial);
        let losses: Vec<f64> = (0..8).map(|_| engine.inner_step(&batch(1), 1e-2).unwrap().loss_nats).collect();
        let mut gradient = vec![0.0; engine.schema().elements()];
        engine.gradient(&batch(2), &mut gradient).unwrap();
        (losses, engine.schema().unflatten(&gradient), engine.save().unwrap())
    };
    let (losses, gradient, state) = run(schema.clone());
    assert!(losses[7] < 0.8 * losses[0], "{losses:?}");
    assert_eq!(run(by_name(&schema)), (losses, gradient, state.clone()));

    // A state of one order, continued in the other; a fragment that crosses borders of tensors.
    let mut engine = pool.engine_of(&model(by_name(&schema)), &train, &initial);
    engine.restore(&state).unwrap();
    assert_eq!(engine.save().unwrap(), state);
    let elements = engine.schema().elements();
    let fragment = Fragment { index: 0, ranges: vec![10..900, 1_000..1_001, elements - 700..elements] };
    let values: Vec<f32> = (0..fragment.elements()).map(|index| index as f32).collect();
    engine.write_fragment(&fragment, &values).unwrap();
    let mut read = vec![0.0; values.len()];
    engine.read_fragment(&fragment, &mut read).unwrap();
    assert_eq!(read, values);
    let too_long = TokenBatch { samples: 1, sequence_length: 17, tokens: vec![0; 18] };
    assert!(matches!(engine.inner_step(&too_long, 1e-3), Err(EngineError::Shape { .. })));
    assert_eq!(engine.logits(&[1, 2, 3]).unwrap().len(), 3 * 29);

    // A checkpoint of another model.
    let other = ParameterSchema::new([("transformer.wte.weight".to_owned(), vec![29, 16])]);
    let zeros = other.unflatten(&vec![0.0; other.elements()]);
    let refused = pool.try_engine_of(&model(other), &train, &zeros).err().unwrap();
    assert!(matches!(&refused, EngineError::Shape { what, .. } if what == "transformer.wpe.weight"), "{refused:?}");
}
