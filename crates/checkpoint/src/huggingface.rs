//! Folders that `transformers` loads with `AutoModelForCausalLM` and `AutoTokenizer`, and reading such folders.
//!
//! Parameters carry Hugging Face's names throughout Beringia, so this file translates only configuration: the
//! keys of `transformers.LlamaConfig` in version 4 (`rope_theta`, `torch_dtype`) and version 5
//! (`rope_parameters`, `dtype`). An export writes both spellings. An import refuses by name whatever would make
//! the model compute something else than ours does (scaled rotary embeddings, biases, other activations).
//!
//! Not a converter between model families, and nothing is ever unpickled.

use crate::tensors::{self, Choice, Formats, ReaderBounds, TensorsError};
use base::shape::ShapeError;
use base::{Hint, ModelShape, NamedTensors, ParameterSchema};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

/// Longest `config.json` that is read, bytes: real ones have one or two thousand.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// Longest `tokenizer.json` that is copied, bytes: the largest published ones have about 35 million.
pub const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

const CONFIG_FILE: &str = "config.json";
const GENERATION_FILE: &str = "generation_config.json";
const WEIGHTS_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
/// Tells a folder that an export may write into again; written first.
const MARKER_FILE: &str = "beringia-export.json";
/// A file that is being written.
const PARTIAL_SUFFIX: &str = ".partial";
/// `LlamaConfig`'s defaults, for keys that a configuration may leave out.
const RMS_NORM_EPS_DEFAULT: f64 = 1e-6;
const ROPE_THETA_DEFAULT: f64 = 10_000.0;
const MAX_POSITION_EMBEDDINGS_DEFAULT: usize = 2_048;
/// A precomputed table in old checkpoints; it follows from `rope_theta`.
const ROTARY_TABLE_SUFFIX: &str = "rotary_emb.inv_freq";
const EMBEDDING: &str = "model.embed_tokens.weight";
const OUTPUT_PROJECTION: &str = "lm_head.weight";

/// Why a model was not exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The folder holds something that is not an earlier export.
    #[error("{path}: the folder is not empty and not an earlier export", path = path.display())]
    NotEmpty {
        /// The folder.
        path: PathBuf,
    },
    /// The parameters are not those of the shape.
    #[error("the parameters do not fit the model: tensor '{name}': {reason}")]
    Tensors {
        /// The first tensor at fault.
        name: String,
        /// Expected and found.
        reason: String,
    },
    /// A shape no Llama can have.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The tokenizer cannot be used.
    #[error("{path}: {reason}", path = path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Hint for ExportError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotEmpty { path } => format!("name a new folder, or empty {} first", path.display()),
            Self::Tensors { .. } | Self::Shape(_) => {
                "make sure that the checkpoint and run.toml belong to the same run".to_owned()
            }
            Self::Tokenizer { .. } => "use the tokenizer.json that `beringia init` wrote for this run".to_owned(),
            Self::Io { path, source } if source.kind() == ErrorKind::StorageFull => {
                format!("free some space (`df -h {}`)", path.display())
            }
            Self::Io { path, .. } => format!("make {} readable and writable for this user", path.display()),
        })
    }
}

