//! Prepares a folder of text and reports sizes, speeds and the bigram baseline:
//! `cargo run --release -p data --example prepare -- FOLDER [VOCABULARY_SIZE]`. Without a folder: cargo's sources.

use data::{BigramModel, Corpus, Dataset, PrepareOptions, PrepareProgress, Split, TokenizerSource, ValidationSet};
use std::error::Error;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

/// Of cargo's sources, bytes.
const CARGO_BYTES_MAX: u64 = 24 << 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let corpus = match arguments.next() {
        Some(folder) => Corpus::folder(Path::new(&folder))?,
        None => Corpus::cargo_sources(CARGO_BYTES_MAX)?,
    };
    let vocabulary_size = arguments.next().map_or(Ok(4_096), |text| text.parse())?;
    let out = std::env::temp_dir().join(format!("prepare-{}", std::process::id()));
    let started = Instant::now();
    let mut encoding_started = None;
    let mut progress = |progress| {
        if let PrepareProgress::Tokenizer = progress {
            encoding_started = Some(Instant::now());
        }
    };
    let source = TokenizerSource::Train { vocabulary_size };
    let prepared = data::prepare(&corpus, &source, &out, &PrepareOptions::default(), &mut progress)?;
    let mut output = std::io::stdout().lock();
    writeln!(output, "{}", prepared.report.summary())?;
    let seconds = started.elapsed().as_secs_f64();
    let bytes = prepared.report.document_bytes as f64;
    writeln!(output, "with training a tokenizer: {seconds:.1} s, {:.1} MB/s", bytes / seconds / 1e6)?;
    encode_again(&corpus, &out, &mut output)?;
    baseline(&out, &mut output)?;
    std::fs::remove_dir_all(&out)?;
    Ok(())
}

/// The same with the tokenizer at hand: what encoding alone takes.
fn encode_again(corpus: &Corpus, out: &Path, output: &mut impl Write) -> Result<(), Box<dyn Error>> {
    let again = out.with_extension("again");
    let source = TokenizerSource::Load(out.join(data::manifest::TOKENIZER_FILE));
    let started = Instant::now();
    let prepared = data::prepare(corpus, &source, &again, &PrepareOptions::default(), &mut |_| {})?;
    let seconds = started.elapsed().as_secs_f64();
    let bytes = prepared.report.document_bytes as f64;
    writeln!(output, "encoding alone: {seconds:.1} s, {:.1} MB/s", bytes / seconds / 1e6)?;
    for (name, split) in [("train", &prepared.manifest.train), ("validation", &prepared.manifest.validation)] {
        let ratio = split.bytes as f64 / split.tokens as f64;
        writeln!(output, "{name}: {} documents, {} tokens, {ratio:.2} bytes/token", split.documents, split.tokens)?;
    }
    std::fs::remove_dir_all(&again)?;
    Ok(())
}

fn baseline(out: &Path, output: &mut impl Write) -> Result<(), Box<dyn Error>> {
    let train = Dataset::open(out, Split::Train, true)?;
    let validation = Dataset::open(out, Split::Validation, true)?;
    let set = ValidationSet::select(&validation, &train.tokenizer(out)?, 256, usize::MAX)?;
    let started = Instant::now();
    let model = BigramModel::fit_dataset(&train)?;
    let (pairs, distinct) = (model.pairs(), model.distinct_pairs());
    let seconds = started.elapsed().as_secs_f64();
    writeln!(output, "bigram: {pairs} pairs, {distinct} distinct, fitted in {seconds:.2} s")?;
    let score = model.score(&set)?;
    writeln!(output, "bigram: {:.4} bits/byte over {} tokens", score.bits_per_byte, score.tokens)?;
    Ok(())
}
