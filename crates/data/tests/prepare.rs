//! From folders of text to samples, and every way in which that can go wrong.
#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

use base::{ContentHash, Hint};
use data::dataset::load_tokenizer;
use data::manifest::{MANIFEST_FILE, TOKENIZER_FILE};
use data::prepare::Prepared;
use data::{
    BigramModel, Corpus, CorpusError, Dataset, DatasetError, Manifest, PrepareError, PrepareOptions, PrepareProgress,
    Split, TokenizerSource, ValidationSet, prepare,
};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A folder with `texts/` to read and a name for the result.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("texts")).unwrap();
        let place = Self { folder };
        files.iter().for_each(|(name, text)| fs::write(place.texts().join(name), text).unwrap());
        place
    }

    fn texts(&self) -> PathBuf {
        self.folder.path().join("texts")
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn prepare_with(&self, vocabulary_size: usize, options: &PrepareOptions) -> Result<Prepared, PrepareError> {
        let corpus = Corpus::folder(&self.texts())?;
        prepare(&corpus, &TokenizerSource::Train { vocabulary_size }, &self.out(), options, &mut |_| {})
    }

    fn prepare(&self) -> Result<Prepared, PrepareError> {
        self.prepare_with(300, &PrepareOptions::default())
    }
}

/// Sixty documents, small, each different.
fn sixty() -> Vec<(String, String)> {
    let text = |i: u32| format!("Document {i} says:\n{}", format!("line {} of it\n", i * 7).repeat(3 + i as usize % 9));
    (0..60).map(|i| (format!("{i:02}.txt"), text(i))).collect()
}

fn place_of_sixty() -> Place {
    let files = sixty();
    Place::new(&files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect::<Vec<_>>())
}

const SMALL_SHARDS: PrepareOptions = PrepareOptions { validation_fraction: 0.05, split_seed: 1, shard_tokens_max: 200 };

/// The texts of all documents of a split, by way of their tokens.
fn documents(folder: &Path, split: Split) -> Vec<String> {
    let dataset = Dataset::open(folder, split, true).unwrap();
    let tokenizer = dataset.tokenizer(folder).unwrap();
    let text = |document| {
        let mut tokens = Vec::new();
        dataset.read(dataset.document(document), &mut tokens);
        assert_eq!(tokens.pop(), Some(tokenizer.end_of_text()));
        assert!(!tokens.contains(&tokenizer.end_of_text()));
        tokenizer.decode(&tokens).unwrap()
    };
    (0..dataset.documents()).map(text).collect()
}

#[test]
fn every_document_is_in_one_split_once_and_comes_back() {
    let place = place_of_sixty();
    let prepared = place.prepare_with(300, &SMALL_SHARDS).unwrap();
    assert!(prepared.manifest.train.shards.len() > 3, "{:?}", prepared.manifest.train);
    let (train, validation) = (documents(&place.out(), Split::Train), documents(&place.out(), Split::Validation));
    assert!(!validation.is_empty() && validation.len() < 10, "{}", validation.len());
    let written: BTreeSet<String> = sixty().into_iter().map(|(_, text)| text).collect();
    assert_eq!(train.len() + validation.len(), 60);
    assert_eq!(train.iter().chain(&validation).cloned().collect::<BTreeSet<_>>(), written);
    let manifest = &prepared.manifest;
    assert_eq!(manifest.train.bytes, train.iter().map(|text| text.len() as u64).sum::<u64>());
    assert_eq!(
        (manifest.train.documents, manifest.token_width_bytes, manifest.vocabulary_size),
        (train.len() as u64, 2, 300)
    );
    assert!(!manifest.document_was_cut);
    assert_eq!(*manifest, Manifest::read(&place.out()).unwrap());
}