/// Why a folder is not imported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImportError {
    /// A file that must be there is not.
    #[error("{path}: not found", path = path.display())]
    NotFound {
        /// The file.
        path: PathBuf,
    },
    /// A file that is not what its name says.
    #[error("{path}: {reason}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The first fault.
        reason: String,
    },
    /// A setting with which the model would compute something else than ours.
    #[error("{path}: {key} = {found} is not supported: {expected}", path = path.display())]
    Unsupported {
        /// The configuration.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What is.
        expected: String,
    },
    /// A shape no Llama can have.
    #[error("{path}: {source}", path = path.display())]
    Shape {
        /// The configuration.
        path: PathBuf,
        /// The key at fault.
        source: ShapeError,
    },
    /// A tensor that is missing, unknown, of another shape, or given twice.
    #[error("{path}: tensor '{name}': {reason}", path = path.display())]
    Tensor {
        /// The weights file or the folder.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Expected and found.
        reason: String,
    },
    /// A file that cannot be read.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Hint for ImportError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => {
                "name a folder with config.json and model.safetensors, as `save_pretrained` writes it".to_owned()
            }
            Self::Malformed { path, .. } => format!("fetch {} again and compare its size", path.display()),
            Self::Unsupported { .. } => {
                "take a Llama model without these settings; convert it with transformers if it has an equivalent"
                    .to_owned()
            }
            Self::Shape { source, .. } => format!("correct {} in config.json", source.field),
            Self::Tensor { .. } => "make sure that config.json and the weights are of the same model".to_owned(),
            Self::Io { path, .. } => format!("make {} readable for this user", path.display()),
        })
    }
}

/// Writes a folder that `transformers` loads: configuration, weights in f32, and the tokenizer where one is given.
/// `end_of_text` is the token that separates documents and ends a text. A folder of an earlier export is written
/// again, file by file; files in it that are not part of an export stay.
///
/// # Errors
/// See [`ExportError`]; a foreign folder is not touched.
pub fn export(
    folder: &Path,
    shape: &ModelShape,
    tensors: &NamedTensors,
    tokenizer_json: Option<&Path>,
    end_of_text: Option<u32>,
) -> Result<(), ExportError> {
    shape.validate()?;
    let config = model_config(shape, end_of_text);
    export_described(folder, &ParameterSchema::llama(shape), shape, config, tensors, tokenizer_json, end_of_text)
}

/// As [`export`], of any model: `config` is the object of its `config.json`, `schema` names its tensors; of `shape` only the
/// sizes that have to do with text are looked at.
///
/// # Errors
/// See [`ExportError`]; a foreign folder is not touched.
pub fn export_described(
    folder: &Path,
    schema: &ParameterSchema,
    shape: &ModelShape,
    config: Value,
    tensors: &NamedTensors,
    tokenizer_json: Option<&Path>,
    end_of_text: Option<u32>,
) -> Result<(), ExportError> {
    check_against_schema(schema, tensors).map_err(|(name, reason)| ExportError::Tensors { name, reason })?;
    let header = tensors::header_bytes(tensors, Some("pt"))
        .map_err(|error| ExportError::Tensors { name: WEIGHTS_FILE.to_owned(), reason: error.to_string() })?;
    // Read before anything is written: the tokenizer may lie in the folder itself.
    let tokenizer = tokenizer_json.map(|path| Tokenizer::read(path, shape, end_of_text)).transpose()?;

    claim_folder(folder)?;
    if let Some(tokenizer) = tokenizer {
        write_whole(folder, TOKENIZER_FILE, |file| file.write_all(&tokenizer.json))?;
        write_json(folder, TOKENIZER_CONFIG_FILE, &tokenizer.config)?;
    }
    write_json(folder, GENERATION_FILE, &generation_config(end_of_text))?;
    write_whole(folder, WEIGHTS_FILE, |file| tensors::write_tensors(file, &header, tensors))?;
    write_json(folder, CONFIG_FILE, &config)
}

/// Reads a Llama model from a Hugging Face folder: one `model.safetensors` or the shards of
/// `model.safetensors.index.json`, in f32, bf16 or f16 (both convert to f32 exactly).
///
/// # Errors
/// See [`ImportError`].
pub fn import(folder: &Path) -> Result<(ModelShape, NamedTensors), ImportError> {
    let shape = import_shape(folder)?;
    let tensors = import_weights(folder, &shape)?;
    Ok((shape, tensors))
}

