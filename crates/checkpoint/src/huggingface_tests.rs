//! Tests of `huggingface`: what is exported is imported, and everything unlike our model is refused by name.
//! That `transformers` itself loads an export is shown by the parity script, not here.

use super::*;
use base::HostTensor;
use base::random::Random;

fn shape(tie_word_embeddings: bool) -> ModelShape {
    ModelShape {
        vocab_size: 30,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 32,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings,
    }
}

fn weights(shape: &ModelShape) -> NamedTensors {
    let schema = ParameterSchema::llama(shape);
    let mut random = Random::new(3, 0);
    let flat: Vec<f32> = (0..schema.elements()).map(|_| random.next_normal()).collect();
    schema.unflatten(&flat)
}

fn exported(tied: bool) -> (tempfile::TempDir, ModelShape, NamedTensors) {
    let folder = tempfile::tempdir().unwrap();
    let shape = shape(tied);
    let tensors = weights(&shape);
    export(folder.path(), &shape, &tensors, None, None).unwrap();
    (folder, shape, tensors)
}

/// Changes `config.json`; a null removes the key.
fn configure(folder: &Path, key: &str, value: Value) {
    let path = folder.join(CONFIG_FILE);
    let mut config: Map<String, Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    if value.is_null() {
        config.remove(key).unwrap();
    } else {
        config.insert(key.to_owned(), value);
    }
    fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
}

/// Writes a weights file.
fn write_weights(path: &Path, tensors: &NamedTensors) {
    let header = tensors::header_bytes(tensors, Some("pt")).unwrap();
    tensors::write_tensors(&mut File::create(path).unwrap(), &header, tensors).unwrap();
}

#[test]
fn what_is_exported_is_imported_with_all_bits() {
    for tied in [false, true] {
        let (folder, shape, tensors) = exported(tied);
        assert_eq!(import(folder.path()).unwrap(), (shape, tensors));
        let partial = |entry: fs::DirEntry| entry.file_name().to_str().unwrap().ends_with(PARTIAL_SUFFIX);
        assert!(!fs::read_dir(folder.path()).unwrap().any(|entry| partial(entry.unwrap())));
    }
}

#[test]
fn configuration_holds_both_spellings_and_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let shape = shape(false);
    let tokenizer = folder.path().join("source.json");
    fs::write(&tokenizer, r#"{"added_tokens":[{"id":0,"content":"<|endoftext|>","special":true}],"model":{}}"#)
        .unwrap();
    let target = folder.path().join("deep/export");
    export(&target, &shape, &weights(&shape), Some(&tokenizer), Some(0)).unwrap();
    let read = |name: &str| serde_json::from_slice::<Value>(&fs::read(target.join(name)).unwrap()).unwrap();
    let config = read(CONFIG_FILE);
    assert_eq!(config["rope_theta"], config["rope_parameters"]["rope_theta"]);
    assert_eq!((&config["dtype"], &config["torch_dtype"]), (&json!("float32"), &json!("float32")));
    assert_eq!((&config["bos_token_id"], &config["eos_token_id"]), (&json!(0), &json!(0)));
    assert_eq!(read(GENERATION_FILE)["eos_token_id"], 0);
    assert_eq!(read(TOKENIZER_CONFIG_FILE)["eos_token"], "<|endoftext|>");
    assert_eq!(fs::read(target.join(TOKENIZER_FILE)).unwrap(), fs::read(&tokenizer).unwrap());

    let missing = export(&folder.path().join("other"), &shape, &weights(&shape), Some(&tokenizer), Some(7));
    assert!(matches!(missing, Err(ExportError::Tokenizer { .. })), "{missing:?}");
    assert!(!folder.path().join("other").exists(), "nothing was written");
}

#[test]
fn only_new_empty_and_own_folders_are_written() {
    let (folder, shape, tensors) = exported(false);
    fs::write(folder.path().join("README.md"), "mine").unwrap();
    export(folder.path(), &shape, &tensors, None, Some(1)).unwrap();
    assert_eq!(fs::read_to_string(folder.path().join("README.md")).unwrap(), "mine");

    let foreign = tempfile::tempdir().unwrap();
    fs::write(foreign.path().join("thesis.tex"), "mine").unwrap();
    let error = export(foreign.path(), &shape, &tensors, None, None).unwrap_err();
    assert!(matches!(error, ExportError::NotEmpty { .. }));
    assert!(error.hint().unwrap().contains("new folder"));
    assert_eq!(fs::read_dir(foreign.path()).unwrap().count(), 1);
}

