//! The suite that every engine passes, on PyTorch's CPU in both precisions.

mod common;

use common::{Pool, has_module, options, python};
use engine::conformance::{self, Expectations};
use engine::{Precision, PrecisionChoice};
use engine_torch::{TorchOptions, measured_devices};

#[test]
fn torch_in_f32_conforms() {
    if !has_module("torch") {
        return;
    }
    let pool = Pool::new(options());
    conformance::run_all(&|shape, train, initial| Box::new(pool.engine(shape, train, initial)), &Expectations::EXACT);
}

#[test]
fn torch_in_bf16_conforms() {
    if !has_module("torch") {
        return;
    }
    let precision = PrecisionChoice::Fixed(Precision::Bf16);
    let pool = Pool::new(TorchOptions { precision, ..options() });
    conformance::run_all(
        &|shape, train, initial| Box::new(pool.engine(shape, train, initial)),
        &Expectations { precision: Precision::Bf16, repeatable: true },
    );
}

#[test]
fn the_processor_is_listed_and_measured() {
    if !has_module("torch") {
        return;
    }
    let reports = measured_devices(Some(&python()), 0.1).unwrap();
    let processor = reports.iter().find(|report| report.info.engine == "torch:cpu").unwrap();
    assert!(!processor.info.name.is_empty());
    assert!(processor.info.memory_bytes.is_some_and(|bytes| bytes > 1 << 28));
    let rates = [processor.rates.matrix_f32_tflops, processor.rates.copy_gigabytes_per_second];
    assert!(rates.iter().all(|rate| rate.is_some_and(|rate| rate > 0.0)), "{processor:?}");
}
