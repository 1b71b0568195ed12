//! The same thirty operations on any two engines: do they compute the same numbers?
//!
//! Loss curves show a wrong operation after days; these show it in a second, before any compute is spent. An
//! [`Operation`] has a name, inputs made from a fixed seed, and a bound for the distance of two engines' results. Ids are
//! given as f32, which holds them exactly. [`reference`] computes each in f64, plainly, from its definition.

use base::HostTensor;
use base::random::Random;

/// Seed of all inputs: the same on every machine.
const SEED: u64 = 0x0BE7_1269;

/// Added to the mean square in `rms_norm`.
pub const RMS_NORM_EPSILON: f64 = 1e-5;

/// Base of the frequencies in `rotary`.
pub const ROTARY_THETA: f64 = 10_000.0;

/// One operation with its inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Operation {
    /// What to compute, see [`operations`].
    pub name: &'static str,
    /// Inputs, row-major.
    pub inputs: Vec<HostTensor>,
    /// Largest ‖a − b‖ / ‖b‖ of two engines' results in f32.
    pub bound: f64,
}

/// Rounding of one correctly rounded f32 operation is at most 6e-8 of the result; two engines may differ by twice that.
const EXACT: f64 = 1.2e-7;
/// Elementary functions: a few units in the last place, more where a maker trades them for speed.
const FUNCTION: f64 = 1e-6;
/// Trigonometric and hyperbolic functions: WGSL and CUDA's fast paths promise an absolute error only.
const FAST_FUNCTION: f64 = 1e-5;
/// Sums of up to 4,096 products in any order: √4096 · 6e-8 = 4e-6, and room for blocked orders.
const SUM: f64 = 1e-5;

/// Thirty operations that a Llama and its optimiser are made of, with small inputs.
///
/// Shapes: `[r, c]` = `[64, 256]` unless the list below says otherwise. `matmul` is a·b, `matmul_transposed` is a·bᵀ,
/// `rotary` turns the pairs (i, i + d/2) of `[t, d]` by t·θ^(−2i/d), `causal_attention` takes q, k, v `[heads, t, d]` and
/// divides scores by √d, `cross_entropy` is the sum over rows in nats, `round_to_bf16` rounds to nearest even and back.
pub fn operations() -> Vec<Operation> {
    let mut maker = Maker { random: Random::new(SEED, 0), made: Vec::new() };
    let rows = &[64, 256][..];
    for name in ["add", "subtract", "multiply", "maximum"] {
        let inputs = vec![maker.normal(rows), maker.normal(rows)];
        maker.push(name, inputs, EXACT);
    }
    let inputs = vec![maker.normal(rows), maker.positive(rows)];
    maker.push("divide", inputs, FUNCTION);
    for (name, bound) in [
        ("square", EXACT),
        ("round_to_bf16", EXACT),
        ("exp", FUNCTION),
        ("sigmoid", FUNCTION),
        ("silu", FUNCTION),
        ("tanh", FAST_FUNCTION),
        ("sine", FAST_FUNCTION),
        ("cosine", FAST_FUNCTION),
        ("sum_rows", SUM),
        ("mean_columns", SUM),
        ("max_rows", EXACT),
        ("softmax", FUNCTION),
        ("log_softmax", FUNCTION),
    ] {
        let inputs = vec![maker.normal(rows)];
        maker.push(name, inputs, bound);
    }
    for name in ["log", "sqrt", "reciprocal_sqrt"] {
        let inputs = vec![maker.positive(rows)];
        maker.push(name, inputs, FUNCTION);
    }
    let inputs = vec![maker.normal(rows), maker.ids(64, 256)];
    maker.push("cross_entropy", inputs, FUNCTION);
    let inputs = vec![maker.normal(&[50, 32]), maker.ids(40, 50)];
    maker.push("embedding", inputs, EXACT);
    let inputs = vec![maker.normal(rows), maker.positive(&[256])];
    maker.push("rms_norm", inputs, FUNCTION);
    let inputs = vec![maker.normal(&[48, 32])];
    maker.push("rotary", inputs, FAST_FUNCTION);
    let inputs = vec![maker.normal(&[2, 32, 16]), maker.normal(&[2, 32, 16]), maker.normal(&[2, 32, 16])];
    maker.push("causal_attention", inputs, SUM);
    for (name, left, right) in [
        ("matmul", &[64, 128][..], &[128, 96][..]),
        ("matmul_transposed", &[64, 128], &[96, 128]),
        ("matmul_long", &[8, 4096], &[4096, 8]),
        ("batched_matmul", &[4, 32, 48], &[4, 48, 24]),
    ] {
        let inputs = vec![maker.normal(left), maker.normal(right)];
        maker.push(name, inputs, SUM);
    }
    maker.made
}

struct Maker {
    random: Random,
    made: Vec<Operation>,
}

impl Maker {
    fn push(&mut self, name: &'static str, inputs: Vec<HostTensor>, bound: f64) {
        self.made.push(Operation { name, inputs, bound });
    }