#[test]
fn parameters_that_do_not_fit_are_not_exported() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("export");
    let shape = shape(false);
    let mut missing = weights(&shape);
    missing.remove("model.norm.weight");
    let mut extra = weights(&shape);
    extra.insert("bias".to_owned(), HostTensor { shape: vec![1], values: vec![0.0] });
    let mut bent = weights(&shape);
    bent.get_mut("model.norm.weight").unwrap().shape = vec![4, 4];
    for tensors in [missing, extra, bent] {
        assert!(matches!(export(&target, &shape, &tensors, None, None), Err(ExportError::Tensors { .. })));
    }
    let impossible = ModelShape { num_key_value_heads: 3, ..shape.clone() };
    assert!(matches!(export(&target, &impossible, &weights(&shape), None, None), Err(ExportError::Shape(_))));
    assert!(!target.exists());
}

#[test]
fn settings_that_change_the_arithmetic_are_refused_by_name() {
    let scaled = json!({"rope_type": "llama3", "factor": 8.0, "rope_theta": 10_000.0});
    let cases = [
        ("model_type", json!("mistral")),
        ("hidden_act", json!("gelu")),
        ("attention_bias", json!(true)),
        ("mlp_bias", json!(true)),
        ("head_dim", json!(8)),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        ("rope_parameters", scaled),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": 500_000.0})),
        ("rope_parameters", json!({"rope_type": "default", "partial_rotary_factor": 0.5})),
        ("quantization_config", json!({"bits": 4})),
    ];
    for (key, value) in cases {
        let (folder, ..) = exported(false);
        configure(folder.path(), key, value.clone());
        let error = import(folder.path()).unwrap_err();
        assert!(
            matches!(&error, ImportError::Unsupported { key: found, .. } if found == key),
            "{key} {value}: {error}"
        );
        assert!(error.to_string().contains(key) && error.hint().is_some());
    }
}

#[test]
fn both_generations_of_configuration_are_read() {
    let (folder, shape, _) = exported(false);
    // Version 4: theta at the top, no scaling.
    configure(folder.path(), "rope_parameters", Value::Null);
    assert_eq!(import_shape(folder.path()).unwrap(), shape);
    // Neither: the default of LlamaConfig.
    configure(folder.path(), "rope_theta", Value::Null);
    assert_eq!(import_shape(folder.path()).unwrap().rope_theta, 10_000.0);
    // Version 5: inside.
    configure(folder.path(), "rope_parameters", json!({"rope_type": "default", "rope_theta": 5e5}));
    assert_eq!(import_shape(folder.path()).unwrap().rope_theta, 5e5);
    for (key, expected) in [("num_key_value_heads", 4), ("max_position_embeddings", 2_048)] {
        configure(folder.path(), key, Value::Null);
        let found = serde_json::to_value(import_shape(folder.path()).unwrap()).unwrap();
        assert_eq!(found[key], expected);
    }
}

#[test]
fn malformed_configurations_are_refused() {
    for (key, value) in [
        ("vocab_size", Value::Null),
        ("model_type", Value::Null),
        ("hidden_size", json!("16")),
        ("hidden_size", json!(-16)),
        ("rope_theta", json!("big")),
        ("tie_word_embeddings", json!(1)),
        ("rope_parameters", json!([1])),
    ] {
        let (folder, ..) = exported(false);
        configure(folder.path(), key, value.clone());
        let error = import(folder.path()).unwrap_err();
        assert!(
            matches!(error, ImportError::Malformed { .. } | ImportError::Unsupported { .. }),
            "{key} {value}: {error}"
        );
    }
    let (folder, ..) = exported(false);
    configure(folder.path(), "num_key_value_heads", json!(3));
    assert!(matches!(import(folder.path()), Err(ImportError::Shape { .. })));
    for content in ["", "[]", "not json"] {
        fs::write(folder.path().join(CONFIG_FILE), content).unwrap();
        assert!(matches!(import(folder.path()), Err(ImportError::Malformed { .. })), "{content:?}");
    }
    fs::write(folder.path().join(CONFIG_FILE), vec![b' '; CONFIG_BYTES_MAX as usize + 1]).unwrap();
    assert!(matches!(import(folder.path()), Err(ImportError::Malformed { .. })));
    fs::remove_file(folder.path().join(CONFIG_FILE)).unwrap();
    assert!(matches!(import(folder.path()), Err(ImportError::NotFound { .. })));
}

