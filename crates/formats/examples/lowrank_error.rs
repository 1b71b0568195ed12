//! What low-rank coding loses, by rank and by the codec of the factors: the figures of docs/formats.md.
//!
//! ```text
//! cargo run --release -p formats --example lowrank_error                      synthetic matrices of 256 x 704
//! cargo run --release -p formats --example lowrank_error -- SHAPES DELTA...   deltas of a model, one after another
//! ```
//!
//! SHAPES is a text file with "rows columns" on each line, in the order of the tensors; each DELTA is a file of that many
//! little-endian f32. Relative squared error, `sum (value - decoded)^2 / sum value^2`. "With the residual" codes delta plus what
//! the encoding before left, and relates the error to that sum.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use formats::{CodecKind, LowRank, MatrixShape};

const SYNTHETIC: MatrixShape = MatrixShape { rows: 256, columns: 704 };
const ENCODINGS: usize = 6;

/// Rank and codec of the factors. Rows of about the same bytes stand together.
const CODINGS: [(usize, CodecKind); 7] = [
    (10, CodecKind::Mxfp4),
    (10, CodecKind::E3m0),
    (5, CodecKind::Int8),
    (20, CodecKind::Mxfp4),
    (10, CodecKind::Int8),
    (5, CodecKind::Mxfp4),
    (10, CodecKind::F32),
];

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((shapes, deltas)) = arguments.split_first() else {
        synthetic("singular values 0.8^k, noise a tenth of the energy", 0.8, 0.1);
        synthetic("singular values 0.9^k, noise a tenth of the energy", 0.9, 0.1);
        synthetic("singular values 0.8^k, noise half of the energy", 0.8, 0.5);
        return;
    };
    let shapes: Vec<MatrixShape> = read_text(shapes).lines().map(shape_of).collect();
    let deltas: Vec<Vec<f32>> = deltas.iter().map(|path| read_values(path)).collect();
    table("deltas", &shapes, &deltas);
}

fn read_text(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn shape_of(line: &str) -> MatrixShape {
    let mut numbers = line.split_whitespace().map_while(|word| word.parse().ok());
    match (numbers.next(), numbers.next()) {
        (Some(rows), Some(columns)) => MatrixShape { rows, columns },
        _ => panic!("{line:?} is not \"rows columns\""),
    }
}

fn read_values(path: &str) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// A sum of 64 random outer products whose sizes fall by `decay`, and with each delta other noise: the share `noise` of
/// all energy.
fn synthetic(name: &str, decay: f32, noise: f32) {
    let MatrixShape { rows, columns } = SYNTHETIC;
    let mut random = Random(1);
    let mut values = vec![0.0; SYNTHETIC.values()];
    for k in 0..64 {
        let left: Vec<f32> = (0..rows).map(|_| random.normal()).collect();
        let right: Vec<f32> = (0..columns).map(|_| random.normal()).collect();
        for (row, left) in values.chunks_mut(columns).zip(&left) {
            row.iter_mut().zip(&right).for_each(|(value, right)| *value += decay.powi(k) * left * right);
        }
    }
    let size = (energy(&values) / values.len() as f64 * f64::from(noise / (1.0 - noise))).sqrt() as f32;
    let mut noisy = || values.iter().map(|value| value + size * random.normal()).collect();
    let deltas: Vec<Vec<f32>> = (0..ENCODINGS).map(|_| noisy()).collect();
    table(name, &[SYNTHETIC], &deltas);
}

fn table(name: &str, shapes: &[MatrixShape], deltas: &[Vec<f32>]) {
    println!(
        "\n{name}\n| rank, factors | bits a value | first | last | last, with the residual |\n|---|---|---|---|---|"
    );
    for (rank, codec) in CODINGS {
        let low_rank = LowRank::with_factors(shapes, rank, codec);
        let bits = low_rank.encoded_bytes() as f64 * 8.0 / low_rank.values() as f64;
        let plain = errors(&low_rank, deltas, 0.0);
        let kept = errors(&low_rank, deltas, 1.0);
        let [first, last, with_residual] =
            [plain.first(), plain.last(), kept.last()].map(|error| error.copied().unwrap_or(0.0));
        println!("| {rank}, {codec} | {bits:.3} | {first:.3} | {last:.3} | {with_residual:.3} |");
    }
}

/// The error of each delta's encoding, `keep` times the residual before added to each.
fn errors(low_rank: &LowRank, deltas: &[Vec<f32>], keep: f32) -> Vec<f64> {
    let mut basis = low_rank.basis(1);
    let mut encoded = vec![0; low_rank.encoded_bytes()];
    let mut residual = vec![0.0; low_rank.values()];
    let mut errors = Vec::new();
    for delta in deltas {
        residual.iter_mut().zip(delta).for_each(|(residual, delta)| *residual = *residual * keep + delta);
        let before = energy(&residual);
        low_rank.encode(&mut residual, &mut basis, &mut encoded);
        errors.push(energy(&residual) / before);
    }
    errors
}

fn energy(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum()
}

/// SplitMix64.
struct Random(u64);

impl Random {
    /// In (0, 1).
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 12) as f64 / 2_f64.powi(52) + 2_f64.powi(-53)
    }

    fn normal(&mut self) -> f32 {
        ((-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }
}
