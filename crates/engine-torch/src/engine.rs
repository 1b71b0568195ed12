//! [`TorchEngine`]: the calls of [`Engine`], each checked here, computed there, and checked again.

use crate::arena::{Arena, ELEMENT_BYTES, Layout};
use crate::leash::Leash;
use crate::options::{ModelDescription, TorchOptions};
use crate::places::{Piece, Places};
use crate::process::TorchProcess;
use crate::protocol::{Computed, Initialised, Input, Loss, Request, Saved, Step, TorchDevice, Train, count_elements};
use base::config::TrainSection;
use base::{Fragment, NamedTensors, ParameterSchema, TokenBatch};
use engine::checks::{TextLimits, check_fragment};
use engine::numerics::Operation;
use engine::{DeviceInfo, DeviceRates, Engine, EngineError, EngineState, Interrupter, LossSum, StepReport};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::Sender;

/// Room for an operation's result beside that of its inputs, elements: a product may be larger than its factors.
const OPERATION_ELEMENTS_MIN: usize = 1 << 20;

/// PyTorch in a process beside this one. Dropping it ends the process.
pub struct TorchEngine {
    model: ModelDescription,
    limits: TextLimits,
    schema: ParameterSchema,
    train: TrainSection,
    process: Option<TorchProcess>,
    options: TorchOptions,
    leash: Arc<Leash>,
    places: Places,
    device: TorchDevice,
    is_compiled: bool,
    /// What Python accumulates by; behind `train` until the next call.
    micro_batch_samples_there: usize,
    batch_share: f64,
    snapshot: Snapshot,
    returned: Option<Sender<TorchProcess>>,
}

/// What [`Engine::recover`] goes back to, flat, in canonical order.
#[derive(Debug, Clone, Default)]
struct Snapshot {
    parameters: Vec<f32>,
    /// First and second; empty where there are none.
    moments: [Vec<f32>; 2],
    optimizer_steps: u64,
    /// Whether the last copy into it went through to the end.
    is_whole: bool,
}

impl TorchEngine {
    /// Starts Python and has it build `model` with the weights of `initial`.
    ///
    /// # Errors
    /// As [`TorchProcess::start`]; [`EngineError::Shape`] where the model that Python builds has other parameters than
    /// `model`, or `initial` others than either.
    pub fn new(
        model: &ModelDescription,
        train: &TrainSection,
        options: &TorchOptions,
        initial: &NamedTensors,
    ) -> Result<Self, EngineError> {
        let checked = Checked::new(model, initial)?;
        Self::build(checked, train, TorchProcess::start(options)?, None)
    }

    /// As [`TorchEngine::new`], in a process that runs already; it goes to `returned` when the engine is dropped or cannot be
    /// built, if it is still good. Importing PyTorch takes seconds: many short-lived engines share it.
    ///
    /// # Errors
    /// As [`TorchEngine::new`].
    pub fn borrowing(
        model: &ModelDescription,
        train: &TrainSection,
        process: TorchProcess,
        initial: &NamedTensors,
        returned: Sender<TorchProcess>,
    ) -> Result<Self, EngineError> {
        let checked = Checked::new(model, initial)?;
        Self::build(checked, train, process, Some(returned))
    }

    fn build(
        checked: Checked,
        train: &TrainSection,
        mut process: TorchProcess,
        returned: Option<Sender<TorchProcess>>,
    ) -> Result<Self, EngineError> {
        let Checked { model, schema, snapshot } = checked;
        let Built { device, places, is_compiled } = match initialise(&mut process, &model, &schema, train) {
            Ok(built) => built,
            Err(error) => {
                give_back(process, returned.as_ref());
                return Err(error);
            }
        };
        let mut engine = Self {
            limits: model.limits(),
            model,
            schema,
            train: train.clone(),
            options: process.options().clone(),
            leash: Arc::clone(process.leash()),
            process: Some(process),
            places,
            device,
            is_compiled,
            micro_batch_samples_there: train.micro_batch_samples,
            batch_share: 1.0,
            snapshot,
            returned,
        };
        engine.upload_snapshot()?;
        Ok(engine)
    }

    /// Speeds of the device, measured for about `seconds`.
    ///
    /// # Errors
    /// The device failed.
    pub fn measure(&mut self, seconds: f64) -> Result<DeviceRates, EngineError> {
        self.process()?.ask(&Request::Measure { seconds })
    }

    /// Versions of Python and PyTorch, for a person to read.
    pub fn versions(&self) -> &str {
        self.process.as_ref().map_or("", TorchProcess::versions)
    }

