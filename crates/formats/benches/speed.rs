//! Speed of every format and codec on one core, against a plain copy of the same f32 input in the same run.
//!
//! ```text
//! cargo bench -p formats                   64 MiB of f32, 7 rounds
//! cargo bench -p formats -- --mib 1        resident in the cache
//! cargo bench -p formats -- --only rank    rows whose names hold that word
//! ```
//!
//! Each round times every row once, a copy before each, so that what else the machine does falls on both; printed are
//! medians over the rounds, the spread between the quartiles, and the median of the ratios. GB/s count the f32 side, and
//! the seconds are those that the thread had on its core.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use formats::element::{self, Bf16, E2m1, E2m3, E3m0, E3m2, E4m3, E5m2, Element, F16};
use formats::{CodecKind, LowRank, MatrixShape};
use formats::{Overflow, Rounding};
use rustix::time::{ClockId, clock_gettime};
use std::hint::black_box;
use std::rc::Rc;

const MIB_DEFAULT: usize = 64;
const ROUNDS_DEFAULT: usize = 7;

/// What is timed: a name, and one pass over the input.
struct Row {
    name: String,
    run: Box<dyn FnMut(&Buffers) -> f64>,
}

struct Buffers {
    input: Vec<f32>,
    /// Repetitions of a pass, so that a short one is timed too.
    repeats: usize,
}

fn main() {
    let (mut mib, mut rounds, mut only) = (MIB_DEFAULT, ROUNDS_DEFAULT, String::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        if flag == "--only" {
            only = arguments.next().unwrap_or_default();
            continue;
        }
        let mut number = || arguments.next().and_then(|text| text.parse().ok()).filter(|number| *number > 0);
        match flag.as_str() {
            "--mib" => mib = number().unwrap_or(mib),
            "--rounds" => rounds = number().unwrap_or(rounds),
            "--bench" => {}
            _ => {
                eprintln!("usage: cargo bench -p formats [-- --mib N --rounds N --only WORD]");
                std::process::exit(2);
            }
        }
    }
    measure(mib, rounds, &only);
}

fn measure(mib: usize, rounds: usize, only: &str) {
    let values = mib * (1 << 20) / 4;
    let buffers = Buffers { input: normal_values(values), repeats: MIB_DEFAULT.div_ceil(mib) };
    let mut rows = rows(values);
    rows.retain(|row| row.name.contains(only));
    let mut copy = copy_row(values);
    let mut copies = vec![Vec::new(); rows.len()];
    let mut times = vec![Vec::new(); rows.len()];
    // The first round touches every page and is not counted.
    for round in 0..=rounds {
        for (index, row) in rows.iter_mut().enumerate() {
            let copy_seconds = (copy.run)(&buffers);
            let seconds = (row.run)(&buffers);
            if round > 0 {
                copies[index].push(copy_seconds);
                times[index].push(seconds);
            }
        }
    }
    let gigabytes = (values * 4) as f64 / 1e9;
    let (copy_rate, copy_spread) = rate(&mut copies.concat(), gigabytes);
    println!("{mib} MiB of f32, one core, {rounds} rounds; a plain copy: {copy_rate:.2} GB/s ({copy_spread})\n");
    println!("| what | GB/s of f32 | quartiles | share of a copy |");
    println!("|---|---|---|---|");
    for ((row, times), copies) in rows.iter().zip(&mut times).zip(&copies) {
        let share = median(&mut copies.iter().zip(times.iter()).map(|(copy, time)| copy / time).collect::<Vec<_>>());
        let (rate, spread) = rate(times, gigabytes);
        println!("| {} | {rate:.2} | {spread} | {share:.2} |", row.name);
    }
}

fn rate(seconds: &mut [f64], gigabytes: f64) -> (f64, String) {
    let middle = gigabytes / median(seconds);
    let [slow, fast] = [seconds.len() * 3 / 4, seconds.len() / 4].map(|index| gigabytes / seconds[index]);
    (middle, format!("{slow:.2} to {fast:.2}"))
}