/// Every parameter of the schema with its dimensions, and no other; names the first difference.
fn check_against_schema(schema: &ParameterSchema, tensors: &NamedTensors) -> Result<(), (String, String)> {
    let expected = dimensions(schema);
    for (name, dims) in &expected {
        match tensors.get(name) {
            None => return Err((name.clone(), "is missing".to_owned())),
            Some(tensor) if tensor.shape != *dims => {
                return Err((name.clone(), format!("shape {:?} where the model has {dims:?}", tensor.shape)));
            }
            Some(_) => {}
        }
    }
    match tensors.keys().find(|name| !expected.contains_key(*name)) {
        Some(name) => Err((name.clone(), "is not a parameter of this model".to_owned())),
        None => Ok(()),
    }
}

/// Dimensions by name.
fn dimensions(schema: &ParameterSchema) -> BTreeMap<String, Vec<usize>> {
    schema.parameters().iter().map(|p| (p.name.clone(), p.shape.clone())).collect()
}

/// Takes an empty, missing, or earlier export's folder.
fn claim_folder(folder: &Path) -> Result<(), ExportError> {
    let io = |source| ExportError::Io { path: folder.to_owned(), source };
    fs::create_dir_all(folder).map_err(io)?;
    let occupied = fs::read_dir(folder).map_err(io)?.next().is_some();
    if occupied && !folder.join(MARKER_FILE).is_file() {
        return Err(ExportError::NotEmpty { path: folder.to_owned() });
    }
    write_json(folder, MARKER_FILE, &json!({ "written_by": "beringia export", "version": 1 }))
}

/// Writes a file under another name, syncs and renames it: a reader sees the old one or the new one.
fn write_whole(
    folder: &Path,
    name: &str,
    content: impl FnOnce(&mut File) -> io::Result<()>,
) -> Result<(), ExportError> {
    let partial = folder.join(format!("{name}{PARTIAL_SUFFIX}"));
    let write = || {
        let mut file = File::create(&partial)?;
        content(&mut file)?;
        file.sync_all()?;
        fs::rename(&partial, folder.join(name))
    };
    write().map_err(|source| {
        // Best effort: the error that matters is the one returned.
        let _ = fs::remove_file(&partial);
        ExportError::Io { path: folder.join(name), source }
    })
}

fn write_json(folder: &Path, name: &str, value: &Value) -> Result<(), ExportError> {
    write_whole(folder, name, |file| writeln!(file, "{value:#}"))
}

/// `config.json` in the spellings of transformers 4 and 5.
fn model_config(shape: &ModelShape, end_of_text: Option<u32>) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_size(),
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": { "rope_type": "default", "rope_theta": shape.rope_theta },
        "tie_word_embeddings": shape.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": false,
        "attention_dropout": 0.0,
        "mlp_bias": false,
        "pretraining_tp": 1,
        "initializer_range": 0.02,
        "use_cache": true,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": null,
        "dtype": "float32",
        "torch_dtype": "float32",
    })
}

fn generation_config(end_of_text: Option<u32>) -> Value {
    json!({ "_from_model_config": true, "bos_token_id": end_of_text, "eos_token_id": end_of_text })
}

/// A `tokenizer.json` and the configuration that makes `AutoTokenizer` take it as it is.
struct Tokenizer {
    json: Vec<u8>,
    config: Value,
}

impl Tokenizer {
    fn read(path: &Path, shape: &ModelShape, end_of_text: Option<u32>) -> Result<Self, ExportError> {
        let refuse = |reason: String| ExportError::Tokenizer { path: path.to_owned(), reason };
        let io = |source| ExportError::Io { path: path.to_owned(), source };
        let (file, bytes) = open_file(path).map_err(io)?;
        if bytes > TOKENIZER_BYTES_MAX {
            return Err(refuse(format!("has {bytes} bytes, at most {TOKENIZER_BYTES_MAX} are accepted")));
        }
        let mut json = Vec::with_capacity(bytes as usize);
        file.take(TOKENIZER_BYTES_MAX).read_to_end(&mut json).map_err(io)?;
        let mut config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": shape.max_position_embeddings,
            "clean_up_tokenization_spaces": false,
        });
        let parsed: TokenizerFile =
            serde_json::from_slice(&json).map_err(|error| refuse(format!("is not a tokenizer: {error}")))?;
        if let Some(id) = end_of_text {
            let token = parsed.added_tokens.into_iter().find(|token| token.id == id);
            let content =
                token.ok_or_else(|| refuse(format!("has no special token {id} for the end of a text")))?.content;
            for role in ["bos_token", "eos_token"] {
                config[role] = Value::String(content.clone());
            }
        }
        Ok(Self { json, config })
    }
}

