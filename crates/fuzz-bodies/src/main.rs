//! Writes the corpora of every target: `cargo run -p fuzz-bodies`. Findings, whose names begin with `found-`, stay.
#![allow(clippy::print_stdout, reason = "a command says what it did")]

use fuzz_bodies::TARGETS;
use std::fs;
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let mut bytes = 0;
    for target in TARGETS {
        let folder = corpus.join(target.name);
        fs::create_dir_all(&folder)?;
        for (name, input) in (target.seeds)() {
            bytes += input.len();
            let file = if name.starts_with("found-") { name.to_owned() } else { format!("seed-{name}") };
            fs::write(folder.join(file), input)?;
        }
    }
    println!("{} targets, {bytes} bytes of seeds", TARGETS.len());
    Ok(())
}
