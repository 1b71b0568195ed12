//! An engine of a few lines that fails when it is told to.
//!
//! It has the parameters of a Llama and forgets that they are one: each is pulled towards zero and pushed by the mean token
//! of the batch, with a momentum that plays the optimiser's state. That is enough for two sites to need each other's
//! deltas, for a forgotten momentum to change bits, and for a batch to be the same however it is cut.

use base::{Fragment, NamedTensors, ParameterSchema, RunConfig, TokenBatch};
use engine::numerics::Operation;
use engine::{DeviceInfo, Engine, EngineError, EngineState, Interrupter, LossSum, Precision, StepReport};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

/// Methods that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Method {
    InnerStep,
    Evaluate,
    Read,
    Write,
    Save,
}

/// How they fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The engine notices a number that is not finite.
    NotFiniteNoticed,
    /// It gives such a loss as if nothing were wrong.
    NotFiniteLoss,
    /// Its parameters become such.
    NotFiniteParameters,
    /// One bit of one of them is another.
    FlippedBit,
    /// The call does not come back unless it is interrupted.
    Hang,
    /// The engine is gone until it is recovered.
    Lost,
}

/// Trouble in the call number `call` of a method, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) method: Method,
    pub(crate) call: u64,
    pub(crate) trouble: Trouble,
}

#[derive(Clone)]
struct State {
    parameters: Vec<f32>,
    momentum: Vec<f32>,
    steps: u64,
}

pub(crate) struct TestEngine {
    schema: ParameterSchema,
    state: State,
    /// What [`Engine::recover`] goes back to.
    kept: State,
    micro_batch_samples: usize,
    /// Most samples that it computes at once.
    memory_samples: usize,
    /// Whether it does as [`Engine::set_micro_batch_samples`] says.
    obeys: bool,
    faults: Vec<Fault>,
    calls: BTreeMap<Method, u64>,
    lost: bool,
    interrupted: Arc<Mutex<Receiver<()>>>,
    interrupt: Sender<()>,
    interruptible: bool,
    /// By which factor each of its gradients is wrong.
    bias: f32,
    /// How often it was started again, and how often interrupted.
    pub(crate) recoveries: Arc<AtomicUsize>,
    pub(crate) interruptions: Arc<AtomicUsize>,
}

impl TestEngine {
    pub(crate) fn schema_of(config: &RunConfig) -> ParameterSchema {
        ParameterSchema::llama(&config.model)
    }

    pub(crate) fn new(config: &RunConfig, faults: &[Fault]) -> Self {
        let schema = Self::schema_of(config);
        let state =
            State { parameters: vec![0.0; schema.elements()], momentum: vec![0.0; schema.elements()], steps: 0 };
        let (interrupt, interrupted) = channel();
        Self {
            schema,
            kept: state.clone(),
            state,
            micro_batch_samples: config.train.micro_batch_samples,
            memory_samples: usize::MAX,
            obeys: true,
            faults: faults.to_vec(),
            calls: BTreeMap::new(),
            lost: false,
            interrupted: Arc::new(Mutex::new(interrupted)),
            interrupt,
            interruptible: true,
            bias: 1.0,
            recoveries: Arc::default(),
            interruptions: Arc::default(),
        }
    }

    pub(crate) fn with_memory(mut self, samples: usize) -> Self {
        self.memory_samples = samples;
        self
    }

    /// One that goes on with its own micro-batch, whatever it is told.
    pub(crate) fn stubborn(mut self) -> Self {
        self.obeys = false;
        self
    }

    /// One that computes the same wrong gradient each time.
    pub(crate) fn biased(mut self, factor: f32) -> Self {
        self.bias = factor;
        self
    }

    /// One that only the end of its process can stop.
    pub(crate) fn uninterruptible(mut self) -> Self {
        self.interruptible = false;
        self
    }

    fn gone(reason: &str) -> EngineError {
        EngineError::Lost { device: "test".to_owned(), reason: reason.to_owned() }
    }

    /// Counts a call, and fails it where a fault says so. Gives the trouble that the call itself must make.
    fn call(&mut self, method: Method) -> Result<Option<Trouble>, EngineError> {
        if self.lost {
            return Err(Self::gone("it was lost and nobody has recovered it"));
        }
        let count = self.calls.entry(method).or_default();
        *count += 1;
        let call = *count;
        let fault = self.faults.iter().find(|fault| fault.method == method && fault.call == call);
        match fault.map(|fault| fault.trouble) {
            Some(Trouble::Lost) => {
                self.lost = true;
                // What was in its memory is gone.
                self.state.parameters.fill(f32::NAN);
                self.state.momentum.fill(f32::NAN);
                Err(Self::gone("signal 9"))
            }
            Some(Trouble::Hang) => {
                // The engine keeps a sender itself: only a word ends this.
                let _word = self.interrupted.lock().unwrap().recv();
                Err(Self::gone("interrupted"))
            }
            Some(Trouble::NotFiniteNoticed) => Err(EngineError::NotFinite { what: "loss", value: f64::NAN }),
            other => Ok(other),
        }
    }

    fn fits(&self, samples: usize) -> Result<(), EngineError> {
        if samples <= self.memory_samples {
            return Ok(());
        }
        let reason = format!("{samples} samples wanted, {} fit", self.memory_samples);
        Err(EngineError::OutOfMemory { device: "test".to_owned(), reason })
    }

    fn named(&self, values: &[f32]) -> NamedTensors {
        self.schema.unflatten(values)
    }