    /// Whether `torch.compile` was used for the last step, or will be for the first: with [`Compile::Auto`](crate::Compile)
    /// Python goes on without it where it fails.
    pub fn compiled(&self) -> bool {
        self.is_compiled
    }

    /// Number of the Python process (that of `torchrun` where there are several ranks); `None` where somebody else started
    /// it, and after its end was noticed.
    pub fn process_id(&self) -> Option<u32> {
        self.leash.process_id()
    }

    fn process(&mut self) -> Result<&mut TorchProcess, EngineError> {
        let device = || self.options.engine_name();
        let lost = || EngineError::Lost { device: device(), reason: "it could not be started again".to_owned() };
        self.process.as_mut().ok_or_else(lost)
    }

    /// Shared memory, or what it means that there is none.
    fn on_arena<T>(&mut self, layout: &Layout, act: impl FnOnce(&Arena) -> io::Result<T>) -> Result<T, EngineError> {
        on_arena(self.process()?, layout, act)
    }

    /// Tells Python of a micro-batch that was changed here.
    fn follow_micro_batch(&mut self) -> Result<(), EngineError> {
        let samples = self.train.micro_batch_samples;
        if samples != self.micro_batch_samples_there {
            self.process()?.tell(&Request::MicroBatch { samples })?;
            self.micro_batch_samples_there = samples;
        }
        Ok(())
    }

    fn check_step(&mut self, step: &Step, batch: &TokenBatch) -> Result<StepReport, EngineError> {
        let possible = |value: f64| value.is_finite() && value >= 0.0;
        let numbers = [step.loss_nats, step.gradient_norm, step.seconds, step.joules.unwrap_or_default()];
        let expected = batch.predicted_tokens();
        if !numbers.into_iter().all(possible) || step.tokens != expected {
            let reason = format!("it answers a step of {expected} tokens with {step:?}");
            return Err(self.process()?.distrust(reason));
        }
        let Step { loss_nats, tokens, gradient_norm, seconds, joules, compiled } = *step;
        self.is_compiled = compiled;
        Ok(StepReport { loss_nats, tokens, gradient_norm, seconds, joules })
    }

    /// Brings parameters and optimiser to the snapshot.
    fn upload_snapshot(&mut self) -> Result<(), EngineError> {
        let mut snapshot = std::mem::take(&mut self.snapshot);
        let uploaded = self.upload(&snapshot);
        std::mem::swap(&mut self.snapshot, &mut snapshot);
        uploaded
    }

    fn upload(&mut self, state: &Snapshot) -> Result<(), EngineError> {
        let mut layout = Layout::default();
        let elements = self.schema.elements();
        let parameters = layout.place(elements);
        let has_moments = !state.moments[0].is_empty();
        let moments = has_moments.then(|| [layout.place(elements), layout.place(elements)]);
        let pieces = self.places.pieces(&self.schema.whole());
        self.on_arena(&layout, |arena| {
            write_pieces(arena, parameters, &pieces, &state.parameters)?;
            let pairs = moments.iter().flatten().zip(&state.moments);
            pairs.into_iter().try_for_each(|(offset, values)| write_pieces(arena, *offset, &pieces, values))
        })?;
        let [first, second] = moments.map_or([None; 2], |offsets| offsets.map(Some));
        let request = Request::Restore { parameters, first, second, optimizer_steps: state.optimizer_steps };
        self.process()?.tell(&request)
    }

    /// Copies the moments, and the parameters where they are wanted, into `state`, whose buffers are used again.
    fn download(&mut self, state: &mut Snapshot, with_parameters: bool) -> Result<(), EngineError> {
        let mut layout = Layout::default();
        let elements = self.schema.elements();
        let [first, second] = [layout.place(elements), layout.place(elements)];
        let parameters = with_parameters.then(|| layout.place(elements));
        self.on_arena(&layout, |_| Ok(()))?;
        let saved: Saved = self.process()?.ask(&Request::Save { parameters, first, second })?;
        let pieces = self.places.pieces(&self.schema.whole());
        state.is_whole = false;
        self.on_arena(&layout, |arena| {
            let fill = |offset: u64, values: &mut Vec<f32>| {
                values.resize(elements, 0.0);
                read_pieces(arena, offset, &pieces, values)
            };
            for (offset, values) in [first, second].into_iter().zip(&mut state.moments) {
                if saved.has_moments { fill(offset, values)? } else { values.clear() }
            }
            parameters.map_or(Ok(()), |offset| fill(offset, &mut state.parameters))
        })?;
        (state.optimizer_steps, state.is_whole) = (saved.optimizer_steps, true);
        Ok(())
    }

