//! One step inside a site: layers to micro-batch, micro-batches to pipeline, then gradients and optimiser.

use super::collectives::{Group, all_reduce, all_to_all, gather, send};
use super::constants::Constants;
use super::layout::{Layout, Overlap, Recompute, Stack, even_stages};
use super::memory::{memory, stage_parameters};
use super::operators;
use super::pipeline::pipeline;
use super::rates::{Links, Rates};
use super::shape::Transformer;
use super::{Case, ModelError, Prediction};
use crate::catalogue::Precision;
use crate::units::{Bytes, Seconds};

/// Backward starts about twice the kernels of forward.
const BACKWARD_LAUNCHES: f64 = 2.0;

/// Share of a pipeline transfer that stays exposed where the stack overlaps it.
const OVERLAPPED_SEND_EXPOSED: f64 = 0.2;

/// Time of a micro-batch, divided.
#[derive(Debug, Clone, Copy, Default)]
struct Time {
    compute: Seconds,
    communication: Seconds,
}

impl Time {
    fn total(self) -> Seconds {
        self.compute + self.communication
    }

    fn times(self, factor: f64) -> Self {
        Self { compute: self.compute * factor, communication: self.communication * factor }
    }

    fn plus(self, other: Self) -> Self {
        Self { compute: self.compute + other.compute, communication: self.communication + other.communication }
    }
}

/// One kind of device with all that its layers need.
struct Site<'a> {
    shape: &'a Transformer,
    layout: &'a Layout,
    rates: Rates,
    links: Links,
    constants: &'a Constants,
    precision: Precision,
    value_bytes: f64,
}

/// Predicts one step with these constants.
pub fn predict(case: &Case<'_>, constants: &Constants) -> Result<Prediction, ModelError> {
    case.validate()?;
    let sites = sites(case, constants)?;
    let layers = case.stage_layers.clone().unwrap_or_else(|| even_stages(case.shape.layers, case.layout.pp));
    let layer_times: Vec<Time> = sites.iter().map(Site::layer).collect();
    let stages: Vec<Time> = layers
        .iter()
        .enumerate()
        .map(|(index, layers)| {
            let site = index * sites.len() / layers_count(case);
            stage_time(&sites[site], layer_times[site], *layers, index, layers_count(case))
        })
        .collect();
    let micro_batches = case.layout.micro_batches();
    let totals: Vec<Seconds> = stages.iter().map(|time| time.total()).collect();
    let flow = pipeline(&totals, micro_batches, case.layout.interleave);
    let fullest = layers.iter().copied().fold(0.0, f64::max);
    let slowest = totals.iter().copied().fold(Seconds::ZERO, Seconds::max);
    let after = after_the_pipeline(case, &sites, fullest, slowest);
    // Devices of one scale-up domain start together; others wait for the slowest of them all.
    let domains = sites.first().map_or(1.0, |site| (case.layout.devices() / site.links.node).max(1.0));
    let jitter = 1.0 + constants.jitter_per_doubling * domains.log2();
    let step = (flow.total + after.total()) * jitter + among_hosts(case, constants);
    let sent: Seconds = stages.iter().map(|time| time.communication).sum();
    let communication = sent * micro_batches / stages.len() as f64 + after.communication;
    Ok(case.prediction(step, communication, flow.bubble, memory(case)))
}

/// What hosts do together once a step. One node's processes have it from shared memory; of many, all but one are waited for.
fn among_hosts(case: &Case<'_>, constants: &Constants) -> Seconds {
    let nodes = (case.layout.devices() / case.devices_per_node).max(1.0);
    Seconds(constants.step_overhead_seconds * (1.0 - 1.0 / nodes))
}

fn layers_count(case: &Case<'_>) -> usize {
    case.layout.pp as usize
}

fn sites<'a>(case: &'a Case<'_>, constants: &'a Constants) -> Result<Vec<Site<'a>>, ModelError> {
    case.devices
        .iter()
        .map(|device| {
            Ok(Site {
                shape: &case.shape,
                layout: &case.layout,
                rates: Rates::of(device, case.precision, constants)?,
                links: Links::of(device, case.devices_per_node, case.network)?,
                constants,
                precision: case.precision,
                value_bytes: case.precision.bytes(),
            })
        })
        .collect()
}