    fn report(batch: &TokenBatch, loss_nats: f64) -> StepReport {
        StepReport { loss_nats, tokens: batch.predicted_tokens(), gradient_norm: 1.0, seconds: 1e-3, joules: None }
    }

    fn push(&self, batch: &TokenBatch) -> f32 {
        let sum: u64 = batch.tokens.iter().map(|token| u64::from(*token)).sum();
        self.bias * (sum as f32 / batch.tokens.len() as f32 / 1_000.0)
    }
}

impl Engine for TestEngine {
    fn device(&self) -> DeviceInfo {
        DeviceInfo {
            engine: "test".to_owned(),
            name: "Test Device 1".to_owned(),
            maker: "Nobody".to_owned(),
            driver: String::new(),
            memory_bytes: Some(1 << 20),
            threads: 1,
            precision: Precision::F32,
        }
    }

    fn schema(&self) -> &ParameterSchema {
        &self.schema
    }

    fn inner_step(&mut self, batch: &TokenBatch, learning_rate: f64) -> Result<StepReport, EngineError> {
        let trouble = self.call(Method::InnerStep)?;
        self.fits(self.micro_batch_samples.min(batch.samples))?;
        let push = self.push(batch);
        let State { parameters, momentum, steps } = &mut self.state;
        for (parameter, momentum) in parameters.iter_mut().zip(momentum) {
            *momentum = 0.9 * *momentum + 0.01 * *parameter + push;
            *parameter -= learning_rate as f32 * *momentum;
        }
        *steps += 1;
        if trouble == Some(Trouble::NotFiniteParameters) {
            parameters[7] = f32::INFINITY;
        }
        if trouble == Some(Trouble::FlippedBit) {
            parameters[7] = f32::from_bits(parameters[7].to_bits() ^ 1 << 9);
        }
        let loss_nats = if trouble == Some(Trouble::NotFiniteLoss) { f64::NAN } else { f64::from(push) };
        Ok(Self::report(batch, loss_nats))
    }

    fn gradient(&mut self, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepReport, EngineError> {
        self.fits(self.micro_batch_samples.min(batch.samples))?;
        let push = self.push(batch);
        for (gradient, parameter) in gradient.iter_mut().zip(&self.state.parameters) {
            *gradient = 0.01 * parameter + push;
        }
        Ok(Self::report(batch, f64::from(push)))
    }

    fn evaluate(&mut self, batch: &TokenBatch) -> Result<LossSum, EngineError> {
        self.call(Method::Evaluate)?;
        self.fits(batch.samples)?;
        let tokens = batch.predicted_tokens();
        Ok(LossSum { nats: tokens as f64 * f64::from(1.0 + self.state.parameters[0].abs()), tokens })
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        Ok(vec![0.0; tokens.len() * self.schema.parameters()[0].shape[0]])
    }

    fn read_fragment(&mut self, fragment: &Fragment, values: &mut [f32]) -> Result<(), EngineError> {
        self.call(Method::Read)?;
        let parameters = &self.state.parameters;
        let read = fragment.ranges.iter().cloned().flatten().map(|index| parameters[index]);
        values.iter_mut().zip(read).for_each(|(to, from)| *to = from);
        Ok(())
    }

    fn write_fragment(&mut self, fragment: &Fragment, values: &[f32]) -> Result<(), EngineError> {
        self.call(Method::Write)?;
        for (index, value) in fragment.ranges.iter().cloned().flatten().zip(values) {
            self.state.parameters[index] = *value;
        }
        self.kept = self.state.clone();
        Ok(())
    }

    fn save(&mut self) -> Result<EngineState, EngineError> {
        self.call(Method::Save)?;
        let first_moments = self.named(&self.state.momentum);
        Ok(EngineState {
            parameters: self.named(&self.state.parameters),
            second_moments: first_moments.clone(),
            first_moments,
            optimizer_steps: self.state.steps,
        })
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        self.state.parameters = self.schema.flatten(&state.parameters).unwrap();
        self.state.momentum = match state.first_moments.is_empty() {
            true => vec![0.0; self.schema.elements()],
            false => self.schema.flatten(&state.first_moments).unwrap(),
        };
        self.state.steps = state.optimizer_steps;
        self.kept = self.state.clone();
        Ok(())
    }

    fn micro_batch_samples(&self) -> usize {
        self.micro_batch_samples
    }

    // Its steps know no noise.
    fn set_batch_share(&mut self, _share: f64) {}

    fn set_micro_batch_samples(&mut self, samples: usize) {
        if self.obeys {
            self.micro_batch_samples = samples;
        }
    }

    fn is_repeatable(&self) -> bool {
        true
    }

    fn operation(&mut self, operation: &Operation) -> Result<Vec<f32>, EngineError> {
        Err(EngineError::Shape { what: format!("{operation:?}"), reason: "not here".to_owned() })
    }

    fn recover(&mut self) -> Result<(), EngineError> {
        self.recoveries.fetch_add(1, Ordering::Relaxed);
        self.state = self.kept.clone();
        self.lost = false;
        Ok(())
    }

    fn interrupter(&self) -> Option<Interrupter> {
        let (interrupt, interruptions) = (Mutex::new(self.interrupt.clone()), Arc::clone(&self.interruptions));
        self.interruptible.then(|| {
            Box::new(move || {
                interruptions.fetch_add(1, Ordering::Relaxed);
                interrupt.lock().unwrap().send(()).unwrap();
            }) as Interrupter
        })
    }
}