    fn tensor(&mut self, shape: &[usize], mut value: impl FnMut(&mut Random) -> f32) -> HostTensor {
        let values = (0..shape.iter().product()).map(|_| value(&mut self.random)).collect();
        HostTensor { shape: shape.to_vec(), values }
    }

    fn normal(&mut self, shape: &[usize]) -> HostTensor {
        self.tensor(shape, Random::next_normal)
    }

    /// Uniform in 0.5 to 2.
    fn positive(&mut self, shape: &[usize]) -> HostTensor {
        self.tensor(shape, |random| (0.5 + 1.5 * random.next_unit()) as f32)
    }

    fn ids(&mut self, length: usize, below: u64) -> HostTensor {
        self.tensor(&[length], |random| random.next_below(below) as f32)
    }
}

/// The result of an operation, computed in f64 from its definition and rounded once; empty for an unknown name.
pub fn reference(operation: &Operation) -> Vec<f32> {
    let input = |index: usize| Wide::of(&operation.inputs[index]);
    let map = |f: &dyn Fn(f64) -> f64| input(0).values.iter().map(|x| f(*x)).collect::<Vec<f64>>();
    let zip = |f: &dyn Fn(f64, f64) -> f64| {
        input(0).values.iter().zip(&input(1).values).map(|(a, b)| f(*a, *b)).collect::<Vec<f64>>()
    };
    let by_row = |f: &dyn Fn(&[f64]) -> Vec<f64>| input(0).rows().flat_map(f).collect::<Vec<f64>>();
    let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
    let result = match operation.name {
        "add" => zip(&|a, b| a + b),
        "subtract" => zip(&|a, b| a - b),
        "multiply" => zip(&|a, b| a * b),
        "maximum" => zip(&f64::max),
        "divide" => zip(&|a, b| a / b),
        "square" => map(&|x| x * x),
        "round_to_bf16" => map(&round_to_bf16),
        "exp" => map(&libm::exp),
        "sigmoid" => map(&sigmoid),
        "silu" => map(&|x| x * sigmoid(x)),
        "tanh" => map(&libm::tanh),
        "sine" => map(&libm::sin),
        "cosine" => map(&libm::cos),
        "log" => map(&libm::log),
        "sqrt" => map(&f64::sqrt),
        "reciprocal_sqrt" => map(&|x| 1.0 / x.sqrt()),
        "sum_rows" => by_row(&|row| vec![row.iter().sum()]),
        "max_rows" => by_row(&|row| vec![row.iter().copied().fold(f64::NEG_INFINITY, f64::max)]),
        "mean_columns" => mean_columns(&input(0)),
        "softmax" => by_row(&|row| log_softmax(row).into_iter().map(libm::exp).collect()),
        "log_softmax" => by_row(&log_softmax),
        "cross_entropy" => {
            let ids = input(1);
            let of_row = |(row, id): (&[f64], &f64)| -log_softmax(row)[*id as usize];
            vec![input(0).rows().zip(&ids.values).map(of_row).sum()]
        }
        "embedding" => {
            let table = input(0);
            let rows: Vec<&[f64]> = table.rows().collect();
            input(1).values.iter().flat_map(|id| rows[*id as usize].to_vec()).collect()
        }
        "rms_norm" => {
            let weight = input(1);
            by_row(&|row| {
                let mean_square = row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64;
                let scale = 1.0 / (mean_square + RMS_NORM_EPSILON).sqrt();
                row.iter().zip(&weight.values).map(|(x, w)| x * scale * w).collect()
            })
        }
        "rotary" => rotary(&input(0)),
        "causal_attention" => causal_attention(&input(0), &input(1), &input(2)),
        "matmul" | "matmul_long" | "batched_matmul" => matmul(&input(0), &input(1)),
        "matmul_transposed" => matmul(&input(0), &input(1).transposed()),
        _ => Vec::new(),
    };
    result.into_iter().map(|value| value as f32).collect()
}

/// ‖a − b‖ / ‖b‖; infinite where lengths differ or a number is not finite.
pub fn relative_distance(a: &[f32], b: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    if a.len() != b.len() || a.iter().chain(b).any(|value| !value.is_finite()) {
        return f64::INFINITY;
    }
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut b.iter().map(|b| f64::from(*b))).max(f64::MIN_POSITIVE)
}

/// A tensor in f64.
struct Wide {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Wide {
    fn of(tensor: &HostTensor) -> Self {
        Self { shape: tensor.shape.clone(), values: tensor.values.iter().map(|value| f64::from(*value)).collect() }
    }

    fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.last())
    }

    /// Of a matrix.
    fn transposed(&self) -> Self {
        let (rows, columns) = (self.shape[0], self.shape[1]);
        let values = (0..columns).flat_map(|c| (0..rows).map(move |r| self.values[r * columns + c])).collect();
        Self { shape: vec![columns, rows], values }
    }
}