impl Site<'_> {
    /// A layer with its collectives, one micro-batch, forward and backward.
    fn layer(&self) -> Time {
        let device = operators::layer(self.shape, self.layout, self.precision, &self.rates, self.constants);
        let passes = if self.layout.recompute == Recompute::Full { 3.0 } else { 2.0 };
        let compute = device.forward + device.backward + device.recompute;
        let exchange = (self.tensor_parallel() + self.experts()) * passes + self.context_parallel();
        let time = Time { compute, communication: exchange + self.sharded_data(compute, passes) };
        let host = self.launches(1.0 + BACKWARD_LAUNCHES + (passes - 2.0));
        if self.layout.launch_blocking {
            return Time { compute: compute + host * self.constants.blocking_launch_factor, ..time };
        }
        // The host runs ahead of the device, but not perfectly: their times add as squares, so that the slower sets the pace and a near
        // tie costs more than either.
        let paced = Seconds(time.total().0.hypot(host.0));
        Time { compute: compute + (paced - time.total()), ..time }
    }

    /// Time in which the host starts the kernels of so many passes over a layer.
    fn launches(&self, passes: f64) -> Seconds {
        Seconds(self.constants.launch_microseconds_per_layer * 1e-6 * passes)
    }

    fn row(&self) -> Bytes {
        Bytes(self.layout.tokens(self.shape.seq) * self.shape.hidden * self.value_bytes)
    }

    /// Two all-reduces (or their halves, the sequence being split) each pass.
    fn tensor_parallel(&self) -> Seconds {
        let group = Group::placed(self.layout.tp, 1.0, self.links.node);
        let exposed = if self.layout.overlap == Overlap::Full { self.constants.overlapped_tensor_exposed } else { 1.0 };
        if self.layout.tp <= 1.0 {
            return Seconds::ZERO;
        }
        all_reduce(self.row(), group, &self.links, self.constants) * (2.0 * exposed)
    }

    /// Tokens to their experts and back.
    fn experts(&self) -> Seconds {
        let group = Group::placed(self.layout.ep, self.layout.tp, self.links.node);
        let bytes = self.row() * (self.shape.experts_per_token / self.layout.tp);
        let exposed = if self.layout.overlap == Overlap::Full { self.constants.overlapped_tensor_exposed } else { 1.0 };
        all_to_all(bytes, group, &self.links, self.constants) * (2.0 * exposed)
    }

    /// Keys and values around the ring, as far as attention does not hide them (Ring Attention, arXiv 2310.01889).
    fn context_parallel(&self) -> Seconds {
        let cp = self.layout.cp;
        if cp <= 1.0 {
            return Seconds::ZERO;
        }
        let group = Group::placed(cp, self.layout.tp, self.links.node);
        let blocks = self.row() * (2.0 * self.shape.kv_heads / self.shape.heads / self.layout.tp * (cp - 1.0));
        let moved = send(blocks, group.spans_nodes(), &self.links, self.constants) * 3.0;
        let square = 4.0 * self.layout.tokens(self.shape.seq) * self.shape.seq * self.shape.hidden / self.layout.tp;
        let hidden = crate::units::Flop(square * 0.5 * 3.5) / self.rates.attention_of(self.layout.eager);
        (moved - hidden).max(Seconds::ZERO)
    }

    /// Sharded parameters gathered and gradients scattered for each micro-batch (FSDP), less what computation hides.
    fn sharded_data(&self, compute: Seconds, passes: f64) -> Seconds {
        if self.layout.zero < 2 {
            return Seconds::ZERO;
        }
        let layer = stage_parameters(self.shape, self.layout, 1.0, false);
        let bytes = Bytes(layer * self.value_bytes);
        let mut group = self.data_group();
        if self.layout.stack == Stack::Classic && group.spans_nodes() {
            // DeepSpeed of 2021 gathers and scatters in one flat ring over all ranks: a node's boundary is crossed by one adapter.
            group.per_node = 1.0;
        }
        // Gathered once where only gradients are sharded, else for the backward pass as well; gradients are scattered once.
        let gathers = if self.layout.zero >= 3 { passes.min(2.0) } else { 1.0 };
        let moved = gather(bytes, group, &self.links, self.constants) * (gathers + 1.0);
        if self.layout.overlap == Overlap::None {
            return moved;
        }
        moved - (moved * self.constants.overlap_data).min(compute)
    }

    fn data_group(&self) -> Group {
        Group::placed(self.layout.dp * self.layout.cp, self.layout.tp, self.links.node)
    }
}

