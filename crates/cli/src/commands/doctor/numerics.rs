//! Do two engines compute the same numbers? Thirty operations and one training step of a tiny model, compared by
//! ‖a − b‖ / ‖b‖ with a bound for each.
//!
//! The bounds of the operations are `engine::numerics`'; those of the training step are the conformance suite's, a set for each
//! precision of the engine that is compared. The reference is computed in f32 always.

use super::check::Check;
use crate::engines::EngineArgs;
use crate::failure::Failure;
use base::RunConfig;
use base::config::{DataSection, RunSection, TrainSection};
use clap::Parser;
use engine::conformance::{Expectations, lively_parameters, random_batch, tiny_shape};
use engine::numerics::{operations, reference, relative_distance};
use engine::{Engine, Precision, PrecisionChoice};
use serde_json::{Value, json};
use wire::probe::{Reference, ReferenceVector};

/// Seeds of the tiny model's parameters and of its batch.
const SEEDS: (u64, u64) = (41, 42);

/// Samples and positions of the batch.
const BATCH: (usize, usize) = (4, 12);

/// Far above a usual one, so that rounding of the parameters does not hide how they move.
const LEARNING_RATE: f64 = 1e-2;

/// The three results of the training step; the last is how the parameters moved.
const STEP: [&str; 3] = ["step_loss", "step_gradient", "step_movement"];

/// Largest distances of [`STEP`]: those to which the conformance suite holds every engine, where their reasons stand.
fn step_bounds(precision: Precision) -> [f64; 3] {
    let expected = Expectations { precision, repeatable: true };
    [expected.loss(), expected.gradient(), expected.movement()]
}

/// What one engine computed; an operation that failed has its reason.
#[derive(Debug)]
pub(super) struct Results {
    /// Engine, device and precision, for people.
    engine: String,
    device: String,
    precision: Precision,
    values: Vec<(&'static str, Result<Vec<f32>, String>)>,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    name: &'static str,
    /// Infinite where lengths differ or a number is not finite.
    distance: f64,
    bound: f64,
    /// Why there is no result.
    problem: Option<String>,
}

impl Row {
    fn is_within(&self) -> bool {
        self.problem.is_none() && self.distance <= self.bound
    }
}

/// Names of all results and their lengths, in the order in which they travel.
pub(super) fn expected() -> Vec<(&'static str, usize)> {
    let elements = base::ParameterSchema::llama(&tiny_shape(false)).elements();
    let of_operations = operations().into_iter().map(|operation| (operation.name, reference(&operation).len()));
    of_operations.chain(STEP.into_iter().zip([1, elements, elements])).collect()
}

/// Computes everything on the engine that `args` name.
///
/// # Errors
/// There is no such engine, or it does not compute in that precision.
pub(super) fn compute(args: &EngineArgs) -> Result<Results, Failure> {
    if let Some((message, hint)) = args.warning() {
        return Err(Failure::new(message, hint));
    }
    let mut engine = tiny_engine(args)?;
    let device = engine.device();
    if let PrecisionChoice::Fixed(wanted) = args.precision
        && wanted != device.precision
    {
        let message = format!("engine '{}' computes in {} here, not in {wanted}", args.engine, device.precision);
        return Err(Failure::new(message, "leave out --precision, or name a device that has it: `beringia devices`"));
    }
    let mut values = Vec::new();
    for operation in operations() {
        values.push((operation.name, engine.operation(&operation).map_err(|error| error.to_string())));
    }
    values.extend(training_step(&mut *engine));
    Ok(Results { engine: device.engine, device: device.name, precision: device.precision, values })
}

fn tiny_engine(args: &EngineArgs) -> Result<Box<dyn Engine>, Failure> {
    let shape = tiny_shape(false);
    let parameters = lively_parameters(&shape, SEEDS.0);
    let config = RunConfig {
        run: RunSection { name: "doctor".to_owned(), seed: SEEDS.0 },
        data: DataSection { sequence_length: BATCH.1 },
        train: TrainSection::default(),
        model: shape,
        transformers: None,
        sync: Default::default(),
        checkpoint: Default::default(),
        evaluate: Default::default(),
    };
    args.create(&config, &parameters)
}

fn training_step(engine: &mut dyn Engine) -> Vec<(&'static str, Result<Vec<f32>, String>)> {
    let batch = random_batch(&tiny_shape(false), BATCH.0, BATCH.1, SEEDS.1);
    let whole = engine.schema().whole();
    let mut step = || {
        let mut before = vec![0.0; whole.elements()];
        engine.read_fragment(&whole, &mut before)?;
        let mut gradient = vec![0.0; whole.elements()];
        engine.gradient(&batch, &mut gradient)?;
        let loss = engine.inner_step(&batch, LEARNING_RATE)?.loss_nats as f32;
        let mut parameters = vec![0.0; whole.elements()];
        engine.read_fragment(&whole, &mut parameters)?;
        let movement = parameters.iter().zip(&before).map(|(after, before)| after - before).collect();
        Ok::<_, engine::EngineError>([vec![loss], gradient, movement])
    };
    match step() {
        Ok(results) => STEP.into_iter().zip(results.map(Ok)).collect(),
        Err(error) => STEP.into_iter().map(|name| (name, Err(error.to_string()))).collect(),
    }
}

/// Engine arguments alone, with the defaults that they have on the command line.
#[derive(Debug, Parser)]
struct EngineOnly {
    #[command(flatten)]
    engine: EngineArgs,
}

/// What the coordinator's machine answers to a probe: the engine that runs everywhere, in f32.
///
/// # Errors
/// What could not be computed.
pub(crate) fn reference_here() -> Result<Reference, String> {
    let args = EngineOnly::try_parse_from(["doctor", "--engine", "flex", "--precision", "f32"]);
    let args = args.map_err(|error| error.to_string())?.engine;
    let results = compute(&args).map_err(|failure| failure.message)?;
    let vector = |(name, values): (&str, Result<Vec<f32>, String>)| match values {
        Ok(values) => Ok(ReferenceVector { name: name.to_owned(), values }),
        Err(reason) => Err(format!("{name}: {reason}")),
    };
    Ok(Reference {
        engine: results.engine,
        device: results.device,
        precision: results.precision.to_string(),
        vectors: results.values.into_iter().map(vector).collect::<Result<_, _>>()?,
    })
}

/// What the operations are by their definition, in f64; the training step has no such definition here.
fn definition() -> Reference {
    let operations = operations();
    let vectors = operations
        .iter()
        .map(|operation| ReferenceVector { name: operation.name.to_owned(), values: reference(operation) });
    Reference {
        engine: "definition".to_owned(),
        device: "computed in f64, rounded once".to_owned(),
        precision: "f64".to_owned(),
        vectors: vectors.collect(),
    }
}

/// The distances of two engines' results.
#[derive(Debug)]
pub(super) struct Comparison {
    local: [String; 3],
    other: [String; 3],
    rows: Vec<Row>,
}

impl Comparison {
    /// Of `local` to `other`; to the operations' definition where there is no other engine.
    pub(super) fn new(local: &Results, other: Option<&Reference>) -> Self {
        let defined = other.is_none().then(definition);
        let other = other.or(defined.as_ref());
        let bounds: Vec<f64> = operations().iter().map(|operation| operation.bound).collect();
        let bounds = bounds.into_iter().chain(step_bounds(local.precision));
        let others = other.into_iter().flat_map(|reference| &reference.vectors);
        let rows = local.values.iter().zip(bounds).zip(others);
        let rows = rows.map(|(((name, values), bound), other)| {
            let distance = values.as_ref().map_or(f64::INFINITY, |values| relative_distance(values, &other.values));
            Row { name, distance, bound, problem: values.as_ref().err().cloned() }
        });
        let of =
            |reference: &Reference| [reference.engine.clone(), reference.device.clone(), reference.precision.clone()];
        Self {
            local: [local.engine.clone(), local.device.clone(), local.precision.to_string()],
            other: other.map(of).unwrap_or_default(),
            rows: rows.collect(),
        }
    }

