//! Bit for bit what PyPI's `ml_dtypes` computes, by `python/formats_golden.py`: codes of every bf16 number and of ten
//! million f32 numbers, values of every code, MX blocks, and DeepSeek's tiles.
//!
//! Needs Python with ml_dtypes and numpy (`BERINGIA_PYTHON`, else `python3`). Where they are missing the tests say so on
//! stderr and pass; in CI they fail.
#![allow(clippy::unwrap_used, clippy::print_stderr)] // Helpers of tests may panic and print, as the tests do.

use formats::element::{self, Bf16, Code, E2m1, E2m3, E3m2, E4m3, E5m2, Element, F16};
use formats::mx::{MX_BLOCK_VALUES, MxFormat, ScaleRounding};
use formats::scale::ue8m0_value;
use formats::tile::{TileScale, TileShape};
use formats::{Overflow, Rounding, bits};
use std::io::{Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};

/// Random numbers to encode, beside all of bf16.
const VALUES: usize = 10_000_000;

/// As in the script.
const PART_VALUES: usize = 1 << 20;

fn python() -> PathBuf {
    std::env::var_os("BERINGIA_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from)
}

/// Whether Python has what the script needs. Where it has not, the test is left out, and says so; in CI it fails.
fn has_ml_dtypes() -> bool {
    let program = python();
    let import = Command::new(&program).args(["-c", "import ml_dtypes, numpy"]).stderr(Stdio::null()).status();
    let found = import.is_ok_and(|status| status.success());
    let missing = format!("{} has no ml_dtypes: pip install ml_dtypes numpy", program.display());
    assert!(found || std::env::var_os("CI").is_none(), "{missing}");
    if !found {
        eprintln!("left out: {missing}");
    }
    found
}

/// Runs the script with `input` on its stdin, while `check` reads what it answers, to the end.
fn with_golden(arguments: &[&str], input: &[f32], check: impl FnOnce(&mut Golden)) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../python/formats_golden.py");
    let mut command = Command::new(python());
    command.arg(script).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let stdout = child.stdout.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for part in input.chunks(PART_VALUES) {
                let bytes: Vec<u8> = part.iter().flat_map(|value| value.to_le_bytes()).collect();
                if stdin.write_all(&bytes).is_err() {
                    return; // The script has ended; why, its status tells.
                }
            }
        });
        // Closed when `check` fails, so that the script and then the thread above end too.
        let mut golden = Golden(stdout);
        check(&mut golden);
        assert_eq!(golden.0.read_to_end(&mut Vec::new()).unwrap(), 0, "the script answers no more than was asked");
    });
    assert!(child.wait().unwrap().success());
}

struct Golden(ChildStdout);

impl Golden {
    fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn f32s(&mut self, length: usize) -> Vec<f32> {
        self.bytes(length * 4).as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    }