fn stage_time(site: &Site<'_>, layer: Time, layers: f64, index: usize, stages: usize) -> Time {
    let mut time = layer.times(layers);
    if index + 1 == stages {
        time.compute += operators::logits(site.shape, site.layout, &site.rates);
    }
    if stages > 1 {
        time = time.plus(Time { compute: Seconds::ZERO, communication: transfers(site) });
    }
    time
}

/// What one stage sends for a micro-batch: activations on, gradients back, for each chunk. Today's stacks send each tensor-parallel
/// rank's part only and overlap it in part.
fn transfers(site: &Site<'_>) -> Seconds {
    let layout = site.layout;
    let neighbours_are_far = layout.tp * layout.cp * layout.dp >= site.links.node;
    let exposed = if layout.overlap == Overlap::Full { OVERLAPPED_SEND_EXPOSED } else { 1.0 };
    let moved = send(site.row() / layout.tp, neighbours_are_far, &site.links, site.constants) * 2.0;
    (moved + stall_after_transfer(site)) * (layout.interleave * exposed)
}

/// Stacks of 2020 to 2022 synchronise host and device after each transfer, forward and backward (Megatron-LM's `p2p_communication.py`): the kernels
/// that follow start only as fast as the host then launches them. A host that waits for every kernel has no lead to lose.
fn stall_after_transfer(site: &Site<'_>) -> Seconds {
    if site.layout.stack == Stack::Modern || site.layout.launch_blocking {
        return Seconds::ZERO;
    }
    site.launches(1.0 + BACKWARD_LAUNCHES) * site.constants.transfer_stall_layers
}

/// Gradients to all data-parallel ranks, the optimiser, and its result back.
fn after_the_pipeline(case: &Case<'_>, sites: &[Site<'_>], layers: f64, window: Seconds) -> Time {
    let layout = &case.layout;
    let parameters = stage_parameters(&case.shape, layout, layers, true);
    let shards = if layout.zero >= 1 { layout.dp * layout.cp } else { 1.0 };
    let compute = sites
        .iter()
        .map(|site| operators::optimiser(parameters / shards, &site.rates))
        .fold(Seconds::ZERO, Seconds::max);
    let communication = sites.iter().map(|site| gradients(site, layers)).fold(Seconds::ZERO, Seconds::max);
    let hidden = match layout.overlap {
        Overlap::None => Seconds::ZERO,
        // The last micro-batch's backward and the next step's first forward.
        Overlap::Data | Overlap::Full => {
            let share = sites.first().map_or(0.0, |site| site.constants.overlap_data);
            (communication * share).min(window)
        }
    };
    Time { compute, communication: communication - hidden }
}

