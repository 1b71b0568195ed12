//! What one site can do: for every layout that fits its memory, how many sequences it finishes in a given time.
//!
//! A step of m micro-batches takes a + b m seconds ([`crate::model::pipeline`]: the slowest stage sets b, filling, draining, gradients and
//! optimiser a). In T seconds a layout whose data-parallel ranks together take q sequences at once so finishes
//! ```text
//! sequences(T) = q floor((T - a) / b)
//! ```
//! (a batch that is no multiple of q leaves some ranks idle) and a site the most over its layouts. That function never falls where devices, memory or networks get better, because
//! they only add layouts or make a and b smaller; all of the search rests on it.

use super::{PlanError, SiteSpec, Task};
use crate::catalogue::{Device, Family};
use crate::model::constants::FITTED;
use crate::model::layout::{Layout, Overlap, Recompute, Stack};
use crate::model::memory::memory;
use crate::model::rates::Rates;
use crate::model::{Case, ModelError, Prediction, USABLE_MEMORY};
use crate::predict::{default_eager, default_interleave, default_overlap};
use crate::units::{Bytes, Seconds};

/// Micro-batches that are tried.
const MICRO_BATCHES: &[f64] = &[1.0, 2.0, 4.0, 8.0];

/// Fewest tokens of a sequence on one device where it is divided: attention's products are large enough then.
const CONTEXT_TOKENS_MIN: f64 = 4_096.0;

/// Degrees of context parallelism are below two to this power, those of expert parallelism likewise.
const CONTEXT_EXPONENTS: u32 = 7;
const EXPERT_EXPONENTS: u32 = 10;

/// Most pipeline stages that are tried.
const STAGES_MAX: f64 = 64.0;

/// Stages that are tried although the layers do not come out even.
const STAGES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0];

/// A micro-batch that ends this part of itself late is in time: what rounding leaves of a whole one.
const IN_TIME: f64 = 1e-9;

/// How a pipeline lies over kinds of devices.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement<'a> {
    /// One kind for all stages, or one for each stage.
    pub devices: Vec<&'a Device>,
    /// Layers of each stage where they are not even.
    pub layers: Option<Vec<f64>>,
}

/// One layout as a function of time.
#[derive(Debug, Clone, PartialEq)]
pub struct Line<'a> {
    /// The layout; its batch is one round of micro-batches.
    pub layout: Layout,
    /// Its devices.
    pub placement: Placement<'a>,
    /// Time before the first micro-batch counts, a.
    start: f64,
    /// Time of a micro-batch, b.
    each: f64,
    /// Sequences of a micro-batch over all ranks, q.
    quantum: f64,
}

impl Line<'_> {
    /// Sequences that it finishes in this time.
    pub fn sequences(&self, time: Seconds) -> f64 {
        self.quantum * ((time.0 - self.start) / self.each + IN_TIME).floor().max(0.0)
    }

    /// Time in which it finishes so many sequences.
    pub fn time_for(&self, sequences: f64) -> Seconds {
        Seconds(self.start + self.each * (sequences / self.quantum).ceil().max(1.0))
    }

    /// How many devices of each kind it takes.
    pub fn used(&self) -> Vec<(&Device, f64)> {
        let stage = self.layout.tp * self.layout.dp * self.layout.cp;
        let mut used: Vec<(&Device, f64)> = Vec::new();
        let stages = if self.placement.devices.len() == 1 { self.layout.pp } else { 1.0 };
        for device in &self.placement.devices {
            match used.iter_mut().find(|(known, _)| core::ptr::eq(*known, *device)) {
                Some((_, count)) => *count += stage * stages,
                None => used.push((device, stage * stages)),
            }
        }
        used
    }

    /// Whether it is never behind the other: k of its micro-batches hold as many sequences as one of the other's, take no longer, and the first k are
    /// there no later.
    fn dominates(&self, other: &Self) -> bool {
        let times = other.quantum / self.quantum;
        times.fract() == 0.0
            && times * self.each <= other.each
            && self.start + times * self.each <= other.start + other.each
    }
}

