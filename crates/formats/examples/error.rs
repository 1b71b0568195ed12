//! What each codec loses, and what other uses of the same bits would: the figures of docs/formats.md.
//!
//! ```text
//! cargo run --release -p formats --example error
//! ```
//!
//! Relative squared error, `sum (value - decoded)^2 / sum value^2`, on 2^22 draws each of a Gaussian, a Laplacian and
//! Student's t with 3 degrees of freedom, whose tail is heavy. The second table is of sparse coding alone: indices and
//! levels computed here, from sorted magnitudes, for formats that are not built.
#![allow(clippy::print_stdout)]

use formats::CodecKind;

const VALUES: usize = 1 << 22;
const BLOCK_VALUES: usize = 4_096;

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

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn laplace(&mut self) -> f64 {
        let sign = if self.uniform() < 0.5 { -1.0 } else { 1.0 };
        -sign * self.uniform().ln()
    }

    /// A normal over the root of a third of the sum of three squared ones.
    fn student(&mut self) -> f64 {
        let chi_squared: f64 = (0..3).map(|_| self.normal().powi(2)).sum();
        self.normal() / (chi_squared / 3.0).sqrt()
    }
}

type Draw = fn(&mut Random) -> f64;
const DISTRIBUTIONS: [(&str, Draw); 3] =
    [("Gaussian", Random::normal), ("Laplacian", Random::laplace), ("Student's t, 3", Random::student)];

fn energy(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum()
}

fn codec_error(kind: CodecKind, values: &[f32]) -> f64 {
    let codec = kind.codec();
    let mut residual = values.to_vec();
    codec.encode(&mut residual, &mut vec![0; codec.encoded_bytes(values.len())]);
    energy(&residual) / energy(values)
}

/// How a sparse format gives its kept magnitudes, largest first, their values.
#[derive(Clone, Copy)]
enum Levels {
    /// Unrounded: what the choice of entries alone loses.
    Exact,
    /// One level, the mean.
    One,
    /// The means of the smaller and of the larger half.
    Halves,
    /// The best two.
    BestTwo,
}

fn squared_error(magnitudes: &[f64]) -> f64 {
    let mean = magnitudes.iter().sum::<f64>() / magnitudes.len() as f64;
    magnitudes.iter().map(|magnitude| (magnitude - mean).powi(2)).sum()
}

fn level_error(magnitudes: &[f64], levels: Levels) -> f64 {
    let cut = |at: usize| squared_error(&magnitudes[..at]) + squared_error(&magnitudes[at..]);
    match levels {
        Levels::Exact => 0.0,
        Levels::One => squared_error(magnitudes),
        Levels::Halves => cut(magnitudes.len() / 2),
        Levels::BestTwo => (1..magnitudes.len()).map(cut).fold(f64::INFINITY, f64::min),
    }
}

fn sparse_error(kept: usize, levels: Levels, values: &[f32]) -> f64 {
    let mut lost = 0.0;
    for block in values.chunks(BLOCK_VALUES) {
        let mut magnitudes: Vec<f64> = block.iter().map(|value| f64::from(value.abs())).collect();
        magnitudes.sort_by(|a, b| b.total_cmp(a));
        let dropped: f64 = magnitudes[kept..].iter().map(|magnitude| magnitude * magnitude).sum();
        lost += dropped + level_error(&magnitudes[..kept], levels);
    }
    lost / energy(values)
}

fn main() {
    let draws = DISTRIBUTIONS.map(|(_, draw)| {
        let mut random = Random(1);
        (0..VALUES).map(|_| draw(&mut random) as f32).collect::<Vec<f32>>()
    });
    println!("| codec | bits a value | {} | {} | {} |", DISTRIBUTIONS[0].0, DISTRIBUTIONS[1].0, DISTRIBUTIONS[2].0);
    println!("|---|---|---|---|---|");
    for kind in CodecKind::ALL {
        let bits = kind.codec().encoded_bytes(VALUES) as f64 * 8.0 / VALUES as f64;
        let [gaussian, laplacian, student] = [0, 1, 2].map(|index| codec_error(kind, &draws[index]));
        println!("| {kind} | {bits:.4} | {gaussian:.3e} | {laplacian:.3e} | {student:.3e} |");
    }
    let rows = [
        ("64, exact values", 64, Levels::Exact),
        ("64, sign and one level", 64, Levels::One),
        ("64, levels of the halves", 64, Levels::Halves),
        ("64, the best two levels", 64, Levels::BestTwo),
        ("96, the best two levels", 96, Levels::BestTwo),
        ("112, sign and one level", 112, Levels::One),
    ];
    println!("\n| kept of 4,096 | {} | {} | {} |", DISTRIBUTIONS[0].0, DISTRIBUTIONS[1].0, DISTRIBUTIONS[2].0);
    println!("|---|---|---|---|");
    for (name, kept, levels) in rows {
        let [gaussian, laplacian, student] = [0, 1, 2].map(|index| sparse_error(kept, levels, &draws[index]));
        println!("| {name} | {gaussian:.4} | {laplacian:.4} | {student:.4} |");
    }
}