#[test]
fn equal_input_gives_equal_bytes() {
    let (a, b) = (place_of_sixty(), place_of_sixty());
    let (first, second) = (a.prepare_with(300, &SMALL_SHARDS).unwrap(), b.prepare_with(300, &SMALL_SHARDS).unwrap());
    assert_eq!(first.manifest.hash(), second.manifest.hash());
    assert_eq!(first.manifest.hash(), ContentHash::of(&fs::read(a.out().join(MANIFEST_FILE)).unwrap()));
    for file in first.manifest.files() {
        assert_eq!(fs::read(a.out().join(&file.name)).unwrap(), fs::read(b.out().join(&file.name)).unwrap());
    }
    let other = PrepareOptions { split_seed: 2, ..SMALL_SHARDS };
    assert_ne!(place_of_sixty().prepare_with(300, &other).unwrap().manifest.hash(), first.manifest.hash());
}

#[test]
fn samples_run_over_shard_ends() {
    let place = place_of_sixty();
    place.prepare_with(300, &SMALL_SHARDS).unwrap();
    let dataset = Dataset::open(&place.out(), Split::Train, true).unwrap();
    let mut all = Vec::new();
    dataset.read(0..dataset.tokens(), &mut all);
    assert_eq!(all.len() as u64, dataset.tokens());
    for length in [1, 7, 64, 999] {
        assert_eq!(dataset.samples(length), (all.len() as u64 - 1) / length as u64);
        for index in 0..dataset.samples(length) {
            let mut sample = Vec::new();
            dataset.sample(length, index, &mut sample);
            let start = index as usize * length;
            assert_eq!(sample, all[start..=start + length]);
        }
    }
    let too_long = dataset.require_samples(all.len()).unwrap_err();
    assert!(too_long.hint().unwrap().contains(&format!("sequence_length to {}", all.len() - 1)), "{too_long}");
}

#[test]
fn one_document_is_cut_at_a_line() {
    let text = "A line of the only document.\n".repeat(100);
    let place = Place::new(&[("only.txt", &text)]);
    let prepared = place.prepare().unwrap();
    assert!(prepared.manifest.document_was_cut);
    let (train, validation) = (documents(&place.out(), Split::Train), documents(&place.out(), Split::Validation));
    assert_eq!((train.len(), validation.len()), (1, 1));
    assert!(train[0].ends_with('\n'));
    assert_eq!(format!("{}{}", train[0], validation[0]), text);
    // At least the fraction, and less than a line more.
    assert!((145..145 + 29).contains(&validation[0].len()), "{}", validation[0].len());
}

#[test]
fn text_without_lines_and_hardly_any_text() {
    let place = Place::new(&[("a.txt", "ümlaut")]);
    place.prepare().unwrap();
    assert_eq!(documents(&place.out(), Split::Train), ["ümlau"]);
    assert_eq!(documents(&place.out(), Split::Validation), ["t"]);
    let error = Place::new(&[("a.txt", "ü")]).prepare().unwrap_err();
    assert!(matches!(error, PrepareError::TooLittle(2)), "{error}");
    let lone_line = Place::new(&[("a.txt", "x\n")]);
    lone_line.prepare().unwrap();
}

#[test]
fn folders_without_text_say_so_and_leave_nothing() {
    let error = Place::new(&[]).prepare().unwrap_err();
    assert!(matches!(error, PrepareError::Corpus(CorpusError::Empty { .. })), "{error}");
    let binary = Place::new(&[("photo.jpg", "\u{0}\u{1}"), ("model.bin", "\u{0}")]);
    let error = binary.prepare().unwrap_err();
    let message = error.to_string();
    assert!(message.contains("photo.jpg") && message.contains("model.bin"), "{message}");
    assert!(error.hint().unwrap().contains("UTF-8"));
    let malformed = Place::new(&[("a.jsonl", "{\"text\": \n"), ("b.parquet", "PAR1")]);
    let message = malformed.prepare().unwrap_err().to_string();
    assert!(message.contains("2 warnings") && message.contains("a.jsonl:1"), "{message}");
    // With a tokenizer of its own, the text is missed only while it is encoded.
    let tokenizer = binary.folder.path().join("tokenizer.json");
    let other = place_of_sixty();
    other.prepare().unwrap();
    fs::copy(other.out().join(TOKENIZER_FILE), &tokenizer).unwrap();
    let corpus = Corpus::folder(&binary.texts()).unwrap();
    let source = TokenizerSource::Load(tokenizer);
    let error = prepare(&corpus, &source, &binary.out(), &PrepareOptions::default(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, PrepareError::Corpus(CorpusError::NoText { .. })), "{error}");
    assert_eq!(entries(binary.folder.path()), ["texts", "tokenizer.json"]);
}