    fn codes<E: Element>(&mut self, length: usize) -> Vec<u32> {
        match size_of::<E::Code>() {
            1 => self.bytes(length).into_iter().map(u32::from).collect(),
            _ => self.bytes(length * 2).as_chunks().0.iter().map(|code| u16::from_le_bytes(*code).into()).collect(),
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A third each: any bits at all, infinities, NaN and subnormal numbers included; numbers within the formats' ranges;
    /// and the middle between two codes of some format, or the f32 beside it.
    fn value(&mut self) -> f32 {
        let random = self.next();
        let bits = random as u32;
        // 2^-27 to 2^20: from below f16's and E5M2's smallest subnormal to above their largest.
        let within = bits & 0x807f_ffff | (100 + (random >> 32) as u32 % 48) << 23;
        match random >> 48 & 3 {
            0 => f32::from_bits(bits),
            1 => f32::from_bits(within),
            _ => {
                let kept = u32::MAX << (12 + (random >> 50) as u32 % 12);
                let beside = (random >> 56) as u32 % 3;
                f32::from_bits((within & kept).wrapping_add(beside).wrapping_sub(1))
            }
        }
    }
}

fn all_bf16_and_random() -> Vec<f32> {
    let mut random = Random(4);
    let all = (0..=u16::MAX).map(|bits| f32::from_bits(u32::from(bits) << 16));
    all.chain((0..VALUES).map(|_| random.value())).collect()
}

fn check_codes<E: Element<Code: Default>>(values: &[f32], golden: &mut Golden) {
    let mut codes = vec![E::Code::default(); values.len()];
    element::encode::<E>(values, &mut codes, Rounding::NearestEven, Overflow::Special);
    for ((value, code), wanted) in values.iter().zip(codes).zip(golden.codes::<E>(values.len())) {
        let code = code.bits();
        // Which NaN a binary16 is depends on NumPy's build; that it is one does not.
        let both_nan =
            E::NAME == F16::NAME && value.is_nan() && [code, wanted].iter().all(|code| code & 0x7fff > 0x7c00);
        assert!(
            code == wanted || both_nan,
            "{}: {value:e} ({:#x}): {code:#x}, not {wanted:#x}",
            E::NAME,
            value.to_bits()
        );
    }
}

#[test]
fn codes_equal_those_of_ml_dtypes() {
    if !has_ml_dtypes() {
        return;
    }
    let values = all_bf16_and_random();
    with_golden(&["encode"], &values, |golden| {
        for part in values.chunks(PART_VALUES) {
            check_codes::<E4m3>(part, golden);
            check_codes::<E5m2>(part, golden);
            check_codes::<E3m2>(part, golden);
            check_codes::<E2m3>(part, golden);
            check_codes::<E2m1>(part, golden);
            check_codes::<Bf16>(part, golden);
            check_codes::<F16>(part, golden);
        }
    });
}

fn check_values<E: Element>(golden: &mut Golden) {
    let codes: Vec<E::Code> = (0..1 << E::BITS).map(E::Code::from_bits).collect();
    let mut values = vec![0.0; codes.len()];
    element::decode::<E>(&codes, &mut values);
    check_equal(E::NAME, &values, &golden.f32s(codes.len()));
}

/// Equal bits, or both NaN.
fn check_equal(name: &str, values: &[f32], wanted: &[f32]) {
    for (code, (value, wanted)) in values.iter().zip(wanted).enumerate() {
        let equal = value.to_bits() == wanted.to_bits() || value.is_nan() && wanted.is_nan();
        assert!(equal, "{name}: {code:#x}: {value:e}, not {wanted:e}");
    }
}

#[test]
fn values_of_all_codes_equal_those_of_ml_dtypes() {
    if !has_ml_dtypes() {
        return;
    }
    with_golden(&["decode"], &[], |golden| {
        check_values::<E4m3>(golden);
        check_values::<E5m2>(golden);
        check_values::<E3m2>(golden);
        check_values::<E2m3>(golden);
        check_values::<E2m1>(golden);
        check_values::<Bf16>(golden);
        check_values::<F16>(golden);
        let scales: Vec<f32> = (0..=u8::MAX).map(ue8m0_value).collect();
        check_equal("ue8m0", &scales, &golden.f32s(scales.len()));
    });
}

/// Finite numbers, in blocks whose magnitudes are powers of two of `exponents` at most; one in 50 blocks is all zeros.
fn finite_blocks(values: usize, block: usize, exponents: Range<i32>) -> Vec<f32> {
    let mut random = Random(7);
    let mut block_values = || {
        let exponent = exponents.start + (random.next() % exponents.len() as u64) as i32;
        let scale = if random.next().is_multiple_of(50) { 0.0 } else { 2_f32.powi(exponent) };
        // The exponents within a block reach 13 octaves down; a quarter of the values lies on or beside a middle.
        (0..block)
            .map(|_| {
                let bits = random.next() as u32;
                let mantissa = if bits >> 30 == 0 { bits & 0x7e_0001 } else { bits & 0x7f_ffff };
                f32::from_bits((bits << 2) & 1 << 31 | mantissa | (127 - (bits >> 23 & 63) % 14) << 23) * scale
            })
            .collect::<Vec<_>>()
    };
    (0..values / block).flat_map(|_| block_values()).collect()
}

fn unpacked(format: MxFormat, packed: &[u8]) -> Vec<u8> {
    let mut codes = vec![0; packed.len() * 8 / format.code_bits()];
    match format.code_bits() {
        4 => bits::unpack4(packed, &mut codes),
        6 => bits::unpack6(packed, &mut codes),
        _ => codes.copy_from_slice(packed),
    }
    codes
}

#[test]
fn mx_blocks_equal_the_specification_computed_with_ml_dtypes() {
    if !has_ml_dtypes() {
        return;
    }
    let values = finite_blocks(1 << 18, MX_BLOCK_VALUES, -125..127);
    with_golden(&["mx"], &values, |golden| {
        for format in MxFormat::ALL {
            for rounding in [ScaleRounding::Down, ScaleRounding::Up] {
                let mut scales = vec![0; format.scale_bytes(values.len())];
                let mut codes = vec![0; format.code_bytes(values.len())];
                format.encode(&values, &mut scales, &mut codes, rounding, Rounding::NearestEven);
                assert!(scales == golden.bytes(scales.len()), "{format:?} {rounding:?}: scales");
                assert!(unpacked(format, &codes) == golden.bytes(values.len()), "{format:?} {rounding:?}: codes");
            }
        }
    });
}

#[test]
fn tiles_equal_the_published_formula_computed_with_ml_dtypes() {
    if !has_ml_dtypes() {
        return;
    }
    // Neither side is a multiple of 128, so that there are smaller tiles at both edges.
    let (rows, columns) = (300, 420);
    // From far below the floor of 1e-4 to where activations never are.
    let values = finite_blocks(rows * columns, 20, -30..30);
    with_golden(&["tile", &rows.to_string(), &columns.to_string()], &values, |golden| {
        for shape in [TileShape::Row, TileShape::Square] {
            for scale in [TileScale::F32, TileScale::PowerOfTwo] {
                let mut scales = vec![0.0; shape.scales(rows, columns)];
                let mut codes = vec![0; values.len()];
                shape.encode(&values, columns, scale, Rounding::NearestEven, &mut codes, &mut scales);
                check_equal(&format!("{shape:?} {scale:?}"), &scales, &golden.f32s(scales.len()));
                assert!(codes == golden.bytes(codes.len()), "{shape:?} {scale:?}: codes");
            }
        }
    });
}