    /// Remembers that all parameters are `values`, with the optimiser as it is.
    fn remember(&mut self, values: &[f32]) -> Result<(), EngineError> {
        let mut snapshot = std::mem::take(&mut self.snapshot);
        let downloaded = self.download(&mut snapshot, false);
        if downloaded.is_ok() {
            snapshot.parameters.copy_from_slice(values);
        }
        self.snapshot = snapshot;
        downloaded
    }

    fn to_named(&self, values: &[f32]) -> NamedTensors {
        if values.is_empty() { NamedTensors::new() } else { self.schema.unflatten(values) }
    }

    fn ranges(pieces: &[Piece]) -> Vec<[usize; 2]> {
        pieces.iter().map(|piece| [piece.theirs.start, piece.theirs.end]).collect()
    }
}

impl Engine for TorchEngine {
    fn device(&self) -> DeviceInfo {
        let TorchDevice { name, maker, driver, memory_bytes, threads, precision } = self.device.clone();
        DeviceInfo { engine: self.options.engine_name(), name, maker, driver, memory_bytes, threads, precision }
    }

    fn schema(&self) -> &ParameterSchema {
        &self.schema
    }

    fn inner_step(&mut self, batch: &TokenBatch, learning_rate: f64) -> Result<StepReport, EngineError> {
        self.limits.check_batch(batch)?;
        if !learning_rate.is_finite() {
            return Err(EngineError::NotFinite { what: "learning rate", value: learning_rate });
        }
        self.follow_micro_batch()?;
        let mut layout = Layout::default();
        let tokens = layout.place(batch.tokens.len());
        self.on_arena(&layout, |arena| arena.write(tokens, &batch.tokens))?;
        let (samples, sequence_length, batch_share) = (batch.samples, batch.sequence_length, self.batch_share);
        let request = Request::InnerStep { samples, sequence_length, learning_rate, batch_share, tokens };
        let step = self.process()?.ask(&request)?;
        self.check_step(&step, batch)
    }

    fn gradient(&mut self, batch: &TokenBatch, gradient: &mut [f32]) -> Result<StepReport, EngineError> {
        let whole = self.schema.whole();
        check_fragment(&self.schema, &whole, gradient.len())?;
        self.limits.check_batch(batch)?;
        self.follow_micro_batch()?;
        let mut layout = Layout::default();
        let (tokens, place) = (layout.place(batch.tokens.len()), layout.place(gradient.len()));
        self.on_arena(&layout, |arena| arena.write(tokens, &batch.tokens))?;
        let (samples, sequence_length) = (batch.samples, batch.sequence_length);
        let step = self.process()?.ask(&Request::Gradient { samples, sequence_length, tokens, gradient: place })?;
        let report = self.check_step(&step, batch)?;
        let pieces = self.places.pieces(&whole);
        self.on_arena(&layout, |arena| read_pieces(arena, place, &pieces, gradient))?;
        Ok(report)
    }

    fn evaluate(&mut self, batch: &TokenBatch) -> Result<LossSum, EngineError> {
        self.limits.check_batch(batch)?;
        self.follow_micro_batch()?;
        let mut layout = Layout::default();
        let tokens = layout.place(batch.tokens.len());
        self.on_arena(&layout, |arena| arena.write(tokens, &batch.tokens))?;
        let (samples, sequence_length) = (batch.samples, batch.sequence_length);
        let loss: Loss = self.process()?.ask(&Request::Evaluate { samples, sequence_length, tokens })?;
        let expected = batch.predicted_tokens();
        if loss.tokens != expected || !loss.nats.is_finite() || loss.nats < 0.0 {
            let reason = format!("it evaluates {expected} tokens to {loss:?}");
            return Err(self.process()?.distrust(reason));
        }
        Ok(LossSum { nats: loss.nats, tokens: loss.tokens })
    }

    fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, EngineError> {
        self.limits.check_sequence(tokens)?;
        let Some(elements) = self.limits.vocabulary.and_then(|vocabulary| vocabulary.checked_mul(tokens.len())) else {
            let reason = "the model's configuration has no vocab_size".to_owned();
            return Err(EngineError::Shape { what: "sequence".to_owned(), reason });
        };
        let mut layout = Layout::default();
        let (input, output) = (layout.place(tokens.len()), layout.place(elements));
        self.on_arena(&layout, |arena| arena.write(input, tokens))?;
        self.process()?.tell(&Request::Logits { length: tokens.len(), tokens: input, logits: output })?;
        self.on_arena(&layout, |arena| read_new(arena, output, elements))
    }

