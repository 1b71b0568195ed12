//! The suite that every engine passes, and the thirty operations, on PyTorch's CPU.

mod common;

use common::{Pool, has_module, options};
use engine::{Engine, conformance, numerics};

#[test]
fn torch_on_the_cpu_conforms() {
    if !has_module("torch") {
        return;
    }
    let pool = Pool::new(options());
    conformance::run_all(&|shape, train, initial| Box::new(pool.engine(shape, train, initial)));

    let shape = conformance::tiny_shape(false);
    let initial = engine::initial_parameters(&shape, 1);
    let mut engine = pool.engine(&shape, &base::config::TrainSection::default(), &initial);
    for operation in numerics::operations() {
        let found = engine.operation(&operation).unwrap();
        let distance = numerics::relative_distance(&found, &numerics::reference(&operation));
        assert!(distance <= operation.bound, "{}: {distance} from the reference", operation.name);
    }
}