/// All gradients of the fullest stage, unsharded strategies only; FSDP moved them with each layer.
fn gradients(site: &Site<'_>, layers: f64) -> Seconds {
    let layout = site.layout;
    if layout.zero >= 2 {
        return Seconds::ZERO;
    }
    let ends = stage_parameters(site.shape, layout, 0.0, true);
    let dense = site.shape.shared_layer_parameters() / layout.tp * layers + ends;
    let experts = stage_parameters(site.shape, layout, layers, true) - dense;
    // Loss-scaled fp16 stacks of fused kernels reduce 16-bit gradients; today's, and plain modules under automatic mixed precision, f32.
    let is_narrow = layout.stack == Stack::Classic && !layout.eager;
    let gradient_bytes = if is_narrow { site.value_bytes } else { 4.0 };
    let group = site.data_group();
    let among_experts = Group { size: (group.size / layout.ep).max(1.0), ..group };
    let both = |parameters: f64, group: Group| {
        let reduced = gather(Bytes(parameters * gradient_bytes), group, &site.links, site.constants);
        let returned_bytes = if layout.zero == 0 { gradient_bytes } else { site.value_bytes };
        reduced + gather(Bytes(parameters * returned_bytes), group, &site.links, site.constants)
    };
    if site.shape.experts > 1.0 {
        return both(dense, group) + both(experts.max(0.0), among_experts);
    }
    both(dense + experts.max(0.0), group)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalogue::{Catalogue, Device, Precision};
    use crate::model::constants::FITTED;
    use crate::units::BitsPerSecond;

    fn case<'a>(device: &'a Device, layout: Layout) -> Case<'a> {
        Case {
            shape: Transformer {
                layers: 24.0,
                hidden: 2048.0,
                ffn: 8192.0,
                heads: 16.0,
                kv_heads: 16.0,
                vocab: 51_200.0,
                seq: 2048.0,
                experts: 1.0,
                experts_per_token: 1.0,
                gated: false,
            },
            layout,
            precision: Precision::Bf16,
            devices: vec![device],
            stage_layers: None,
            devices_per_node: 8.0,
            network: BitsPerSecond::from_gigabits(200.0),
        }
    }

    fn layout() -> Layout {
        Layout {
            tp: 1.0,
            pp: 1.0,
            dp: 8.0,
            cp: 1.0,
            ep: 1.0,
            zero: 0,
            micro_batch: 1.0,
            global_batch: 64.0,
            interleave: 1.0,
            recompute: Recompute::None,
            stack: Stack::Classic,
            overlap: Overlap::None,
            sequence_parallel: false,
            eager: false,
            launch_blocking: false,
        }
    }

    fn step(case: &Case<'_>, constants: &Constants) -> f64 {
        case.predict_with(constants).unwrap().step.0
    }

    #[test]
    fn hosts_of_one_node_wait_for_nobody() {
        let catalogue = Catalogue::built_in();
        let device = catalogue.find("A100").unwrap();
        let slower = Constants { step_overhead_seconds: 1.0, jitter_per_doubling: 0.05, ..FITTED };
        let one = case(device, layout());
        assert_eq!(step(&one, &FITTED), step(&one, &slower));
        let two = case(device, Layout { dp: 16.0, global_batch: 128.0, ..layout() });
        assert!(step(&two, &slower) > step(&two, &FITTED) + 0.4);
    }

    #[test]
    fn a_transfer_costs_the_hosts_lead_only_where_it_synchronises_and_has_one() {
        let catalogue = Catalogue::built_in();
        let device = catalogue.find("A100").unwrap();
        let stalls = Constants { transfer_stall_layers: 5.0, ..FITTED };
        let extra = |layout: Layout| {
            let case = case(device, layout);
            step(&case, &stalls) - step(&case, &FITTED)
        };
        let staged = Layout { pp: 4.0, dp: 2.0, ..layout() };
        assert!(extra(staged) > 0.0);
        assert_eq!(extra(layout()), 0.0);
        assert_eq!(extra(Layout { stack: Stack::Modern, ..staged }), 0.0);
        assert_eq!(extra(Layout { launch_blocking: true, ..staged }), 0.0);
    }

    #[test]
    fn old_sharding_crosses_nodes_through_one_adapter_each() {
        let catalogue = Catalogue::built_in();
        let device = catalogue.find("A100").unwrap();
        let moved = |dp: f64, stack: Stack| {
            let case = case(device, Layout { dp, global_batch: dp, zero: 3, stack, ..layout() });
            let sites = sites(&case, &FITTED).unwrap();
            sites[0].sharded_data(Seconds::ZERO, 2.0).0
        };
        assert_eq!(moved(8.0, Stack::Classic), moved(8.0, Stack::Modern));
        assert!(moved(64.0, Stack::Classic) > 3.0 * moved(64.0, Stack::Modern));
    }

    #[test]
    fn gradients_of_the_embedding_are_reduced_too_and_plain_modules_reduce_f32() {
        let catalogue = Catalogue::built_in();
        let device = catalogue.find("A100").unwrap();
        let reduced = |vocab: f64, eager: bool| {
            let mut case = case(device, Layout { dp: 64.0, global_batch: 64.0, eager, ..layout() });
            case.shape.vocab = vocab;
            let sites = sites(&case, &FITTED).unwrap();
            gradients(&sites[0], case.shape.layers).0
        };
        let per_parameter = |few: f64, many: f64| many / few;
        let (small, large) = (reduced(1024.0, false), reduced(513_024.0, false));
        // 24 layers of 12 h^2 are 1.21e9 parameters, half a million tokens of 2,048 are 1.05e9.
        assert!((1.8..1.95).contains(&per_parameter(small, large)), "{small} {large}");
        assert!((1.9..2.01).contains(&per_parameter(small, reduced(1024.0, true))));
    }
}