/// A site's layouts that no other of its layouts is always ahead of.
#[derive(Debug, Clone, Default)]
pub struct Ability<'a> {
    /// Those that fit memory.
    pub lines: Vec<Line<'a>>,
    /// Those that would be there if memory were unbounded.
    pub unbounded: Vec<Line<'a>>,
}

/// The most sequences that one of the layouts finishes in this time, and which.
pub fn most<'a, 'b>(lines: &'b [Line<'a>], time: Seconds) -> (f64, Option<&'b Line<'a>>) {
    lines.iter().fold((0.0, None), |best, line| {
        let sequences = line.sequences(time);
        if sequences > best.0 { (sequences, Some(line)) } else { best }
    })
}

fn insert<'a>(lines: &mut Vec<Line<'a>>, line: Line<'a>) {
    if lines.iter().any(|known| known.dominates(&line)) {
        return;
    }
    lines.retain(|known| !line.dominates(known));
    lines.push(line);
}

/// Everything that a site can do.
///
/// # Errors
/// No layout fits its devices' memory, or a figure that the model needs is unknown.
pub fn ability<'a>(task: &Task, site: &SiteSpec<'a>) -> Result<Ability<'a>, PlanError> {
    let mut ability = Ability::default();
    let mut leanest: Option<(Bytes, Bytes)> = None;
    for (placement, layout) in candidates(task, site)? {
        // Recomputing costs time and nothing else: it is tried where the layout does not fit without.
        for recompute in [Recompute::None, Recompute::Full] {
            let case = case(task, site, &placement, Layout { recompute, ..layout });
            if case.validate().is_err() {
                break;
            }
            let needed = memory(&case).total();
            let usable = least_memory(&placement.devices)? * USABLE_MEMORY;
            if leanest.is_none_or(|(least, of)| needed / usable < least / of) {
                leanest = Some((needed, usable));
            }
            let fits = needed <= usable;
            if recompute == Recompute::None {
                let line = line(&case, placement.clone())?;
                if fits {
                    insert(&mut ability.lines, line.clone());
                }
                insert(&mut ability.unbounded, line);
            } else if fits {
                insert(&mut ability.lines, line(&case, placement.clone())?);
            }
            if fits {
                break;
            }
        }
    }
    if ability.lines.is_empty() {
        return Err(refusal(task, site, leanest));
    }
    match site.measured {
        None => Ok(ability),
        Some(measured) => as_measured(task, site, &ability, measured),
    }
}

/// The fastest layout at the speed that was seen: a step takes its tokens over that speed, whatever was predicted, and any number of sequences.
fn as_measured<'a>(
    task: &Task,
    site: &SiteSpec<'a>,
    ability: &Ability<'a>,
    measured: f64,
) -> Result<Ability<'a>, PlanError> {
    let slowness = |line: &&Line<'_>| line.each / line.quantum;
    let fastest = ability.lines.iter().min_by(|left, right| slowness(left).total_cmp(&slowness(right)));
    let mut line = fastest.unwrap_or_else(|| unreachable!("a site with layouts")).clone();
    (line.start, line.each, line.quantum) = (0.0, task.shape.seq / measured, 1.0);
    let times = predict(task, site, &line, line.layout.global_batch)?.mfu;
    if times > 1.0 {
        return Err(PlanError::TooFast { site: site.name.clone(), measured, times });
    }
    Ok(Ability { lines: vec![line.clone()], unbounded: vec![line] })
}

/// Two predictions fix the line: with as many micro-batches as there are stages, and twice as many.
fn line<'a>(case: &Case<'a>, placement: Placement<'a>) -> Result<Line<'a>, ModelError> {
    let mut layout = case.layout;
    let quantum = layout.dp * layout.micro_batch;
    let few = case.layout.micro_batches();
    let seconds = |count: f64| -> Result<f64, ModelError> {
        let layout = Layout { global_batch: quantum * count, ..case.layout };
        Ok(Case { layout, ..case.clone() }.predict()?.step.0)
    };
    let (first, second) = (seconds(few)?, seconds(2.0 * few)?);
    let each = (second - first) / few;
    layout.global_batch = quantum;
    Ok(Line { layout, placement, start: first - each * few, each, quantum })
}

