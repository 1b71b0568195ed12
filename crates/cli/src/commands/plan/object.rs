//! The plans as one JSON object. docs/plan.md describes its fields.

use super::Planned;
use planner::model::layout::Recompute;
use planner::search::account::Account;
use planner::search::{Plan, SitePlan};
use planner::wan::Exchange;
use serde_json::{Value, json};

/// The whole report.
pub(super) fn of(planned: &Planned) -> Value {
    let (shape, task) = (&planned.task.shape, &planned.task);
    json!({
        "model": planned.model,
        "parameters": shape.parameters(),
        "active_parameters": shape.active_parameters(),
        "tokens": task.tokens,
        "batch_sequences": task.global_batch,
        "sequence_tokens": shape.seq,
        "objective": planned.wish.objective.name(),
        "density": planned.wish.given.density,
        "plans": planned.plans.iter().map(plan).collect::<Vec<_>>(),
        "what_if": planned.changes.iter().map(|(change, found)| match found {
            Ok(best) => json!({ "change": change.describe(), "plan": plan(best) }),
            Err(failure) => json!({ "change": change.describe(), "error": failure.message, "hint": failure.hint }),
        }).collect::<Vec<_>>(),
    })
}

fn plan(plan: &Plan) -> Value {
    json!({
        "strategy": plan.way.strategy.name(),
        "inner_steps": plan.way.inner_steps,
        "fragments": plan.way.fragments,
        "overlap_steps": plan.way.overlap_steps,
        "bits": plan.way.bits,
        "exchange": match plan.way.exchange {
            Exchange::Mesh => "mesh",
            Exchange::Sharded => "sharded",
            Exchange::Ring => "ring",
            Exchange::UploadBound => "storage",
        },
        "step_seconds": plan.step.0,
        "round_seconds": plan.round.total().0,
        "transfer_seconds": plan.round.transfer.0,
        "stall_seconds": plan.round.stall.0,
        "utilisation": plan.round.utilisation,
        "sent_bytes_per_site_and_round": plan.round.sent.0,
        "tokens_per_second": plan.tokens_per_second,
        "tokens_factor": plan.tokens_factor,
        "tokens_factor_extrapolated": plan.extrapolated,
        "hours_for_tokens": plan.time_for_tokens.hours(),
        "hours_to_loss": plan.time_to_loss.hours(),
        "totals": account(&plan.account),
        "binding": plan.binding.name(),
        "reasons": plan.reasons,
        "sites": plan.sites.iter().map(site).collect::<Vec<_>>(),
        "links": plan.links.iter().map(|link| json!({
            "between": [link.between.0, link.between.1],
            "gbit_s": link.rate.gigabits(),
            "mean_gbit_s": link.mean.gigabits(),
            "share": link.share,
        })).collect::<Vec<_>>(),
        "left_out": plan.left_out.iter().map(|site| json!({ "name": site.name, "why": site.why })).collect::<Vec<_>>(),
        "alternatives": plan.alternatives.iter().map(|other| json!({
            "what": other.what, "way": other.way.describe(), "ratio": other.ratio,
        })).collect::<Vec<_>>(),
    })
}

fn site(site: &SitePlan) -> Value {
    let layout = &site.layout;
    json!({
        "name": site.name,
        "devices": site.devices.iter().map(|(device, count)| json!({ "device": device, "count": count })).collect::<Vec<_>>(),
        "share": site.share,
        "sequences": layout.global_batch,
        "tp": layout.tp,
        "pp": layout.pp,
        "dp": layout.dp,
        "cp": layout.cp,
        "ep": layout.ep,
        "zero": layout.zero,
        "micro_batch": layout.micro_batch,
        "interleave": layout.interleave,
        "recompute": if layout.recompute == Recompute::Full { "full" } else { "none" },
        "stage_layers": site.stage_layers,
        "step_seconds": site.prediction.step.0,
        "tokens_per_second": site.tokens_per_second,
        "mfu": site.prediction.mfu,
        "memory_gib": site.prediction.memory.total().gib(),
        "memory_gib_of_device": site.memory_of_device.gib(),
        "compute_share": site.prediction.compute_share,
        "communication_share": site.prediction.communication_share,
        "bubble_share": site.prediction.bubble_share,
        "totals": account(&site.account),
    })
}

/// Unknown is null.
fn account(account: &Account) -> Value {
    json!({
        "kwh": account.energy.map(|energy| energy.kilowatt_hours()),
        "cost": account.cost,
        "carbon_tonnes": account.carbon.map(|carbon| carbon.tonnes()),
    })
}