#[derive(Deserialize)]
struct TokenizerFile {
    #[serde(default)]
    added_tokens: Vec<AddedToken>,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
}

/// Opens a regular file and tells its size.
fn open_file(path: &Path) -> io::Result<(File, u64)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok((file, metadata.len())) } else { Err(io::Error::other("is not a regular file")) }
}

fn open_for_import(path: &Path) -> Result<(File, u64), ImportError> {
    open_file(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => ImportError::NotFound { path: path.to_owned() },
        _ => ImportError::Io { path: path.to_owned(), source },
    })
}

fn read_json(path: &Path, bytes_max: u64) -> Result<Vec<u8>, ImportError> {
    let (file, bytes) = open_for_import(path)?;
    if bytes > bytes_max {
        let reason = format!("has {bytes} bytes, at most {bytes_max} are accepted");
        return Err(ImportError::Malformed { path: path.to_owned(), reason });
    }
    let mut content = Vec::with_capacity(bytes as usize);
    let read = file.take(bytes_max).read_to_end(&mut content);
    read.map_err(|source| ImportError::Io { path: path.to_owned(), source })?;
    Ok(content)
}

/// The shape that `config.json` describes, if our model computes the same.
///
/// # Errors
/// See [`ImportError`].
pub fn import_shape(folder: &Path) -> Result<ModelShape, ImportError> {
    let path = folder.join(CONFIG_FILE);
    let json = read_json(&path, CONFIG_BYTES_MAX)?;
    let malformed = |error: serde_json::Error| ImportError::Malformed { path: path.clone(), reason: error.to_string() };
    let keys: Map<String, Value> = serde_json::from_slice(&json).map_err(malformed)?;
    let config = Config { path: &path, keys: &keys };
    config.check_computation()?;
    let shape = config.shape()?;
    shape.validate().map_err(|source| ImportError::Shape { path: path.clone(), source })?;
    config.check_head_size(&shape)?;
    Ok(shape)
}

/// A `config.json` being read. A key that is null counts as absent, as it does in transformers.
struct Config<'a> {
    path: &'a Path,
    keys: &'a Map<String, Value>,
}

