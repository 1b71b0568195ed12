//! The plans as text for a terminal.

use super::Planned;
use crate::format::count;
use planner::model::layout::Recompute;
use planner::search::between::Way;
use planner::search::{Objective, Plan, SitePlan};
use planner::wan::Exchange;
use std::fmt::Write;

/// Alternatives that are told of the best plan.
const ALTERNATIVES_MAX: usize = 8;

/// The whole report.
pub(super) fn of(planned: &Planned) -> String {
    let shape = &planned.task.shape;
    let mut text = String::new();
    // Writing into a string cannot fail, here and below.
    let _ = writeln!(
        text,
        "model   {}: {} parameters{}, {} layers of {}, sequences of {}",
        planned.model,
        short(shape.parameters()),
        if shape.experts > 1.0 { format!(", {} active", short(shape.active_parameters())) } else { String::new() },
        shape.layers,
        whole(shape.hidden),
        whole(shape.seq)
    );
    let _ = writeln!(
        text,
        "work    {} tokens in batches of {} sequences, {} tokens",
        short(planned.task.tokens),
        whole(f64::from(planned.task.global_batch)),
        short(f64::from(planned.task.global_batch) * shape.seq)
    );
    for (index, plan) in planned.plans.iter().enumerate() {
        text.push('\n');
        if index == 0 { best(&mut text, planned, plan) } else { next_best(&mut text, planned, plan, index) }
    }
    changes(&mut text, planned);
    text
}

fn best(text: &mut String, planned: &Planned, plan: &Plan) {
    let _ = writeln!(text, "plan 1  least {}: {}", planned.wish.objective.name(), way(planned, plan));
    let _ = writeln!(text, "        {}", sums(plan));
    text.push('\n');
    text.push_str(&columns(&sites(plan)));
    for link in &plan.links {
        let (one, other) = &link.between;
        let (mean, rate, percent) = (link.mean.gigabits(), link.rate.gigabits(), 100.0 * link.share);
        let _ = writeln!(
            text,
            "link {one} - {other}: {} of {rate} Gbit/s each way, {percent:.1} % of what it carries",
            short(mean)
        );
    }
    let _ = writeln!(text, "binds: {}", plan.binding.name());
    for reason in &plan.reasons {
        let _ = writeln!(text, "why: {reason}");
    }
    for site in &plan.left_out {
        let _ = writeln!(text, "left out: {}: {}", site.name, site.why);
    }
    for other in plan.alternatives.iter().take(ALTERNATIVES_MAX) {
        let _ = writeln!(
            text,
            "otherwise: {}: {} ({})",
            other.what,
            more(planned, other.ratio),
            described(planned, &other.way)
        );
    }
}

fn next_best(text: &mut String, planned: &Planned, plan: &Plan, index: usize) {
    let names: Vec<&str> = plan.sites.iter().map(|site| site.name.as_str()).collect();
    let figure = |plan: &Plan| plan.figure(planned.wish.objective).unwrap_or(f64::NAN);
    let ratio = planned.plans.first().map_or(1.0, |best| figure(plan) / figure(best));
    let _ =
        writeln!(text, "plan {}  {}: {} ({})", index + 1, names.join(", "), way(planned, plan), more(planned, ratio));
    let _ = writeln!(text, "        {}", sums(plan));
}

fn more(planned: &Planned, ratio: f64) -> String {
    let figure = planned.wish.objective.name();
    let percent = 100.0 * (ratio - 1.0);
    if percent < -0.05 {
        return format!("{:.1} % less {figure}, but over a cap", -percent);
    }
    format!("{percent:.1} % more {figure}")
}

fn way(planned: &Planned, plan: &Plan) -> String {
    match plan.sites.len() {
        1 => format!("{} alone", plan.sites[0].name),
        sites => format!("{sites} sites, {}", described(planned, &plan.way)),
    }
}

/// A way with what only the options know of it.
fn described(planned: &Planned, way: &Way) -> String {
    let density = planned.wish.given.density;
    let sparse = if density < 1.0 { format!(" of {:.3} % of the values", 100.0 * density) } else { String::new() };
    let met = match way.exchange {
        Exchange::Ring => ", around a ring",
        Exchange::UploadBound => ", over storage",
        // The way itself says so.
        Exchange::Mesh | Exchange::Sharded => "",
    };
    format!("{}{sparse}{met}", way.describe())
}

/// Speed, time, energy, money, carbon in one line.
fn sums(plan: &Plan) -> String {
    let mut sums = format!(
        "{} tokens/s, {} h for the tokens, {} h to the loss of data parallelism",
        short(plan.tokens_per_second),
        short(plan.time_for_tokens.hours()),
        short(plan.time_to_loss.hours())
    );
    for (objective, unit) in [(Objective::Energy, " kWh"), (Objective::Cost, " money"), (Objective::Carbon, " t CO2")] {
        if let Some(figure) = plan.figure(objective) {
            let _ = write!(sums, ", {}{unit}", short(figure));
        }
    }
    sums
}

