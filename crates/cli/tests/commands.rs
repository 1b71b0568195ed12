//! The commands as a user meets them: through the binary, on texts made here, down to the words of each message.
//!
//! Training is not done here; a new run's initial checkpoint is a model like any other.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;

/// Settings that make the model small: these tests are about commands, not about numbers.
const TINY_MODEL: [(&str, &str); 6] = [
    ("hidden_size", "32"),
    ("intermediate_size", "48"),
    ("num_hidden_layers", "2"),
    ("num_attention_heads", "4"),
    ("num_key_value_heads", "2"),
    ("steps", "4"),
];

fn beringia(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_beringia"));
    command.args(arguments).output().unwrap()
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Standard output of a command that must succeed.
fn stdout(arguments: &[&str]) -> String {
    let output = beringia(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", text_of(&output.stderr));
    text_of(&output.stdout)
}

/// The object of a command that must succeed: standard output holds it and nothing else.
fn object(arguments: &[&str]) -> Value {
    let arguments = [arguments, &["--json"]].concat();
    let text = stdout(&arguments);
    assert_eq!(text.matches('\n').count(), 1, "{text}");
    let value: Value = serde_json::from_str(&text).unwrap();
    assert!(value.is_object(), "{text}");
    value
}

/// Standard error of a command that must fail with status 1.
fn failure(arguments: &[&str]) -> String {
    let output = beringia(arguments);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", text_of(&output.stdout));
    text_of(&output.stderr)
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// About 36 KB of sentences of 12 words that follow one another without a plan but always alike.
fn sentences(count: usize) -> String {
    const WORDS: [&str; 12] =
        ["sea", "land", "bridge", "ice", "north", "wind", "herd", "walks", "over", "naïve", "under", "the"];
    let word = |at: usize| WORDS[(at * at + at / 7) % WORDS.len()];
    (0..count).map(|line| (0..8).map(|at| word(line * 8 + at)).collect::<Vec<_>>().join(" ") + ".\n").collect()
}

struct Place {
    folder: TempDir,
}

impl Place {
    /// A folder with `texts/` in it.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("texts")).unwrap();
        for (index, lines) in [300, 500].into_iter().enumerate() {
            fs::write(folder.path().join(format!("texts/{index}.txt")), sentences(lines)).unwrap();
        }
        Self { folder }
    }

    fn join(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new run with a tiny model.
    fn run(&self) -> PathBuf {
        let run = self.join("run");
        let object = object(&["init", path(&run), "--data", path(&self.join("texts")), "--vocabulary", "300"]);
        assert_eq!(object["documents"], 2);
        for (key, value) in TINY_MODEL {
            set(&run, key, value);
        }
        run
    }
}

/// Changes one setting of `run.toml`.
fn set(run: &Path, key: &str, value: &str) {
    let file = run.join("run.toml");
    let text = fs::read_to_string(&file).unwrap();
    let start = text.find(&format!("\n{key} = ")).unwrap() + 1;
    let end = start + text[start..].find('\n').unwrap();
    fs::write(&file, format!("{}{key} = {value}{}", &text[..start], &text[end..])).unwrap();
}

#[test]
fn init_says_what_it_found_and_refuses_a_second_time() {
    let place = Place::new();
    fs::write(place.join("texts/logo.png"), [0u8, 159, 146, 150]).unwrap();
    let (run, texts) = (place.join("run"), place.join("texts"));
    let arguments = ["init", path(&run), "--data", path(&texts), "--vocabulary", "300"];
    let text = stdout(&arguments);
    assert!(text.contains("found      2 documents"), "{text}");
    assert!(text.contains("skipped    logo.png: not UTF-8 text"), "{text}");
    assert!(text.contains("tokenizer  300 tokens"), "{text}");
    assert!(text.ends_with(&format!("next       beringia train {}\n", run.display())), "{text}");
    for made in ["run.toml", "data/manifest.json", "data/tokenizer.json", "checkpoints/round-00000000/manifest.json"] {
        assert!(run.join(made).is_file(), "{made}");
    }
    let expected = format!(
        "error: {run} is a run already\nhint: `beringia train {run}` continues it; name another folder for a new run\n",
        run = run.display()
    );
    assert_eq!(failure(&arguments), expected);
}

#[test]
fn init_is_repeatable() {
    let place = Place::new();
    let hashes = ["one", "two"].map(|name| {
        let made = object(&["init", path(&place.join(name)), "--data", path(&place.join("texts"))]);
        (made["data_hash"].clone(), made["tokenizer_hash"].clone(), made["state_hash"].clone())
    });
    assert_eq!(hashes[0], hashes[1]);
}

#[test]
fn init_refuses_folders_without_text_and_leaves_nothing() {
    let place = Place::new();
    let (empty, binary, run) = (place.join("empty"), place.join("binary"), place.join("run"));
    fs::create_dir(&empty).unwrap();
    fs::create_dir(&binary).unwrap();
    fs::write(binary.join("a.bin"), [0u8, 1, 2, 255]).unwrap();
    let init = |data: &Path| failure(&["init", path(&run), "--data", path(data)]);
    assert_eq!(
        init(&empty),
        format!(
            "error: data folder {empty} has no files\n\
             hint: put .txt, .md, .jsonl or .parquet files into {empty}, or name another folder\n",
            empty = empty.display()
        )
    );
    assert_eq!(
        init(&binary),
        format!(
            "error: data folder {} has no usable text: 0 documents in 1 files; 1 not UTF-8 text (a.bin)\n\
             hint: text must be UTF-8 in text files, or a string field or column named `text` or `content` in .jsonl \
             and .parquet; name such a folder with `--data FOLDER`\n",
            binary.display()
        )
    );
    assert!(init(&place.join("gone")).contains("hint: name a folder of .txt, .md, .jsonl or .parquet files"));
    let left: Vec<_> = fs::read_dir(place.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "neither a run nor half of one: {left:?}");
}

#[test]
fn init_clears_what_an_interrupted_one_left() {
    let place = Place::new();
    fs::create_dir_all(place.join(".run.partial/data")).unwrap();
    fs::write(place.join(".run.partial/data/half"), "x").unwrap();
    let run = place.run();
    assert!(!run.join("data/half").exists() && !place.join(".run.partial").exists());
}

#[test]
fn init_refuses_text_that_is_too_short() {
    let place = Place::new();
    fs::write(place.join("short.txt"), "to be or not to be").unwrap();
    let message = failure(&["init", path(&place.join("run")), "--data", path(&place.join("short.txt"))]);
    let expected = "error: 14 tokens for training and 2 tokens for validation are too few\n\
                    hint: add text to the data folder; a megabyte is a start\n";
    assert!(message.ends_with(expected), "{message}");
}

#[test]
fn an_unknown_key_suggests_the_near_one() {
    let place = Place::new();
    let run = place.run();
    let file = run.join("run.toml");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("\nlearning_rate =", "\nlearing_rate =")).unwrap();
    let expected = format!(
        "error: {}: run.toml: unknown key 'learing_rate' in [train]\nhint: did you mean 'learning_rate'?\n",
        file.display()
    );
    assert_eq!(failure(&["sample", path(&run), "To be"]), expected);
}

#[test]
fn a_missing_run_says_how_to_make_one() {
    let place = Place::new();
    let (run, texts) = (place.join("run"), place.join("texts"));
    let hint = |folder: &Path| format!("hint: `beringia init {} --data FOLDER` makes a run\n", folder.display());
    for command in ["sample", "eval"] {
        let expected = format!("error: {} does not exist\n{}", run.display(), hint(&run));
        assert_eq!(failure(&[command, path(&run)]), expected);
    }
    let expected = format!(
        "error: {} is neither a run (no run.toml) nor a Hugging Face folder (no config.json)\n{}",
        texts.display(),
        hint(&texts)
    );
    assert_eq!(failure(&["export", path(&texts), "--to", "hf"]), expected);
}

#[test]
fn failures_are_objects_where_objects_are_wanted() {
    let place = Place::new();
    let run = place.join("run");
    let output = beringia(&["eval", path(&run), "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["error"], format!("{} does not exist", run.display()));
    assert!(object["hint"].as_str().unwrap().contains("beringia init"));
    assert!(text_of(&output.stderr).starts_with("error: "));
    let output = beringia(&["eval", "--json"]);
    assert_eq!(output.status.code(), Some(2), "usage");
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(object["error"].is_string() && object["hint"].is_string());
}

#[test]
fn a_damaged_checkpoint_falls_back_and_says_so() {
    let place = Place::new();
    let run = place.run();
    let before = object(&["eval", path(&run)]);
    let initial = run.join("checkpoints/round-00000000");
    let newest = run.join("checkpoints/round-00000007");
    for name in ["truncated", "bit-flipped"] {
        copy(&initial, &newest);
        let file = newest.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        match name {
            "truncated" => bytes.truncate(middle),
            _ => bytes[middle] ^= 1,
        }
        fs::write(&file, bytes).unwrap();
        let output = beringia(&["eval", path(&run), "--json"]);
        let warnings = text_of(&output.stderr);
        assert!(output.status.success(), "{name}: {warnings}");
        let start = format!("warning: {} is damaged and was skipped: ", newest.display());
        assert!(warnings.starts_with(&start), "{name}: {warnings}");
        assert!(warnings.ends_with("warning: the checkpoint before it is used: step 0\n"), "{name}: {warnings}");
        let after: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(after["nats_per_token"], before["nats_per_token"], "{name}");
    }
    fs::remove_dir_all(&initial).unwrap();
    let message = failure(&["eval", path(&run)]);
    assert!(message.contains("none of 1 checkpoints is intact") && message.contains("\nhint: restore"), "{message}");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn the_model_may_be_edited_before_the_first_step() {
    let place = Place::new();
    let run = place.run();
    let output = beringia(&["eval", path(&run)]);
    let warning = "warning: [model], [sync] strategy or seed was changed before the first step: the initial state was made anew\n";
    assert_eq!(text_of(&output.stderr).lines().next(), warning.lines().next());
    let text_without_progress = |arguments: &[&str]| text_of(&beringia(arguments).stderr);
    assert!(!text_without_progress(&["eval", path(&run), "--json"]).contains("warning"), "only once");
    set(&run, "seed", "5");
    assert_eq!(text_without_progress(&["eval", path(&run), "--json"]), warning);
}

#[test]
fn eval_measures_text_and_the_validation_split() {
    let place = Place::new();
    let run = place.run();
    let text = place.join("texts/0.txt");
    let measured = object(&["eval", path(&run), "--text", path(&text)]);
    let number = |key: &str| measured[key].as_f64().unwrap();
    // A model that has seen nothing guesses among its 300 tokens: ln 300 = 5.70.
    assert!((number("nats_per_token") - 300f64.ln()).abs() < 0.1, "{measured}");
    let bits = number("nats_per_token") * number("tokens") / std::f64::consts::LN_2 / number("bytes");
    assert!((bits / number("bits_per_byte") - 1.0).abs() < 1e-12, "{measured}");
    let bytes = fs::metadata(&text).unwrap().len() as f64;
    assert!(number("bytes") < bytes && number("bytes") > bytes - 20.0, "all but the first token: {measured}");
    let validation = object(&["eval", path(&run)]);
    assert_eq!(validation["text"], "validation");
    assert!(validation["bigram_bits_per_byte"].as_f64().unwrap() < validation["bits_per_byte"].as_f64().unwrap());
    let lines = stdout(&["eval", path(&run)]);
    assert!(lines.contains("bits per byte") && lines.contains("over it\n"), "{lines}");
}

#[test]
fn eval_refuses_what_is_no_text() {
    let place = Place::new();
    let run = place.run();
    let (binary, short) = (place.join("binary"), place.join("short"));
    fs::write(&binary, [b'a', 0xff, b'b']).unwrap();
    fs::write(&short, "a").unwrap();
    let eval = |text: &Path| failure(&["eval", path(&run), "--text", path(text)]);
    let hint = "hint: name a UTF-8 text file with --text FILE\n";
    assert!(eval(&binary).contains("is not UTF-8 text: invalid utf-8 sequence of 1 bytes from index 1"));
    assert!(eval(&binary).ends_with(hint));
    assert!(eval(&place.join("gone")).ends_with(hint));
    assert!(eval(&short).contains("has 1 tokens; 2 are needed"), "{}", eval(&short));
}

#[test]
fn sample_repeats_with_its_seed_and_streams_the_same_text() {
    let place = Place::new();
    let run = place.run();
    let sample = |seed: &str| object(&["sample", path(&run), "To be", "--tokens", "12", "--seed", seed]);
    let first = sample("1");
    assert_eq!(first["text"], sample("1")["text"]);
    assert_ne!(first["text"], sample("2")["text"]);
    assert!(first["tokens"].as_u64().unwrap() <= 12);
    let streamed = stdout(&["sample", path(&run), "To be", "--tokens", "12", "--threads", "1"]);
    assert_eq!(streamed, format!("To be{}\n", first["text"].as_str().unwrap()));
    let message = failure(&["sample", path(&run), "To be", "--temperature", "NaN"]);
    assert!(message.contains("hint: use a temperature between 0 and 2"), "{message}");
}

#[test]
fn an_unknown_engine_lists_the_known_ones() {
    let place = Place::new();
    let run = place.run();
    beringia(&["eval", path(&run)]);
    let message = failure(&["sample", path(&run), "--engine", "flux"]);
    assert!(message.starts_with("error: there is no engine 'flux' in this build; it has: flex, "), "{message}");
    assert!(message.ends_with(", torch\nhint: use `--engine flex`, which runs on any CPU\n"), "{message}");
    assert_eq!(beringia(&["sample", path(&run), "--threads", "0"]).status.code(), Some(2));
}

#[test]
fn an_export_is_read_back_with_equal_logits() {
    let place = Place::new();
    let run = place.run();
    beringia(&["eval", path(&run)]);
    let exported = object(&["export", path(&run), "--to", "hf"]);
    let folder = run.join("hf");
    assert_eq!(exported["folder"], path(&folder));
    let logits = |model: &Path| object(&["logits", path(model), "--tokens", "1,2,3,40"]);
    let (of_run, of_export) = (logits(&run), logits(&folder));
    assert_eq!(of_run["shape"], serde_json::json!([4, 300]));
    assert_eq!(of_run["logits"].as_array().unwrap().len(), 1200);
    assert_eq!(of_run, of_export);
    let text = place.join("texts/1.txt");
    let nats = |model: &Path| object(&["eval", path(model), "--text", path(&text)])["nats_per_token"].clone();
    assert_eq!(nats(&run), nats(&folder));
    assert!(stdout(&["sample", path(&folder), "ice", "--tokens", "3"]).starts_with("ice"));
    assert!(failure(&["eval", path(&folder)]).contains("has no validation text of its own\nhint: name one"));
    let message = failure(&["export", path(&run), "--to", "hf", "--out", path(&place.join("texts"))]);
    assert!(message.contains("not empty and not an earlier export"), "{message}");
    let message = failure(&["export", path(&folder), "--to", "hf"]);
    assert!(message.contains("is a Hugging Face folder already\nhint: name the folder of a run"), "{message}");
}

#[test]
fn damaged_hugging_face_folders_are_refused() {
    let place = Place::new();
    let run = place.run();
    beringia(&["eval", path(&run)]);
    let folder = run.join("hf");
    object(&["export", path(&run), "--to", "hf"]);
    let weights = fs::read(folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    let message = failure(&["logits", path(&folder), "--tokens", "1"]);
    assert!(message.contains("model.safetensors") && message.contains("\nhint: "), "{message}");
    fs::write(folder.join("config.json"), "{").unwrap();
    let message = failure(&["logits", path(&folder), "--tokens", "1"]);
    assert!(message.contains("config.json") && message.contains("\nhint: "), "{message}");
}

#[test]
fn tokens_outside_the_model_are_refused() {
    let place = Place::new();
    let run = place.run();
    beringia(&["eval", path(&run)]);
    let message = failure(&["logits", path(&run), "--tokens", "300"]);
    assert!(message.contains("does not fit the model") && message.contains("\nhint: "), "{message}");
}

#[test]
fn help_lists_the_commands_in_order_and_init_the_keys() {
    let text = stdout(&["--help"]);
    let at = |word: &str| text.find(&format!("\n  {word} ")).unwrap_or_else(|| panic!("{word} in {text}"));
    assert!(at("init") < at("sample") && at("sample") < at("eval") && at("eval") < at("export"));
    assert!(!text.contains("logits"), "{text}");
    let keys = stdout(&["init", "--help"]);
    for key in ["[train]", "learning_rate_final_fraction", "outer_momentum", "num_key_value_heads"] {
        assert!(keys.contains(key), "{key}");
    }
    assert_eq!(beringia(&["innit"]).status.code(), Some(2));
}

#[cfg(unix)]
#[test]
fn a_reader_that_leaves_is_no_failure() {
    let place = Place::new();
    let run = place.run();
    beringia(&["eval", path(&run)]);
    let mut child = Command::new(env!("CARGO_BIN_EXE_beringia"))
        .args(["logits", path(&run), "--tokens", "1,2,3,4,5,6,7,8"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text_of(&output.stderr));
    assert_eq!(text_of(&output.stderr), "");
}