impl Config<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.keys.get(key).filter(|value| !value.is_null())
    }

    fn malformed(&self, reason: String) -> ImportError {
        ImportError::Malformed { path: self.path.to_owned(), reason }
    }

    fn unsupported(&self, key: &str, found: &Value, expected: &str) -> ImportError {
        let found = found.to_string().chars().take(200).collect();
        ImportError::Unsupported {
            path: self.path.to_owned(),
            key: key.to_owned(),
            found,
            expected: expected.to_owned(),
        }
    }

    fn count(&self, key: &str, default: Option<usize>) -> Result<usize, ImportError> {
        match (self.get(key), default) {
            (None, Some(default)) => Ok(default),
            (None, None) => Err(self.malformed(format!("{key} is missing"))),
            (Some(value), _) => value
                .as_u64()
                .and_then(|count| usize::try_from(count).ok())
                .ok_or_else(|| self.malformed(format!("{key} is not a whole number"))),
        }
    }

    fn real(&self, key: &str, default: f64) -> Result<f64, ImportError> {
        self.get(key)
            .map_or(Ok(default), |value| value.as_f64().ok_or_else(|| self.malformed(format!("{key} is not a number"))))
    }

    fn flag(&self, key: &str) -> Result<bool, ImportError> {
        self.get(key).map_or(Ok(false), |value| {
            value.as_bool().ok_or_else(|| self.malformed(format!("{key} is neither true nor false")))
        })
    }

    /// Refuses what would change the arithmetic.
    fn check_computation(&self) -> Result<(), ImportError> {
        match self.get("model_type") {
            None => return Err(self.malformed("model_type is missing".to_owned())),
            Some(kind) if kind != "llama" => {
                return Err(self.unsupported("model_type", kind, "only \"llama\" is read"));
            }
            Some(_) => {}
        }
        if let Some(activation) = self.get("hidden_act").filter(|name| *name != "silu") {
            return Err(self.unsupported("hidden_act", activation, "only \"silu\" is computed"));
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.flag(key)? {
                return Err(self.unsupported(key, &Value::Bool(true), "projections have no bias here"));
            }
        }
        if let Some(quantization) = self.get("quantization_config") {
            return Err(self.unsupported("quantization_config", quantization, "weights are read in f32, bf16 or f16"));
        }
        Ok(())
    }

    fn check_head_size(&self, shape: &ModelShape) -> Result<(), ImportError> {
        let head_size = shape.head_size();
        match self.get("head_dim") {
            Some(found) if found.as_u64() != Some(head_size as u64) => {
                let expected = format!("hidden_size / num_attention_heads = {head_size} is computed");
                Err(self.unsupported("head_dim", found, &expected))
            }
            _ => Ok(()),
        }
    }

    fn shape(&self) -> Result<ModelShape, ImportError> {
        let num_attention_heads = self.count("num_attention_heads", None)?;
        Ok(ModelShape {
            vocab_size: self.count("vocab_size", None)?,
            hidden_size: self.count("hidden_size", None)?,
            intermediate_size: self.count("intermediate_size", None)?,
            num_hidden_layers: self.count("num_hidden_layers", None)?,
            num_attention_heads,
            num_key_value_heads: self.count("num_key_value_heads", Some(num_attention_heads))?,
            max_position_embeddings: self.count("max_position_embeddings", Some(MAX_POSITION_EMBEDDINGS_DEFAULT))?,
            rope_theta: self.rope_theta()?,
            rms_norm_eps: self.real("rms_norm_eps", RMS_NORM_EPS_DEFAULT)?,
            tie_word_embeddings: self.flag("tie_word_embeddings")?,
        })
    }

    /// Version 4 has `rope_theta` beside `rope_scaling`, version 5 has it inside `rope_parameters`.
    fn rope_theta(&self) -> Result<f64, ImportError> {
        let mut theta = self.get("rope_theta").cloned();
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(value) = self.get(key) else { continue };
            let fields = value.as_object().ok_or_else(|| self.malformed(format!("{key} is not an object")))?;
            for (name, field) in fields.iter().filter(|(_, field)| !field.is_null()) {
                let plain = match name.as_str() {
                    "rope_type" | "type" => field == "default",
                    "partial_rotary_factor" => field.as_f64() == Some(1.0),
                    "rope_theta" => theta.get_or_insert_with(|| field.clone()).as_f64() == field.as_f64(),
                    _ => false,
                };
                if !plain {
                    return Err(self.unsupported(key, value, "only the default rotary embedding is computed"));
                }
            }
        }
        theta.map_or(Ok(ROPE_THETA_DEFAULT), |value| {
            value.as_f64().ok_or_else(|| self.malformed("rope_theta is not a number".to_owned()))
        })
    }
}

/// The `weight_map` of a sharded model; everything else in the index is ignored.
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

fn import_weights(folder: &Path, shape: &ModelShape) -> Result<NamedTensors, ImportError> {
    let schema = ParameterSchema::llama(shape);
    let expected = dimensions(&schema);
    let mut tensors = NamedTensors::new();
    for file in weight_files(folder)? {
        let path = folder.join(&file);
        for (name, tensor) in read_weights(&path, shape, &expected)? {
            if tensors.insert(name.clone(), tensor).is_some() {
                return Err(ImportError::Tensor { path, name, reason: "is in two files".to_owned() });
            }
        }
    }
    if shape.tie_word_embeddings {
        drop_tied_projection(folder, &mut tensors)?;
    }
    check_against_schema(&schema, &tensors).map_err(|(name, reason)| ImportError::Tensor {
        path: folder.to_owned(),
        name,
        reason,
    })?;
    Ok(tensors)
}

