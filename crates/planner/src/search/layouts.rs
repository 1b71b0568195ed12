//! The fastest layout of one site that fits its memory.

use super::{PlanError, SitePlan, SiteSpec, Task};
use crate::model::layout::{Layout, Overlap, Recompute, Stack};
use crate::model::memory::memory;
use crate::model::{Case, Prediction, USABLE_MEMORY};
use crate::predict::default_interleave;
use crate::units::Bytes;

/// Micro-batches that are tried.
const MICRO_BATCHES: &[f64] = &[1.0, 2.0, 4.0, 8.0];

/// Most pipeline stages that are tried.
const STAGES_MAX: f64 = 64.0;

/// Data-parallel degrees (8..=15) 2^k: at most an eighth of the devices stays idle, and a larger site has every degree of a smaller one.
fn degrees(most: f64) -> impl Iterator<Item = f64> {
    let small = (1..8).map(f64::from);
    let large = (0..28).flat_map(|exponent| (8..16).map(move |first| f64::from(first) * f64::from(exponent).exp2()));
    small.chain(large).take_while(move |degree| *degree <= most)
}

/// Fewest data-parallel degrees below the largest possible one that are tried: smaller ones leave most of the site idle.
const IDLE_MAX: f64 = 0.5;

/// The best layout of a site for this share of the batch.
pub fn best_layout(task: &Task, site: &SiteSpec<'_>, share: f64) -> Result<SitePlan, PlanError> {
    let batch = (f64::from(task.global_batch) * share).round().max(1.0);
    let mut best: Option<(Layout, Prediction)> = None;
    let mut unbounded = 0.0_f64;
    let mut leanest: Option<Bytes> = None;
    for layout in candidates(task, site, batch) {
        let case = case(task, site, layout);
        if case.validate().is_err() {
            continue;
        }
        let prediction = case.predict()?;
        let speed = tokens_per_second(task, &layout, &prediction);
        unbounded = unbounded.max(speed);
        leanest = Some(leanest.map_or(prediction.memory.total(), |least| least.min(prediction.memory.total())));
        let faster =
            best.as_ref().is_none_or(|(layout, prediction)| speed > tokens_per_second(task, layout, prediction));
        if prediction.fits == Some(true) && faster {
            best = Some((layout, prediction));
        }
    }
    let Some((layout, prediction)) = best else { return Err(refusal(task, site, leanest)) };
    let speed = tokens_per_second(task, &layout, &prediction);
    Ok(SitePlan {
        name: site.name.clone(),
        layout,
        prediction,
        share,
        tokens_per_second: speed,
        memory_gain: unbounded / speed,
    })
}

fn tokens_per_second(task: &Task, layout: &Layout, prediction: &Prediction) -> f64 {
    layout.global_batch * task.shape.seq / prediction.step.0
}

fn case<'a>(task: &Task, site: &SiteSpec<'a>, layout: Layout) -> Case<'a> {
    Case {
        shape: task.shape,
        layout,
        precision: site.precision,
        devices: vec![site.device],
        stage_layers: None,
        devices_per_node: f64::from(site.devices_per_node),
        network: site.network,
    }
}

fn candidates(task: &Task, site: &SiteSpec<'_>, batch: f64) -> Vec<Layout> {
    let devices = f64::from(site.devices);
    let node = f64::from(site.devices_per_node);
    let mut all = Vec::new();
    for tp in (0..8).map(|exponent| f64::from(1u32 << exponent)).filter(|tp| *tp <= node.min(task.shape.heads)) {
        for pp in
            (1..=STAGES_MAX as u32).map(f64::from).filter(|pp| task.shape.layers % pp == 0.0 && tp * pp <= devices)
        {
            let most = (devices / (tp * pp)).floor().min(batch);
            for dp in degrees(most).filter(|dp| *dp >= most * IDLE_MAX) {
                push_variants(task, Layout { tp, pp, dp, ..base(task, batch, pp) }, &mut all);
            }
        }
    }
    all
}

fn base(task: &Task, batch: f64, pp: f64) -> Layout {
    Layout {
        tp: 1.0,
        pp,
        dp: 1.0,
        cp: 1.0,
        ep: 1.0,
        zero: 1,
        micro_batch: 1.0,
        global_batch: batch,
        interleave: default_interleave(task.shape.layers, pp, Stack::Modern),
        recompute: Recompute::None,
        stack: Stack::Modern,
        overlap: Overlap::Data,
        sequence_parallel: true,
        eager: false,
        launch_blocking: false,
    }
}

/// Micro-batch, recomputation, sharding and expert parallelism of one set of degrees.
fn push_variants(task: &Task, layout: Layout, all: &mut Vec<Layout>) {
    let local = layout.global_batch / layout.dp;
    for micro_batch in MICRO_BATCHES.iter().copied().filter(|micro_batch| *micro_batch <= local.ceil()) {
        for recompute in [Recompute::None, Recompute::Full] {
            for zero in if layout.pp > 1.0 { &[1_u8][..] } else { &[1, 3][..] } {
                let ep = if task.shape.experts > 1.0 { largest_group(task.shape.experts, layout.dp) } else { 1.0 };
                all.push(Layout { micro_batch, recompute, zero: *zero, ep, eager: *zero == 3, ..layout });
            }
        }
    }
}

/// The largest power of two that divides the experts and is no larger than data parallelism.
fn largest_group(experts: f64, dp: f64) -> f64 {
    let groups = (0..10).map(|exponent| f64::from(1u32 << exponent));
    groups.filter(|group| experts % group == 0.0 && *group <= dp).fold(1.0, f64::max)
}

fn refusal(task: &Task, site: &SiteSpec<'_>, leanest: Option<Bytes>) -> PlanError {
    let Some(memory_of_one) = site.device.memory() else {
        return crate::model::ModelError::UnknownFigure { device: site.device.name.clone(), key: "memory_gib" }.into();
    };
    let usable = memory_of_one * USABLE_MEMORY;
    PlanError::DoesNotFit {
        site: site.name.clone(),
        needed_gib: leanest.map_or(f64::INFINITY, Bytes::gib),
        usable_gib: usable.gib(),
        devices_factor: enough_devices(task, site, usable),
    }
}

/// The least power of two times its devices with which full sharding and recomputation fit.
fn enough_devices(task: &Task, site: &SiteSpec<'_>, usable: Bytes) -> Option<f64> {
    (1..12).map(|exponent| f64::from(1u32 << exponent)).find(|factor| {
        let tp = f64::from(site.devices_per_node).min(task.shape.heads);
        let layout = Layout {
            tp,
            dp: (f64::from(site.devices) * factor / tp).max(1.0),
            zero: 3,
            recompute: Recompute::Full,
            ..base(task, f64::from(task.global_batch), 1.0)
        };
        memory(&case(task, site, layout)).total() <= usable
    })
}