    fn read_fragment(&mut self, fragment: &Fragment, values: &mut [f32]) -> Result<(), EngineError> {
        check_fragment(&self.schema, fragment, values.len())?;
        let pieces = self.places.pieces(fragment);
        read_parameters(self.process()?, &pieces, values)
    }

    fn write_fragment(&mut self, fragment: &Fragment, values: &[f32]) -> Result<(), EngineError> {
        check_fragment(&self.schema, fragment, values.len())?;
        let pieces = self.places.pieces(fragment);
        let mut layout = Layout::default();
        let place = layout.place(values.len());
        self.on_arena(&layout, |arena| arena.write(place, values))?;
        self.process()?.tell(&Request::Write { ranges: &Self::ranges(&pieces), values: place })?;
        if values.len() == self.schema.elements() { self.remember(values) } else { Ok(()) }
    }

    fn save(&mut self) -> Result<EngineState, EngineError> {
        let mut state = Snapshot::default();
        self.download(&mut state, true)?;
        Ok(EngineState {
            parameters: self.to_named(&state.parameters),
            first_moments: self.to_named(&state.moments[0]),
            second_moments: self.to_named(&state.moments[1]),
            optimizer_steps: state.optimizer_steps,
        })
    }

    fn restore(&mut self, state: &EngineState) -> Result<(), EngineError> {
        let snapshot = Snapshot::of(&self.schema, state)?;
        self.upload(&snapshot)?;
        self.snapshot = snapshot;
        Ok(())
    }

    fn micro_batch_samples(&self) -> usize {
        self.train.micro_batch_samples
    }

    fn set_micro_batch_samples(&mut self, samples: usize) {
        self.train.micro_batch_samples = samples.max(1);
    }

    fn set_batch_share(&mut self, share: f64) {
        self.batch_share = engine::batch_share(share);
    }

    fn is_repeatable(&self) -> bool {
        self.options.device == "cpu"
    }

    fn operation(&mut self, operation: &Operation) -> Result<Vec<f32>, EngineError> {
        let mut layout = Layout::default();
        let mut inputs = Vec::new();
        for input in &operation.inputs {
            inputs.push(Input { offset: layout.place(input.values.len()), shape: &input.shape });
        }
        let given: usize = operation.inputs.iter().map(|input| input.values.len()).sum();
        let room = given.max(OPERATION_ELEMENTS_MIN);
        let output = layout.place(room);
        self.on_arena(&layout, |arena| {
            let mut pairs = inputs.iter().zip(&operation.inputs);
            pairs.try_for_each(|(place, input)| arena.write(place.offset, &input.values))
        })?;
        let request = Request::Operation { name: operation.name, inputs: &inputs, output };
        let Computed { elements } = self.process()?.ask(&request)?;
        if elements > room {
            return Err(self.process()?.distrust(format!("it wrote {elements} elements where {room} have room")));
        }
        self.on_arena(&layout, |arena| read_new(arena, output, elements))
    }

    fn recover(&mut self) -> Result<(), EngineError> {
        if !self.snapshot.is_whole {
            let reason = "what it had at the last round could not be copied: start the site again".to_owned();
            return Err(EngineError::Device { device: self.options.engine_name(), reason });
        }
        // Ends what may be left of the old one before the new one takes its memory.
        self.process = None;
        let mut process = TorchProcess::start_on(&self.options, &self.leash)?;
        let built = initialise(&mut process, &self.model, &self.schema, &self.train)?;
        self.process = Some(process);
        self.micro_batch_samples_there = self.train.micro_batch_samples;
        (self.device, self.places, self.is_compiled) = (built.device, built.places, built.is_compiled);
        self.upload_snapshot()
    }

    fn interrupter(&self) -> Option<Interrupter> {
        let leash = Arc::clone(&self.leash);
        Some(Box::new(move || leash.interrupt()))
    }
}

impl Drop for TorchEngine {
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            give_back(process, self.returned.as_ref());
        }
    }
}

/// Returns a process that is still good to whom it belongs; any other ends here.
fn give_back(process: TorchProcess, owner: Option<&Sender<TorchProcess>>) {
    if let (true, Some(owner)) = (process.is_alive(), owner) {
        // Fails, and ends the process, where the owner is gone.
        let _ = owner.send(process);
    }
}

