//! Checkpoints and the folders of Hugging Face: safetensors, bounded JSON, and nothing else.

use crate::memory::Bound;
use crate::place::Place;
use base::{ContentHash, HostTensor, NamedTensors, ParameterSchema};
use checkpoint::tensors::{decode_tensors, encode_tensors};
use checkpoint::{huggingface, store};
use std::sync::LazyLock;

/// A tensor's entry in a header takes 50 bytes, and in the maps some hundred; numbers are read through a buffer of 1 MiB.
const HEADERS: Bound = Bound { base_bytes: 4 << 20, per_byte: 64 };

/// A safetensors file: what is read is the same when it is written and read again.
pub fn tensors(bytes: &[u8]) {
    let Ok(tensors) = HEADERS.check(bytes.len(), || decode_tensors(bytes)) else { return };
    let written = encode_tensors(&tensors).expect("what was read can be written");
    let again = decode_tensors(&written).expect("what was written can be read");
    assert_eq!(encode_tensors(&again).expect("it was written before"), written);
}

/// The manifest of a checkpoint, sealed with its own hash as an enemy would: no file outside the folder is looked for, and what it
/// names must be what it says.
pub fn checkpoint_manifest(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = {
            let place = Place::new();
            place.write("state.json", STATE);
            place.write("model.safetensors", &MODEL);
            place
        };
    }
    PLACE.with(|place| {
        place.write("manifest.json", bytes);
        place.write("manifest.blake3", format!("{}\n", ContentHash::of(bytes)).as_bytes());
        let loaded = HEADERS.check(bytes.len(), || store::load::<serde_json::Value>(place.path()));
        if let Ok(loaded) = loaded {
            assert_eq!(loaded.state, serde_json::json!({ "step": 3 }));
            assert!(loaded.tensors.iter().all(|(stem, tensors)| stem == "model" && *tensors == example()));
        }
    });
}

/// The state in [`checkpoint_manifest`]'s checkpoint.
pub(crate) const STATE: &[u8] = br#"{"step":3}"#;

/// Its tensors.
pub(crate) static MODEL: LazyLock<Vec<u8>> =
    LazyLock::new(|| encode_tensors(&example()).expect("shapes fit their values"));

fn example() -> NamedTensors {
    let tensor = HostTensor { shape: vec![2, 3], values: vec![0.5, -1.0, 2.0, 3.5, 0.0, 9.0] };
    NamedTensors::from([("weight".to_owned(), tensor)])
}

/// A model's `config.json`: what is accepted is a shape that can be computed.
pub fn hugging_face_config(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = Place::new();
    }
    PLACE.with(|place| {
        place.write("config.json", bytes);
        let shape = HEADERS.check(bytes.len(), || huggingface::import_shape(place.path()));
        if let Ok(shape) = shape {
            shape.validate().expect("an imported shape is one that can be computed");
        }
    });
}

/// The list of a model's shards.
pub fn hugging_face_index(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = {
            let place = Place::new();
            place.write("config.json", &CONFIG);
            place.write("model-1.safetensors", &WEIGHTS);
            place
        };
    }
    PLACE.with(|place| {
        place.write("model.safetensors.index.json", bytes);
        let imported = HEADERS.check(bytes.len(), || checkpoint::import(place.path()));
        assert!(imported.is_err() || imported.is_ok_and(|(_, tensors)| tensors == parameters()));
    });
}

/// A model's weights: what is accepted is every parameter of the model, and no other.
pub fn hugging_face_weights(bytes: &[u8]) {
    thread_local! {
        static PLACE: Place = {
            let place = Place::new();
            place.write("config.json", &CONFIG);
            place
        };
    }
    PLACE.with(|place| {
        place.write("model.safetensors", bytes);
        let imported = HEADERS.check(bytes.len(), || checkpoint::import(place.path()));
        if let Ok((shape, tensors)) = imported {
            ParameterSchema::llama(&shape).flatten(&tensors).expect("every parameter of the model is there");
        }
    });
}

/// The parameters of the example model.
fn parameters() -> NamedTensors {
    let schema = crate::codecs::schema();
    let values: Vec<f32> = (0..schema.elements()).map(|index| (index % 251) as f32 / 8.0 - 16.0).collect();
    schema.unflatten(&values)
}

/// An exported folder of the example model: its configuration and its weights.
static EXPORTED: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
    let place = Place::new();
    let folder = place.path().join("export");
    checkpoint::export(&folder, &crate::codecs::shape(), &parameters(), None, Some(0)).expect("it can be exported");
    let read = |name: &str| std::fs::read(folder.join(name)).expect("an export has this file");
    (read("config.json"), read("model.safetensors"))
});

/// Its `config.json`.
pub(crate) static CONFIG: LazyLock<Vec<u8>> = LazyLock::new(|| EXPORTED.0.clone());

/// Its weights.
pub(crate) static WEIGHTS: LazyLock<Vec<u8>> = LazyLock::new(|| EXPORTED.1.clone());