fn sites(plan: &Plan) -> Vec<Vec<String>> {
    let header =
        ["site", "devices", "share", "layout", "step s", "MFU", "memory GiB", "tokens/s", "kWh", "money", "t CO2"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    let unknown = || "?".to_owned();
    rows.extend(plan.sites.iter().map(|site| {
        let devices = site.devices.iter().map(|(name, number)| format!("{} {name}", whole(*number)));
        vec![
            site.name.clone(),
            devices.collect::<Vec<_>>().join(" + "),
            format!("{:.1} %", 100.0 * site.share),
            layout(site),
            short(site.prediction.step.0),
            format!("{:.1} %", 100.0 * site.prediction.mfu),
            format!("{:.0} of {:.0}", site.prediction.memory.total().gib(), site.memory_of_device.gib()),
            short(site.tokens_per_second),
            site.account.energy.map_or_else(unknown, |energy| short(energy.kilowatt_hours())),
            site.account.cost.map_or_else(unknown, short),
            site.account.carbon.map_or_else(unknown, |carbon| short(carbon.tonnes())),
        ]
    }));
    rows
}

/// Degrees that are not 1, micro-batch, what is recomputed and sharded.
fn layout(site: &SitePlan) -> String {
    let layout = &site.layout;
    let degrees = [("tp", layout.tp), ("pp", layout.pp), ("dp", layout.dp), ("cp", layout.cp), ("ep", layout.ep)];
    let mut parts: Vec<String> =
        degrees.iter().filter(|(_, degree)| *degree > 1.0).map(|(name, degree)| format!("{name} {degree}")).collect();
    parts.push(format!("zero {}", layout.zero));
    parts.push(format!("micro {}", layout.micro_batch));
    if layout.recompute == Recompute::Full {
        parts.push("recompute".to_owned());
    }
    if let Some(layers) = &site.stage_layers {
        parts.push(format!("layers {}", runs(layers)));
    }
    parts.join(" ")
}

/// Layers of stages as runs: `4x9,4x11`.
fn runs(layers: &[f64]) -> String {
    let mut runs: Vec<(usize, f64)> = Vec::new();
    for stage in layers {
        match runs.last_mut() {
            Some((count, known)) if known == stage => *count += 1,
            _ => runs.push((1, *stage)),
        }
    }
    runs.iter().map(|(count, layers)| format!("{count}x{layers}")).collect::<Vec<_>>().join(",")
}

fn changes(text: &mut String, planned: &Planned) {
    let Some(best) = planned.plans.first() else { return };
    for (change, found) in &planned.changes {
        let _ = match found {
            Ok(plan) => {
                let figure = |plan: &Plan| plan.figure(planned.wish.objective).unwrap_or(f64::NAN);
                let percent = 100.0 * (figure(plan) / figure(best) - 1.0);
                let name = planned.wish.objective.name();
                writeln!(
                    text,
                    "\nwhat if {}: {percent:+.1} % {name}, {}\n        {}",
                    change.describe(),
                    way(planned, plan),
                    sums(plan)
                )
            }
            Err(failure) => {
                writeln!(text, "\nwhat if {}: {}\n        hint: {}", change.describe(), failure.message, failure.hint)
            }
        };
    }
}

/// Left-aligned first columns, two spaces between.
fn columns(rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().enumerate().map(|(column, cell)| format!("{cell:<0$}", width(column))).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn whole(number: f64) -> String {
    count(number.round() as u64)
}

/// Three or four digits with a unit of thousands: `1.234 M`.
fn short(number: f64) -> String {
    for (factor, unit) in [(1e15, "e15"), (1e12, " T"), (1e9, " G"), (1e6, " M")] {
        if number.abs() >= factor {
            return format!("{:.2}{unit}", number / factor);
        }
    }
    match number.abs() {
        large if large >= 1_000.0 => whole(number),
        large if large >= 100.0 => format!("{number:.0}"),
        large if large >= 1.0 => format!("{number:.1}"),
        _ => format!("{number:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_runs_are_counted() {
        let numbers = [0.0123, 9.96, 123.4, 12_345.6, 1.5e6, 70e9, 1.4e12].map(short);
        assert_eq!(numbers, ["0.012", "10.0", "123", "12,346", "1.50 M", "70.00 G", "1.40 T"]);
        assert_eq!(runs(&[9.0, 9.0, 11.0]), "2x9,1x11");
    }
}