/// A layout's prediction for a batch.
///
/// # Errors
/// A figure that the model needs is unknown.
pub fn predict(task: &Task, site: &SiteSpec<'_>, line: &Line<'_>, sequences: f64) -> Result<Prediction, PlanError> {
    let layout = Layout { global_batch: sequences.max(1.0), ..line.layout };
    let predicted = case(task, site, &line.placement, layout).predict()?;
    let Some(measured) = site.measured else { return Ok(predicted) };
    let step = Seconds(layout.global_batch * task.shape.seq / measured);
    let faster = predicted.step / step;
    Ok(Prediction {
        step,
        tokens_per_second_per_device: predicted.tokens_per_second_per_device * faster,
        useful: predicted.useful * faster,
        mfu: predicted.mfu * faster,
        ..predicted
    })
}

fn case<'a>(task: &Task, site: &SiteSpec<'a>, placement: &Placement<'a>, layout: Layout) -> Case<'a> {
    Case {
        shape: task.shape,
        layout,
        precision: site.precision,
        devices: placement.devices.clone(),
        stage_layers: placement.layers.clone(),
        devices_per_node: f64::from(site.devices_per_node),
        network: site.network,
    }
}

fn least_memory(devices: &[&Device]) -> Result<Bytes, ModelError> {
    devices.iter().try_fold(Bytes(f64::INFINITY), |least, device| {
        let memory = device.memory();
        let unknown = ModelError::UnknownFigure { device: device.name.clone(), key: "memory_gib" };
        memory.map(|memory| least.min(memory)).ok_or(unknown)
    })
}

/// Every layout over one kind of the site's devices, and over all its kinds in one pipeline.
fn candidates<'a>(task: &Task, site: &SiteSpec<'a>) -> Result<Vec<(Placement<'a>, Layout)>, PlanError> {
    let mut all = Vec::new();
    for group in &site.groups {
        let devices = site.powered(group);
        let placement = Placement { devices: vec![group.device], layers: None };
        all.extend(uniform(task, site, devices).into_iter().map(|layout| (placement.clone(), layout)));
    }
    if site.groups.len() > 1 {
        all.extend(unlike(task, site)?);
    }
    Ok(all)
}

/// Data-parallel degrees (8..=15) 2^k: at most an eighth of the devices stays idle, and a larger site has every degree of a smaller one.
fn degrees(most: f64) -> impl Iterator<Item = f64> {
    let small = (1..8).map(f64::from);
    let large = (0..28).flat_map(|exponent| (8..16).map(move |first| f64::from(first) * f64::from(exponent).exp2()));
    small.chain(large).take_while(move |degree| *degree <= most)
}

fn tensor_degrees(task: &Task, site: &SiteSpec<'_>) -> impl Iterator<Item = f64> + use<> {
    let most = f64::from(site.devices_per_node).min(task.shape.heads);
    (0..8).map(|exponent| f64::from(1u32 << exponent)).take_while(move |tp| *tp <= most)
}

fn uniform(task: &Task, site: &SiteSpec<'_>, devices: f64) -> Vec<Layout> {
    let layers = task.shape.layers;
    let counts = (1..=STAGES_MAX as u32).map(f64::from);
    let stages: Vec<f64> = counts.filter(|pp| *pp <= layers && (layers % pp == 0.0 || STAGES.contains(pp))).collect();
    let mut all = Vec::new();
    for tp in tensor_degrees(task, site) {
        for pp in stages.iter().copied().filter(|pp| tp * pp <= devices) {
            for cp in context_degrees(task).filter(|cp| tp * pp * cp <= devices) {
                let most = (devices / (tp * pp * cp)).floor().min(f64::from(task.global_batch));
                for dp in degrees(most) {
                    let interleave = default_interleave(layers, pp, Stack::Modern);
                    push_variants(task, site, Layout { tp, pp, dp, cp, interleave, ..base() }, &mut all);
                }
            }
        }
    }
    all
}