fn entries(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

#[test]
fn good_documents_survive_bad_neighbours() {
    let place = place_of_sixty();
    fs::write(place.texts().join("bad.jsonl"), "{\"text\": \"whole\"}\n{\"text\": \"cut").unwrap();
    fs::write(place.texts().join("bad.parquet"), b"PAR1 and nothing more").unwrap();
    fs::write(place.texts().join("bad.bin"), [0, 159, 146, 150]).unwrap();
    let report = place.prepare().unwrap().report;
    assert_eq!((report.documents, report.warnings, report.binary_files), (61, 2, 1));
    assert_eq!(report.warnings_kept[0].line, Some(2));
}

#[test]
fn an_interrupted_preparation_leaves_nothing() {
    let place = place_of_sixty();
    let corpus = Corpus::folder(&place.texts()).unwrap();
    let source = TokenizerSource::Train { vocabulary_size: 300 };
    let mut interrupt = |progress| {
        if let PrepareProgress::Encoding { documents: 60, .. } = progress {
            std::panic::resume_unwind(Box::new("interrupted"));
        }
    };
    let run = std::panic::AssertUnwindSafe(|| {
        prepare(&corpus, &source, &place.out(), &PrepareOptions::default(), &mut interrupt).is_ok()
    });
    assert!(std::panic::catch_unwind(run).is_err());
    assert_eq!(entries(place.folder.path()), ["texts"]);
    // What a killed process leaves is under another name, and is removed by the next run.
    let partial = place.folder.path().join(".data.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("train-00000.tokens"), "half").unwrap();
    assert!(Dataset::open(&place.out(), Split::Train, false).is_err());
    place.prepare().unwrap();
    assert_eq!(entries(place.folder.path()), ["data", "texts"]);
    let again = place.prepare().unwrap_err();
    assert!(matches!(&again, PrepareError::Exists(_)) && again.hint().unwrap().contains("rm -r"), "{again}");
}

#[test]
fn unwritable_places_are_errors() {
    let place = place_of_sixty();
    let corpus = Corpus::folder(&place.texts()).unwrap();
    let source = TokenizerSource::Train { vocabulary_size: 300 };
    let out = place.texts().join("00.txt").join("data");
    let error = prepare(&corpus, &source, &out, &PrepareOptions::default(), &mut |_| {}).unwrap_err();
    assert!(matches!(&error, PrepareError::Write { .. }) && error.hint().is_some(), "{error}");
    let bad = PrepareOptions { validation_fraction: 0.0, ..PrepareOptions::default() };
    assert!(matches!(place.prepare_with(300, &bad), Err(PrepareError::Option { .. })));
    assert!(matches!(place.prepare_with(3, &SMALL_SHARDS), Err(PrepareError::Tokenizer(_))));
}

#[test]
fn truncated_and_flipped_files_are_refused() {
    let place = place_of_sixty();
    let manifest = place.prepare_with(300, &SMALL_SHARDS).unwrap().manifest;
    for file in manifest.train.shards.iter().flat_map(|shard| [&shard.token_file, &shard.document_file]) {
        let path = place.out().join(&file.name);
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let error = Dataset::open(&place.out(), Split::Train, false).err().unwrap();
        assert!(matches!(error, DatasetError::Length { .. }), "{error}");
        for at in [0, 9, 13, 20, 31, 33, whole.len() - 1] {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            fs::write(&path, &flipped).unwrap();
            let error = Dataset::open(&place.out(), Split::Train, true).err().unwrap();
            let message = error.to_string();
            let names_both =
                message.contains(&file.blake3.to_string()) && message.contains(&ContentHash::of(&flipped).to_string());
            assert!(matches!(error, DatasetError::Hash { .. }) && names_both, "byte {at}: {message}");
        }
        fs::write(&path, [&whole[..20], &[9], &whole[21..]].concat()).unwrap();
        let error = Dataset::open(&place.out(), Split::Train, false).err().unwrap();
        assert!(matches!(error, DatasetError::Content { .. }), "the header is always checked: {error}");
        fs::write(&path, whole).unwrap();
    }
    Dataset::open(&place.out(), Split::Train, true).unwrap();
    fs::remove_file(place.out().join(&manifest.train.shards[0].token_file.name)).unwrap();
    let error = Dataset::open(&place.out(), Split::Train, false).err().unwrap();
    assert!(matches!(error, DatasetError::File { .. }) && error.hint().is_some(), "{error}");
}

#[test]
fn another_tokenizer_is_refused_with_both_hashes() {
    let place = place_of_sixty();
    let manifest = place.prepare().unwrap().manifest;
    let path = place.out().join(TOKENIZER_FILE);
    let mut json = fs::read(&path).unwrap();
    json.push(b'\n');
    fs::write(&path, &json).unwrap();
    let message = load_tokenizer(&place.out(), &manifest).err().unwrap().to_string();
    assert!(message.contains(&manifest.tokenizer.blake3.to_string()), "{message}");
    assert!(message.contains(&ContentHash::of(&json).to_string()), "{message}");
}

/// Writes changed shard bytes together with a manifest that fits them: what only reading the tokens can find.
fn forge(place: &Place, change: impl Fn(&mut Manifest, &mut Vec<u8>, &mut Vec<u8>)) {
    let mut manifest = Manifest::read(&place.out()).unwrap();
    let shard = manifest.train.shards[0].clone();
    let paths = [&shard.token_file, &shard.document_file].map(|file| place.out().join(&file.name));
    let [mut tokens, mut starts] = paths.clone().map(|path| fs::read(path).unwrap());
    change(&mut manifest, &mut tokens, &mut starts);
    manifest.train.shards[0].token_file.blake3 = ContentHash::of(&tokens);
    manifest.train.shards[0].document_file.blake3 = ContentHash::of(&starts);
    fs::write(&paths[0], tokens).unwrap();
    fs::write(&paths[1], starts).unwrap();
    fs::write(place.out().join(MANIFEST_FILE), manifest.to_json()).unwrap();
}

#[test]
fn content_that_contradicts_a_fitting_manifest_is_refused() {
    let place = place_of_sixty();
    place.prepare().unwrap();
    forge(&place, |_, tokens, _| tokens[32 + 2 * 5..][..2].copy_from_slice(&300u16.to_le_bytes()));
    let message = Dataset::open(&place.out(), Split::Train, true).err().unwrap().to_string();
    assert!(message.contains("token 300 at position 5 is outside the vocabulary of 300"), "{message}");
    let unverified = Dataset::open(&place.out(), Split::Train, false).unwrap();
    assert!(BigramModel::fit_dataset(&unverified).is_err());
    forge(&place, |_, tokens, starts| {
        tokens[32 + 2 * 5..][..2].copy_from_slice(&[1, 0]);
        starts.copy_within(32 + 16..32 + 24, 32 + 8);
    });
    let message = Dataset::open(&place.out(), Split::Train, true).err().unwrap().to_string();
    assert!(message.contains("document starts do not ascend"), "{message}");
}

#[test]
fn hostile_manifests_are_refused() {
    let place = place_of_sixty();
    let good = place.prepare().unwrap().manifest;
    let refused = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = good.clone();
        change(&mut manifest);
        match Manifest::parse(&manifest.to_json()) {
            Err(DatasetError::Manifest(reason)) => reason,
            other => panic!("accepted: {other:?}"),
        }
    };
    for name in ["../../etc/passwd", "/etc/passwd", ".hidden", "", "a\\b", MANIFEST_FILE, TOKENIZER_FILE] {
        refused(&|manifest| manifest.train.shards[0].token_file.name = name.to_owned());
    }
    refused(&|manifest| manifest.train.shards[0].tokens = u64::MAX / 2);
    refused(&|manifest| manifest.train.shards[0].token_file.bytes += 2);
    refused(&|manifest| manifest.train.tokens += 1);
    refused(&|manifest| manifest.token_width_bytes = 3);
    refused(&|manifest| manifest.end_of_text = 300);
    refused(&|manifest| manifest.format = 2);
    let json = String::from_utf8(good.to_json()).unwrap();
    assert!(Manifest::parse(json.replacen("\"format\"", "\"farmat\"", 1).as_bytes()).is_err());
    assert!(Manifest::parse(&json.as_bytes()[..json.len() / 2]).is_err());
}

#[test]
fn large_vocabularies_take_four_bytes() {
    let place = Place::new(&[]);
    let lines: String = (0..70_000).step_by(7).map(|i| format!("{{\"text\": \"w{i} w{}\"}}\n", i + 1)).collect();
    fs::write(place.texts().join("words.jsonl"), lines).unwrap();
    let vocabulary: serde_json::Map<_, _> = (0..70_010).map(|i| (format!("w{i}"), i.into())).collect();
    let end = serde_json::json!({ "id": 70_010, "content": "</s>", "single_word": false, "lstrip": false,
                                  "rstrip": false, "normalized": false, "special": true });
    let json = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [end], "pre_tokenizer": { "type": "Whitespace" }, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "w0" },
    });
    let tokenizer = place.folder.path().join("words.json");
    fs::write(&tokenizer, json.to_string()).unwrap();
    let corpus = Corpus::folder(&place.texts()).unwrap();
    let source = TokenizerSource::Load(tokenizer);
    let prepared = prepare(&corpus, &source, &place.out(), &PrepareOptions::default(), &mut |_| {}).unwrap();
    assert_eq!((prepared.manifest.token_width_bytes, prepared.manifest.vocabulary_size), (4, 70_011));
    let dataset = Dataset::open(&place.out(), Split::Train, true).unwrap();
    let tokens: Vec<u32> = dataset.iter(0..dataset.tokens()).collect();
    assert!(tokens.chunks(3).all(|document| document[1] == document[0] + 1 && document[2] == 70_010));
    assert!(tokens.iter().any(|token| (65_536..70_010).contains(token)));
}