/// Splits the weights over shards and writes the index with these names.
fn shard(folder: &Path, tensors: &NamedTensors, names: [&str; 2]) {
    fs::remove_file(folder.join(WEIGHTS_FILE)).unwrap();
    let mut map = Map::new();
    let mut shards = [NamedTensors::new(), NamedTensors::new()];
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        shards[index % 2].insert(name.clone(), tensor.clone());
        map.insert(name.clone(), Value::String(names[index % 2].to_owned()));
    }
    for (name, shard) in names.iter().zip(&shards) {
        write_weights(&folder.join(name.rsplit('/').next().unwrap()), shard);
    }
    fs::write(folder.join(INDEX_FILE), json!({"metadata": {}, "weight_map": map}).to_string()).unwrap();
}

#[test]
fn shards_are_joined() {
    let (folder, shape, tensors) = exported(false);
    shard(folder.path(), &tensors, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    assert_eq!(import(folder.path()).unwrap(), (shape, tensors.clone()));
    // A tensor in both shards is refused rather than taken from one of them.
    write_weights(&folder.path().join("model-00002-of-00002.safetensors"), &tensors);
    assert!(matches!(import(folder.path()), Err(ImportError::Tensor { .. })));
    fs::remove_file(folder.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(matches!(import(folder.path()), Err(ImportError::NotFound { .. })));
}

#[test]
fn shard_names_stay_inside_the_folder() {
    for name in ["../evil.safetensors", "/etc/evil.safetensors", "a/b.safetensors", "..safetensors", "weights.bin"] {
        let (folder, _, tensors) = exported(false);
        shard(folder.path(), &tensors, ["model-1.safetensors", name]);
        let error = import(folder.path()).unwrap_err();
        assert!(
            matches!(error, ImportError::Malformed { .. }) && error.to_string().contains("plain file name"),
            "{error}"
        );
    }
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let change = |edit: &dyn Fn(&mut NamedTensors)| {
        let (folder, _, mut tensors) = exported(false);
        edit(&mut tensors);
        write_weights(&folder.path().join(WEIGHTS_FILE), &tensors);
        import(folder.path())
    };
    let norm = "model.norm.weight";
    let small = || HostTensor { shape: vec![2], values: vec![1.0; 2] };
    let refused = [
        change(&|tensors| drop(tensors.remove(norm))),
        change(&|tensors| drop(tensors.insert("unknown.weight".to_owned(), small()))),
        change(&|tensors| drop(tensors.insert(norm.to_owned(), small()))),
    ];
    for result in refused {
        assert!(matches!(result, Err(ImportError::Tensor { .. })), "{result:?}");
    }
    let table = "model.layers.0.self_attn.rotary_emb.inv_freq";
    assert!(change(&|tensors| drop(tensors.insert(table.to_owned(), small()))).is_ok(), "the rotary table is ignored");

    let (folder, ..) = exported(false);
    let path = folder.path().join(WEIGHTS_FILE);
    let bytes = fs::read(&path).unwrap();
    for cut in [0, 7, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert!(matches!(import(folder.path()), Err(ImportError::Malformed { .. })), "{cut}");
    }
}

#[test]
fn a_tied_model_may_repeat_its_embedding() {
    let (folder, shape, mut tensors) = exported(true);
    let expected = tensors.clone();
    let path = folder.path().join(WEIGHTS_FILE);
    tensors.insert(OUTPUT_PROJECTION.to_owned(), tensors[EMBEDDING].clone());
    write_weights(&path, &tensors);
    assert_eq!(import(folder.path()).unwrap(), (shape, expected));
    tensors.get_mut(OUTPUT_PROJECTION).unwrap().values[0] += 1.0;
    write_weights(&path, &tensors);
    assert!(matches!(import(folder.path()), Err(ImportError::Tensor { name, .. }) if name == OUTPUT_PROJECTION));
}