fn log_softmax(row: &[f64]) -> Vec<f64> {
    let highest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = row.iter().map(|x| libm::exp(x - highest)).sum();
    row.iter().map(|x| x - highest - libm::log(sum)).collect()
}

fn mean_columns(x: &Wide) -> Vec<f64> {
    let columns = x.last();
    let sum = |column: usize| x.rows().map(|row| row[column]).sum::<f64>();
    (0..columns).map(|column| sum(column) * columns as f64 / x.values.len() as f64).collect()
}

/// Batches of `[m, k]·[k, n]`; matrices are a batch of one.
fn matmul(a: &Wide, b: &Wide) -> Vec<f64> {
    let (k, n) = (a.last(), b.last());
    let m = a.shape[a.shape.len() - 2];
    let mut product = Vec::new();
    for (a, b) in a.values.chunks_exact(m * k).zip(b.values.chunks_exact(k * n)) {
        for row in a.chunks_exact(k) {
            product.extend((0..n).map(|column| (0..k).map(|i| row[i] * b[i * n + column]).sum::<f64>()));
        }
    }
    product
}

fn rotary(x: &Wide) -> Vec<f64> {
    let half = x.last() / 2;
    let turn = |(position, row): (usize, &[f64])| {
        let angle = |pair: usize| position as f64 * libm::pow(ROTARY_THETA, -2.0 * pair as f64 / (2 * half) as f64);
        let first = (0..half).map(|i| row[i] * libm::cos(angle(i)) - row[i + half] * libm::sin(angle(i)));
        let second = (0..half).map(|i| row[i + half] * libm::cos(angle(i)) + row[i] * libm::sin(angle(i)));
        first.chain(second).collect::<Vec<f64>>()
    };
    x.rows().enumerate().flat_map(turn).collect()
}

fn causal_attention(q: &Wide, k: &Wide, v: &Wide) -> Vec<f64> {
    let (positions, size) = (q.shape[1], q.shape[2]);
    let mut mixed = Vec::new();
    let heads = q.values.chunks_exact(positions * size).zip(k.values.chunks_exact(positions * size));
    for ((q, k), v) in heads.zip(v.values.chunks_exact(positions * size)) {
        for (position, query) in q.chunks_exact(size).enumerate() {
            let score = |key: &[f64]| query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>() / (size as f64).sqrt();
            let scores: Vec<f64> = k.chunks_exact(size).take(position + 1).map(score).collect();
            let weights = log_softmax(&scores);
            let weighted = |d: usize| weights.iter().enumerate().map(|(t, w)| libm::exp(*w) * v[t * size + d]).sum();
            mixed.extend((0..size).map(weighted).collect::<Vec<f64>>());
        }
    }
    mixed
}

fn round_to_bf16(value: f64) -> f64 {
    // The operand is an f32: half a unit of bf16 less one, plus the last bit kept, makes ties go to even.
    let bits = (value as f32).to_bits();
    f64::from(f32::from_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF_0000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn thirty_operations_have_a_reference_and_the_same_inputs_each_time() {
        let made = operations();
        assert_eq!(made.len(), 30);
        assert_eq!(made.iter().map(|operation| operation.name).collect::<BTreeSet<_>>().len(), 30);
        assert_eq!(made, operations());
        for operation in &made {
            let result = reference(operation);
            assert!(!result.is_empty() && result.iter().all(|value| value.is_finite()), "{}", operation.name);
        }
    }

    #[test]
    fn reference_by_hand() {
        let tensor = |shape: &[usize], values: &[f32]| HostTensor { shape: shape.to_vec(), values: values.to_vec() };
        let run = |name, inputs| reference(&Operation { name, inputs, bound: 0.0 });
        let matrix = tensor(&[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        assert_eq!(run("matmul", vec![matrix.clone(), tensor(&[2, 1], &[5.0, 6.0])]), [17.0, 39.0]);
        assert_eq!(run("matmul_transposed", vec![matrix.clone(), tensor(&[1, 2], &[5.0, 6.0])]), [17.0, 39.0]);
        assert_eq!(run("mean_columns", vec![matrix.clone()]), [2.0, 3.0]);
        assert_eq!(run("sum_rows", vec![matrix.clone()]), [3.0, 7.0]);
        assert_eq!(run("embedding", vec![matrix, tensor(&[2], &[1.0, 0.0])]), [3.0, 4.0, 1.0, 2.0]);
        // 1 + 2^-8 lies half-way between two bf16 numbers: the even one is 1; 1 + 3·2^-8 goes up to 1 + 2^-6.
        let ties = tensor(&[2], &[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]);
        assert_eq!(run("round_to_bf16", vec![ties]), [1.0, 1.0 + 1.0 / 64.0]);
        // One position attends to itself only.
        let one = tensor(&[1, 1, 2], &[7.0, 8.0]);
        assert_eq!(run("causal_attention", vec![one.clone(), one.clone(), one]), [7.0, 8.0]);
    }
}
