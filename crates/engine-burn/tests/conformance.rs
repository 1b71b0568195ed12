//! The suite that every engine passes, on both implementations of the blocks.

use engine::conformance::{self, Expectations};
use engine_burn::{BlockKernels, BurnEngine};

#[test]
fn composed_blocks_conform() {
    conformance::run_all(
        &|shape, train, initial| {
            Box::new(BurnEngine::with_kernels(shape, train, "flex", initial, BlockKernels::Composed).unwrap())
        },
        &Expectations::EXACT,
    );
}

#[test]
fn fused_blocks_conform() {
    conformance::run_all(
        &|shape, train, initial| {
            Box::new(BurnEngine::with_kernels(shape, train, "flex", initial, BlockKernels::Fused).unwrap())
        },
        &Expectations::EXACT,
    );
}