/// A model with parameters that fit it.
struct Checked {
    model: ModelDescription,
    schema: ParameterSchema,
    snapshot: Snapshot,
}

impl Checked {
    fn new(model: &ModelDescription, initial: &NamedTensors) -> Result<Self, EngineError> {
        if let ModelDescription::Llama(shape) = model {
            let unfit = |error: base::shape::ShapeError| error.to_string();
            shape
                .validate()
                .map_err(|error| EngineError::Shape { what: "model shape".to_owned(), reason: unfit(error) })?;
        }
        let schema = model.schema();
        let snapshot = Snapshot { parameters: flatten(&schema, initial)?, is_whole: true, ..Snapshot::default() };
        Ok(Self { model: model.clone(), schema, snapshot })
    }
}

impl Snapshot {
    fn of(schema: &ParameterSchema, state: &EngineState) -> Result<Self, EngineError> {
        let moments = |named: &NamedTensors| match named.is_empty() {
            true => Ok(Vec::new()),
            false => flatten(schema, named),
        };
        let moments = [moments(&state.first_moments)?, moments(&state.second_moments)?];
        if moments[0].len() != moments[1].len() {
            let reason = "one of first and second moments is missing".to_owned();
            return Err(EngineError::Shape { what: "optimiser state".to_owned(), reason });
        }
        let parameters = flatten(schema, &state.parameters)?;
        Ok(Self { parameters, moments, optimizer_steps: state.optimizer_steps, is_whole: true })
    }
}

fn flatten(schema: &ParameterSchema, named: &NamedTensors) -> Result<Vec<f32>, EngineError> {
    schema.flatten(named).map_err(|mismatch| EngineError::Shape { what: mismatch.name, reason: mismatch.reason })
}

/// What Python says of the model that it built.
struct Built {
    device: TorchDevice,
    places: Places,
    is_compiled: bool,
}

/// Has Python build the model, and matches what it built with the schema.
fn initialise(
    process: &mut TorchProcess,
    model: &ModelDescription,
    schema: &ParameterSchema,
    train: &TrainSection,
) -> Result<Built, EngineError> {
    let request = Request::Init { model: &model.config(), train: Train::from(train), seed: None };
    let built: Initialised = process.ask_in_time(&request)?;
    count_elements(&built.parameters).map_err(|reason| process.distrust(reason))?;
    let places = Places::new(schema, &built.parameters)?;
    Ok(Built { device: built.device, places, is_compiled: built.compiled })
}

/// All parameters, in canonical order.
pub(crate) fn read_whole(
    process: &mut TorchProcess,
    schema: &ParameterSchema,
    places: &Places,
) -> Result<Vec<f32>, EngineError> {
    let mut values = vec![0.0; schema.elements()];
    read_parameters(process, &places.pieces(&schema.whole()), &mut values)?;
    Ok(values)
}

fn read_parameters(process: &mut TorchProcess, pieces: &[Piece], values: &mut [f32]) -> Result<(), EngineError> {
    let mut layout = Layout::default();
    let place = layout.place(values.len());
    on_arena(process, &layout, |_| Ok(()))?;
    process.tell(&Request::Read { ranges: &TorchEngine::ranges(pieces), values: place })?;
    on_arena(process, &layout, |arena| arena.read(place, values))
}

fn on_arena<T>(
    process: &mut TorchProcess,
    layout: &Layout,
    act: impl FnOnce(&Arena) -> io::Result<T>,
) -> Result<T, EngineError> {
    let acted = act(process.arena(layout)?);
    acted.map_err(|error| process.arena_error(&error))
}

/// Writes canonical `values` of the whole model in Python's order.
fn write_pieces(arena: &Arena, offset: u64, pieces: &[Piece], values: &[f32]) -> io::Result<()> {
    let at = |piece: &Piece| offset + piece.theirs.start as u64 * ELEMENT_BYTES;
    pieces.iter().try_for_each(|piece| arena.write(at(piece), &values[piece.values.clone()]))
}

/// Reads what [`write_pieces`] writes.
fn read_pieces(arena: &Arena, offset: u64, pieces: &[Piece], values: &mut [f32]) -> io::Result<()> {
    let at = |piece: &Piece| offset + piece.theirs.start as u64 * ELEMENT_BYTES;
    pieces.iter().try_for_each(|piece| arena.read(at(piece), &mut values[piece.values.clone()]))
}

fn read_new(arena: &Arena, offset: u64, elements: usize) -> io::Result<Vec<f32>> {
    let mut values = vec![0.0; elements];
    arena.read(offset, &mut values)?;
    Ok(values)
}