/// Names of the files that hold the weights, relative to the folder.
fn weight_files(folder: &Path) -> Result<BTreeSet<String>, ImportError> {
    if folder.join(WEIGHTS_FILE).exists() {
        return Ok(BTreeSet::from([WEIGHTS_FILE.to_owned()]));
    }
    let bounds = ReaderBounds::default();
    let path = folder.join(INDEX_FILE);
    let json = match read_json(&path, bounds.json_bytes_max) {
        Err(ImportError::NotFound { .. }) => return Err(ImportError::NotFound { path: folder.join(WEIGHTS_FILE) }),
        other => other?,
    };
    let malformed = |reason: String| ImportError::Malformed { path: path.clone(), reason };
    let index: ShardIndex = serde_json::from_slice(&json).map_err(|error| malformed(error.to_string()))?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    if files.len() > bounds.files_max {
        return Err(malformed(format!("names {} shards, at most {} are accepted", files.len(), bounds.files_max)));
    }
    match files.iter().find(|name| !is_plain_file_name(name)) {
        Some(name) => Err(malformed(format!("shard {name:?} is not a plain file name ending in .safetensors"))),
        None => Ok(files),
    }
}

/// Only names inside the folder itself: an index must not make us read other files.
fn is_plain_file_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    name.len() <= 255 && name.ends_with(".safetensors") && !name.starts_with('.') && name.chars().all(plain)
}

fn read_weights(
    path: &Path,
    shape: &ModelShape,
    expected: &BTreeMap<String, Vec<usize>>,
) -> Result<NamedTensors, ImportError> {
    let (mut file, bytes) = open_for_import(path)?;
    let embedding = [shape.vocab_size, shape.hidden_size];
    let choose = |name: &str, found: &[usize]| match expected.get(name) {
        _ if name.ends_with(ROTARY_TABLE_SUFFIX) => Choice::Ignore,
        Some(dims) if found == dims => Choice::Read,
        Some(dims) => Choice::Refuse(format!("shape {found:?} where config.json says {dims:?}")),
        None if shape.tie_word_embeddings && name == OUTPUT_PROJECTION && found == embedding => Choice::Read,
        None => Choice::Refuse("is not a parameter of this model".to_owned()),
    };
    tensors::read_tensors(&mut file, bytes, &ReaderBounds::default(), Formats::F32Bf16F16, choose).map_err(|error| {
        match error {
            TensorsError::Tensor { name, reason } => ImportError::Tensor { path: path.to_owned(), name, reason },
            TensorsError::Io(source) if source.kind() == ErrorKind::UnexpectedEof => {
                ImportError::Malformed { path: path.to_owned(), reason: "ends too early".to_owned() }
            }
            TensorsError::Io(source) => ImportError::Io { path: path.to_owned(), source },
            other => ImportError::Malformed { path: path.to_owned(), reason: other.to_string() },
        }
    })
}

/// A tied model may carry the output projection, if it is the embedding.
fn drop_tied_projection(folder: &Path, tensors: &mut NamedTensors) -> Result<(), ImportError> {
    let Some(projection) = tensors.remove(OUTPUT_PROJECTION) else { return Ok(()) };
    if tensors.get(EMBEDDING).is_none_or(|embedding| *embedding == projection) {
        return Ok(());
    }
    Err(ImportError::Tensor {
        path: folder.to_owned(),
        name: OUTPUT_PROJECTION.to_owned(),
        reason: format!("differs from {EMBEDDING}, to which tie_word_embeddings ties it"),
    })
}

#[cfg(test)]
#[path = "huggingface_tests.rs"]
mod huggingface_tests;