#[test]
fn validation_samples_are_spread_and_shared_with_the_bigram() {
    let place = place_of_sixty();
    place.prepare_with(300, &PrepareOptions { validation_fraction: 0.4, ..SMALL_SHARDS }).unwrap();
    let validation = Dataset::open(&place.out(), Split::Validation, true).unwrap();
    let train = Dataset::open(&place.out(), Split::Train, true).unwrap();
    let tokenizer = train.tokenizer(&place.out()).unwrap();
    let set = ValidationSet::select(&validation, &tokenizer, 16, 5).unwrap();
    let available = validation.samples(16);
    assert!(available > 10, "{available}");
    let expected: Vec<Vec<u32>> = (0..5)
        .map(|position| validation.iter(position * available / 5 * 16..position * available / 5 * 16 + 17).collect())
        .collect();
    assert_eq!(set.samples, expected);
    let bytes: usize = expected.iter().flat_map(|sample| &sample[1..]).map(|token| tokenizer.token_bytes(*token)).sum();
    assert_eq!((set.bytes, set.predicted_tokens()), (bytes as u64, 80));
    let batches: Vec<_> = set.batches(2).collect();
    assert_eq!(batches.iter().map(|batch| batch.samples).collect::<Vec<_>>(), [2, 2, 1]);
    assert_eq!(batches.iter().flat_map(|batch| batch.tokens.clone()).collect::<Vec<_>>(), expected.concat());
    let all = ValidationSet::select(&validation, &tokenizer, 16, usize::MAX).unwrap();
    assert_eq!(all.samples.len() as u64, available);

    let score = BigramModel::fit_dataset(&train).unwrap().score(&set).unwrap();
    let untrained = BigramModel::fit(300, [[0u32; 0]]).unwrap().score(&set).unwrap();
    // Without training every token costs ln V; what was trained on resembles what is held out.
    assert!((untrained.nats - 80.0 * 300f64.ln()).abs() < 1e-9, "{untrained:?}");
    assert!(score.nats < 0.5 * untrained.nats, "{score:?}");
    assert!((score.bits_per_byte - score.nats / std::f64::consts::LN_2 / bytes as f64).abs() < 1e-12);
}