/// Powers of two that leave each part of a sequence [`CONTEXT_TOKENS_MIN`].
fn context_degrees(task: &Task) -> impl Iterator<Item = f64> + use<> {
    let most = (task.shape.seq / CONTEXT_TOKENS_MIN).max(1.0);
    (0..CONTEXT_EXPONENTS).map(|exponent| f64::from(1u32 << exponent)).take_while(move |cp| *cp <= most)
}

/// One pipeline over all kinds, each with as many stages as its devices give and layers in proportion to its speed.
fn unlike<'a>(task: &Task, site: &SiteSpec<'a>) -> Result<Vec<(Placement<'a>, Layout)>, PlanError> {
    let counts: Vec<f64> = site.groups.iter().map(|group| site.powered(group)).collect();
    let fewest = counts.iter().copied().fold(f64::INFINITY, f64::min);
    let mut all = Vec::new();
    for tp in tensor_degrees(task, site) {
        for dp in degrees((fewest / tp).floor().min(f64::from(task.global_batch))) {
            let stages: Vec<f64> = counts.iter().map(|count| (count / (tp * dp)).floor()).collect();
            let pp = stages.iter().sum::<f64>();
            if pp > STAGES_MAX.min(task.shape.layers) {
                continue;
            }
            let placement = placed(task, site, &stages)?;
            let mut layouts = Vec::new();
            push_variants(task, site, Layout { tp, pp, dp, ..base() }, &mut layouts);
            all.extend(layouts.into_iter().map(|layout| (placement.clone(), layout)));
        }
    }
    Ok(all)
}

/// Devices and layers of every stage: one layer at least, the rest by largest remainder of the stages' speeds.
fn placed<'a>(task: &Task, site: &SiteSpec<'a>, stages: &[f64]) -> Result<Placement<'a>, PlanError> {
    let mut devices = Vec::new();
    let mut speeds = Vec::new();
    for (group, count) in site.groups.iter().zip(stages) {
        let speed = Rates::of(group.device, site.precision, &FITTED)?.gemm.0;
        for _ in 0..*count as usize {
            devices.push(group.device);
            speeds.push(speed);
        }
    }
    let spare = task.shape.layers - devices.len() as f64;
    let sum: f64 = speeds.iter().sum();
    // A stage's part of all layers, less the one that it has in any case.
    let ideal: Vec<f64> = speeds.iter().map(|speed| (task.shape.layers * speed / sum - 1.0).max(0.0)).collect();
    let scale = spare / ideal.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let ideal: Vec<f64> = ideal.iter().map(|part| part * scale).collect();
    let mut layers: Vec<f64> = ideal.iter().map(|part| 1.0 + part.floor()).collect();
    let mut order: Vec<usize> = (0..ideal.len()).collect();
    order.sort_by(|left, right| ideal[*right].fract().total_cmp(&ideal[*left].fract()));
    let missing = task.shape.layers - layers.iter().sum::<f64>();
    for index in order.into_iter().cycle().take(missing.max(0.0) as usize) {
        layers[index] += 1.0;
    }
    Ok(Placement { devices, layers: Some(layers) })
}

fn base() -> Layout {
    Layout {
        tp: 1.0,
        pp: 1.0,
        dp: 1.0,
        cp: 1.0,
        ep: 1.0,
        zero: 1,
        micro_batch: 1.0,
        global_batch: 1.0,
        interleave: 1.0,
        recompute: Recompute::None,
        stack: Stack::Modern,
        overlap: Overlap::Data,
        sequence_parallel: true,
        eager: false,
        launch_blocking: false,
    }
}

/// Micro-batch, sharding and expert parallelism of one set of degrees; as many micro-batches as stages.
fn push_variants(task: &Task, site: &SiteSpec<'_>, layout: Layout, all: &mut Vec<Layout>) {
    let batch = f64::from(task.global_batch);
    let compiled = site.groups.iter().any(|group| group.device.family == Family::Tpu);
    for micro_batch in MICRO_BATCHES.iter().copied().filter(|micro_batch| micro_batch * layout.dp <= batch) {
        let global_batch = layout.dp * micro_batch * layout.pp;
        for zero in if layout.pp > 1.0 { &[1_u8][..] } else { &[1, 3][..] } {
            let overlap = default_overlap(layout.stack, site.precision, *zero);
            for ep in expert_groups(task.shape.experts, layout.dp) {
                let eager = default_eager(*zero, site.precision, compiled);
                all.push(Layout { micro_batch, global_batch, zero: *zero, ep, eager, overlap, ..layout });
            }
        }
    }
}