    /// One check for the operations and, where both sides made one, one for the training step.
    pub(super) fn checks(&self) -> Vec<Check> {
        let (steps, operations): (Vec<&Row>, Vec<&Row>) = self.rows.iter().partition(|row| STEP.contains(&row.name));
        let mut checks = vec![self.check("operations", &operations)];
        if !steps.is_empty() {
            checks.push(self.check("training_step", &steps));
        }
        checks
    }

    fn check(&self, name: &'static str, rows: &[&Row]) -> Check {
        let within = rows.iter().filter(|row| row.is_within()).count();
        let [engine, device, precision] = &self.other;
        let fact = format!("{within} of {} within their bounds of {engine} ({precision}, {device})", rows.len());
        let check = match rows.iter().find(|row| !row.is_within()) {
            None => Check::ok(name, fact),
            Some(row) => {
                let how = match &row.problem {
                    Some(problem) => problem.clone(),
                    None => format!("{:.1e} apart, the bound is {:.1e}", row.distance, row.bound),
                };
                let hint =
                    "do not mix these two: update the driver and the engine of the device, or use `--engine flex`";
                Check::failed(name, format!("{fact}; {}: {how}", row.name), hint)
            }
        };
        check.with("within", within).with("compared", rows.len())
    }

    /// For programs.
    pub(super) fn to_json(&self) -> Value {
        let side = |[engine, device, precision]: &[String; 3]| json!({ "engine": engine, "device": device, "precision": precision });
        let row = |row: &Row| {
            json!({
                "name": row.name,
                "kind": if STEP.contains(&row.name) { "training_step" } else { "operation" },
                "distance": row.distance,
                "bound": row.bound,
                "ok": row.is_within(),
                "problem": row.problem,
            })
        };
        json!({
            "local": side(&self.local),
            "reference": side(&self.other),
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
        })
    }

    /// The table for people.
    pub(super) fn render(&self) -> String {
        let mut text = format!(
            "numbers of {} ({}) against {} ({})\n{:<20} {:>10} {:>10}\n",
            self.local[0], self.local[2], self.other[0], self.other[2], "operation", "distance", "bound"
        );
        for row in &self.rows {
            let end = match (&row.problem, row.is_within()) {
                (Some(problem), _) => problem.as_str(),
                (None, true) => "ok",
                (None, false) => "TOO FAR",
            };
            text.push_str(&format!("{:<20} {:>10.1e} {:>10.1e}  {end}\n", row.name, row.distance, row.bound));
        }
        text
    }
}