fn median(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// Seconds of one of `repeats` passes.
fn timed(repeats: usize, mut pass: impl FnMut()) -> f64 {
    let start = thread_seconds();
    for _ in 0..repeats {
        pass();
    }
    (thread_seconds() - start) / repeats as f64
}

/// Processor time of this thread: on a busy machine the time in which others ran does not count.
fn thread_seconds() -> f64 {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

fn copy_row(values: usize) -> Row {
    let mut target = vec![1.0_f32; values];
    let run = move |buffers: &Buffers| {
        timed(buffers.repeats, || black_box(&mut target).copy_from_slice(black_box(&buffers.input)))
    };
    Row { name: "copy".to_owned(), run: Box::new(run) }
}

fn rows(values: usize) -> Vec<Row> {
    let mut rows = Vec::new();
    element_rows::<E4m3>(values, &mut rows);
    element_rows::<E5m2>(values, &mut rows);
    element_rows::<E3m2>(values, &mut rows);
    element_rows::<E2m3>(values, &mut rows);
    element_rows::<E2m1>(values, &mut rows);
    element_rows::<E3m0>(values, &mut rows);
    element_rows::<Bf16>(values, &mut rows);
    element_rows::<F16>(values, &mut rows);
    for kind in CodecKind::ALL {
        codec_rows(kind, values, &mut rows);
        check_rows(kind, values, &mut rows);
    }
    low_rank_rows(values, &mut rows);
    rows
}

fn element_rows<E: Element>(values: usize, rows: &mut Vec<Row>)
where
    E::Code: Default,
{
    for (how, rounding) in
        [("nearest", Rounding::NearestEven), ("stochastic", Rounding::Stochastic { seed: 1, first: 0 })]
    {
        let mut codes = vec![E::Code::default(); values];
        rows.push(Row {
            name: format!("{} encode, {how}", E::NAME),
            run: Box::new(move |buffers| {
                timed(buffers.repeats, || {
                    element::encode::<E>(
                        black_box(&buffers.input),
                        black_box(&mut codes),
                        rounding,
                        Overflow::Saturate,
                    );
                })
            }),
        });
    }
    let mut codes = Vec::new();
    let mut decoded = vec![1.0; values];
    rows.push(Row {
        name: format!("{} decode", E::NAME),
        run: Box::new(move |buffers| {
            codes.resize(buffers.input.len(), E::Code::default());
            element::encode::<E>(&buffers.input, &mut codes, Rounding::NearestEven, Overflow::Saturate);
            timed(buffers.repeats, || element::decode::<E>(black_box(&codes), black_box(&mut decoded)))
        }),
    });
}

fn codec_rows(kind: CodecKind, values: usize, rows: &mut Vec<Row>) {
    let codec = kind.codec();
    let encoded = move |buffers: &Buffers| {
        let mut encoded = vec![0; codec.encoded_bytes(values)];
        codec.encode(&mut buffers.input.clone(), &mut encoded);
        encoded
    };
    let mut residual = Vec::new();
    let mut bytes = vec![1; codec.encoded_bytes(values)];
    rows.push(Row {
        name: format!("codec {kind}: encode and residual"),
        run: Box::new(move |buffers| {
            let mut seconds = 0.0;
            for _ in 0..buffers.repeats {
                residual.clone_from(&buffers.input); // Not timed: encoding leaves another input behind.
                seconds += timed(1, || codec.encode(black_box(&mut residual), black_box(&mut bytes)));
            }
            seconds / buffers.repeats as f64
        }),
    });
    let mut decoded = vec![1.0; values];
    rows.push(Row {
        name: format!("codec {kind}: decode"),
        run: Box::new(move |buffers| {
            let encoded = encoded(buffers);
            timed(buffers.repeats, || {
                codec.decode(black_box(&encoded), black_box(&mut decoded)).unwrap_or_else(|error| panic!("{error}"));
            })
        }),
    });
    let mut sum = vec![1.0; values];
    rows.push(Row {
        name: format!("codec {kind}: accumulate"),
        run: Box::new(move |buffers| {
            let encoded = encoded(buffers);
            timed(buffers.repeats, || {
                codec
                    .accumulate(black_box(&encoded), 0.25, black_box(&mut sum))
                    .unwrap_or_else(|error| panic!("{error}"));
            })
        }),
    });
}

/// What a merge does to each delta before it adds it: to check it, and to check it and take its norm, where long ones are clipped.
fn check_rows(kind: CodecKind, values: usize, rows: &mut Vec<Row>) {
    let codec = kind.codec();
    let encoded = move |buffers: &Buffers| {
        let mut encoded = vec![0; codec.encoded_bytes(values)];
        codec.encode(&mut buffers.input.clone(), &mut encoded);
        encoded
    };
    rows.push(Row {
        name: format!("codec {kind}: check"),
        run: Box::new(move |buffers| {
            let encoded = encoded(buffers);
            timed(buffers.repeats, || {
                codec.check(black_box(&encoded), values).unwrap_or_else(|error| panic!("{error}"))
            })
        }),
    });
    rows.push(Row {
        name: format!("codec {kind}: check and squared norm"),
        run: Box::new(move |buffers| {
            let encoded = encoded(buffers);
            timed(buffers.repeats, || {
                black_box(codec.squared_norm(black_box(&encoded), values).unwrap_or_else(|error| panic!("{error}")));
            })
        }),
    });
}

/// Low-rank coding, at rank 10, of the input cut into the matrices of a small transformer's layers.
fn low_rank_rows(values: usize, rows: &mut Vec<Row>) {
    let low_rank = Rc::new(LowRank::new(&layer_shapes(values), 10));
    let encoded = |low_rank: &LowRank, buffers: &Buffers| {
        let mut encoded = vec![0; low_rank.encoded_bytes()];
        low_rank.encode(&mut buffers.input.clone(), &mut low_rank.basis(1), &mut encoded);
        encoded
    };
    let mut residual = Vec::new();
    let (coding, mut basis, mut bytes) = (low_rank.clone(), low_rank.basis(1), vec![1; low_rank.encoded_bytes()]);
    rows.push(Row {
        name: "low rank, 10: encode and residual".to_owned(),
        run: Box::new(move |buffers| {
            let mut seconds = 0.0;
            for _ in 0..buffers.repeats {
                residual.clone_from(&buffers.input);
                seconds += timed(1, || coding.encode(black_box(&mut residual), &mut basis, black_box(&mut bytes)));
            }
            seconds / buffers.repeats as f64
        }),
    });
    let (coding, mut decoded) = (low_rank.clone(), vec![1.0; values]);
    rows.push(Row {
        name: "low rank, 10: decode".to_owned(),
        run: Box::new(move |buffers| {
            let encoded = encoded(&coding, buffers);
            timed(buffers.repeats, || {
                coding.decode(black_box(&encoded), black_box(&mut decoded)).unwrap_or_else(|error| panic!("{error}"));
            })
        }),
    });
    let coding = low_rank.clone();
    rows.push(Row {
        name: "low rank, 10: check".to_owned(),
        run: Box::new(move |buffers| {
            let encoded = encoded(&coding, buffers);
            timed(buffers.repeats, || coding.check(black_box(&encoded)).unwrap_or_else(|error| panic!("{error}")))
        }),
    });
    let coding = low_rank.clone();
    rows.push(Row {
        name: "low rank, 10: check and squared norm".to_owned(),
        run: Box::new(move |buffers| {
            let encoded = encoded(&coding, buffers);
            timed(buffers.repeats, || {
                black_box(coding.squared_norm(black_box(&encoded)).unwrap_or_else(|error| panic!("{error}")));
            })
        }),
    });
    let mut sum = vec![1.0; values];
    rows.push(Row {
        name: "low rank, 10: accumulate".to_owned(),
        run: Box::new(move |buffers| {
            let encoded = encoded(&low_rank, buffers);
            timed(buffers.repeats, || {
                low_rank
                    .accumulate(black_box(&encoded), 0.25, black_box(&mut sum))
                    .unwrap_or_else(|error| panic!("{error}"));
            })
        }),
    });
}

/// As many layers of width 256 as fit into `values`, and a vector of what is left.
fn layer_shapes(values: usize) -> Vec<MatrixShape> {
    let layer = [(768, 256), (256, 256), (1_408, 256), (256, 704)].map(|(rows, columns)| MatrixShape { rows, columns });
    let mut shapes = Vec::new();
    let mut left = values;
    for shape in layer.into_iter().cycle() {
        if shape.values() > left {
            break;
        }
        left -= shape.values();
        shapes.push(shape);
    }
    shapes.push(MatrixShape { rows: 1, columns: left });
    shapes
}

/// Sums of four uniform numbers: near enough to normal for timing, and quick to make.
fn normal_values(values: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_u32;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / 2_f32.powi(32) - 0.5
    };
    (0..values).map(|_| uniform() + uniform() + uniform() + uniform()).collect()
}