/// Powers of two that divide the experts and are no larger than data parallelism: few experts a device save memory, few nodes save time.
fn expert_groups(experts: f64, dp: f64) -> impl Iterator<Item = f64> {
    let groups = (0..EXPERT_EXPONENTS).map(|exponent| f64::from(1u32 << exponent));
    groups.filter(move |group| *group == 1.0 || (experts > 1.0 && experts % group == 0.0 && *group <= dp))
}

fn refusal(task: &Task, site: &SiteSpec<'_>, leanest: Option<(Bytes, Bytes)>) -> PlanError {
    let lit: f64 = site.groups.iter().map(|group| site.powered(group)).sum();
    let limited = site.groups.iter().any(|group| site.powered(group) < f64::from(group.devices));
    let all_kilowatts = site.kilowatts();
    if let (true, Some(limit), Some(all_kilowatts)) = (lit < 1.0, site.tariff.power_limit, all_kilowatts) {
        return PlanError::Dark { site: site.name.clone(), limit_kilowatts: limit.0 / 1e3, all_kilowatts };
    }
    let (needed, usable) = leanest.unwrap_or((Bytes(f64::INFINITY), Bytes::ZERO));
    let devices: u32 = site.groups.iter().map(|group| group.devices).sum();
    let devices_needed = devices_needed(task, site);
    let enough = devices_needed.filter(|needed| *needed <= devices && limited);
    PlanError::DoesNotFit {
        site: site.name.clone(),
        needed_gib: needed.gib(),
        usable_gib: usable.gib(),
        devices,
        devices_needed,
        sequence_that_fits: sequence_that_fits(task, site),
        kilowatts_needed: enough.zip(all_kilowatts).map(|(needed, all)| all * f64::from(needed) / f64::from(devices)),
    }
}

/// Whether one of the layouts over so many devices of the site's first kind fits, recomputation allowed.
fn fits(task: &Task, site: &SiteSpec<'_>, devices: f64) -> bool {
    let Some(group) = site.groups.first() else { return false };
    let Some(usable) = group.device.memory().map(|memory| memory * USABLE_MEMORY) else { return false };
    let placement = Placement { devices: vec![group.device], layers: None };
    uniform(task, site, devices).into_iter().any(|layout| {
        let case = case(task, site, &placement, Layout { recompute: Recompute::Full, ..layout });
        case.validate().is_ok() && memory(&case).total() <= usable
    })
}

/// The least number of devices of the site's first kind over which the model fits: layouts only come in with more of them.
fn devices_needed(task: &Task, site: &SiteSpec<'_>) -> Option<u32> {
    /// Powers of two that are tried: 2^27 are more devices than a site may have.
    const DOUBLINGS: u32 = 27;
    if !fits(task, site, f64::from(1_u32 << DOUBLINGS)) {
        return None;
    }
    let enough = (0..=DOUBLINGS).map(|exponent| 1_u32 << exponent).find(|most| fits(task, site, f64::from(*most)))?;
    Some(bisect(enough / 2, enough, |devices| fits(task, site, f64::from(devices))))
}

/// The longest sequence that fits the devices as they are, where a shorter one does.
fn sequence_that_fits(task: &Task, site: &SiteSpec<'_>) -> Option<u32> {
    let devices = site.powered(site.groups.first()?);
    let fits = |tokens: u32| {
        let shape = crate::model::shape::Transformer { seq: f64::from(tokens), ..task.shape };
        fits(&Task { shape, ..*task }, site, devices)
    };
    // The first length that does not fit is above the one that does.
    fits(1).then(|| bisect(1, task.shape.seq as u32, |tokens| !fits(tokens)) - 1)
}

/// The least number above `low` and up to `high` that does, where all above it do and `high` does.
fn bisect(low: u32, high: u32, does: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (low, high);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if does(middle) { high = middle } else { low = middle }
    }
    high
}
