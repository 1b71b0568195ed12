//! The suite that every engine passes, on PyTorch's CPU in both precisions.

mod common;

use common::{Pool, has_module, options};
use engine::conformance::{self, Expectations};
use engine::{Precision, PrecisionChoice};
use engine_torch::TorchOptions;

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
