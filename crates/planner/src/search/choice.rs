//! Choosing among what was tried: the least within the caps, why it is so, and what the next best would lose.

use super::account::device_power;
use super::between::Strategy;
use super::layouts::predict;
use super::teams::{Able, AbleSites, Candidate, Candidates, Team, powers, site_account};
use super::{
    Alternative, Binding, LeftOut, LinkUse, Links, Objective, Plan, PlanError, SitePlan, Task, Wish, figure_of,
};
use crate::model::Prediction;
use crate::units::{BitsPerSecond, Bytes, Seconds};

/// Utilisation below which the links are what binds.
const LINK_BINDS: f64 = 0.9;

/// A gain by more memory above which memory is what binds.
const MEMORY_BINDS: f64 = 1.05;

/// Share of inner steps above which communication inside the sites is what binds.
const INNER_BINDS: f64 = 0.3;

/// Share of inner steps in which pipelines wait above which the batch is what binds.
const BATCH_BINDS: f64 = 0.3;

/// Share of a plan's devices that power limits leave on, below which power is what binds.
const POWER_BINDS: f64 = 0.95;

/// Refuses a wish for figures that some site does not know.
pub(super) fn known(wish: &Wish, sites: &AbleSites<'_, '_>) -> Result<(), PlanError> {
    for objective in Objective::ALL {
        if wish.objective != objective && wish.caps.of(objective).is_none() {
            continue;
        }
        for able in &sites.able {
            let tariff = &able.site.tariff;
            let unknown = |what, key| Err(PlanError::UnknownTariff { site: able.site.name.clone(), what, key });
            let power = able.site.groups.iter().all(|group| device_power(tariff, group).is_some());
            let priced = tariff.device_hour.is_some() || tariff.kilowatt_hour.is_some();
            match objective {
                Objective::Time => {}
                Objective::Cost if !priced => return unknown("the price", "price_per_device_hour or price_per_kwh"),
                Objective::Cost if tariff.kilowatt_hour.is_none() => {}
                Objective::Carbon if tariff.carbon_per_kilowatt_hour.is_none() => {
                    return unknown("the carbon of a kWh", "carbon_g_per_kwh");
                }
                _ if !power => return unknown("the power", "power_w_per_device"),
                _ => {}
            }
        }
    }
    Ok(())
}

/// The best plans of what was tried.
pub(super) fn choose(
    task: &Task,
    sites: &AbleSites<'_, '_>,
    links: &Links,
    wish: &Wish,
    tried: &Candidates,
) -> Result<Vec<Plan>, PlanError> {
    if tried.all.is_empty() {
        return Err(PlanError::Batch { sequences: task.global_batch });
    }
    let within = |candidate: &&Candidate| exceeded(wish, candidate).next().is_none();
    let mut best: Vec<Option<&Candidate>> = vec![None; tried.teams.len()];
    for candidate in tried.all.iter().filter(within) {
        let slot = &mut best[candidate.team];
        // The first of equals: ways come with the least loss of information first.
        if slot.is_none_or(|known| score(wish, candidate) < score(wish, known)) {
            *slot = Some(candidate);
        }
    }
    let mut best: Vec<&Candidate> = best.into_iter().flatten().collect();
    if best.is_empty() {
        return Err(caps_refusal(wish, tried));
    }
    best.sort_by(|left, right| score(wish, left).total_cmp(&score(wish, right)));
    best.truncate(wish.count.max(1));
    best.into_iter().map(|candidate| plan(task, sites, links, wish, tried, candidate)).collect()
}

fn score(wish: &Wish, candidate: &Candidate) -> f64 {
    candidate.figure(wish.objective).unwrap_or(f64::INFINITY)
}

fn exceeded<'a>(wish: &'a Wish, candidate: &'a Candidate) -> impl Iterator<Item = Objective> + 'a {
    Objective::ALL.into_iter().filter(move |objective| {
        let cap = wish.caps.of(*objective);
        cap.is_some_and(|cap| candidate.figure(*objective).is_none_or(|figure| figure > cap))
    })
}

/// The option that sets a cap.
fn option(objective: Objective) -> &'static str {
    match objective {
        Objective::Time => "--max-hours",
        Objective::Cost => "--max-cost",
        Objective::Energy => "--max-kwh",
        Objective::Carbon => "--max-carbon",
    }
}

fn caps_refusal(wish: &Wish, tried: &Candidates) -> PlanError {
    let least = |objective: Objective, others: bool| {
        let free = |candidate: &&Candidate| !others || exceeded(wish, candidate).all(|other| other == objective);
        tried.all.iter().filter(free).filter_map(|candidate| candidate.figure(objective)).reduce(f64::min)
    };
    let capped = Objective::ALL.into_iter().filter_map(|objective| Some((objective, wish.caps.of(objective)?)));
    let mut conflicts = Vec::new();
    for (objective, cap) in capped {
        let (unit, option) = (objective.unit(), option(objective));
        match (least(objective, false), least(objective, true)) {
            (Some(least), _) if least > cap => return PlanError::OutOfReach { cap, least, unit, option },
            (_, Some(least)) => conflicts.push(format!(
                "{option} {}: the others allow {} {unit} at least",
                figure_of(cap),
                figure_of(least)
            )),
            (_, None) => conflicts.push(format!("{option} {}: the others allow nothing at all", figure_of(cap))),
        }
    }
    PlanError::Contradictory { conflicts }
}

fn plan(
    task: &Task,
    sites: &AbleSites<'_, '_>,
    links: &Links,
    wish: &Wish,
    tried: &Candidates,
    chosen: &Candidate,
) -> Result<Plan, PlanError> {
    let team = &tried.teams[chosen.team];
    let parts: Result<Vec<SitePlan>, PlanError> = team
        .parts
        .iter()
        .map(|part| site_plan(task, &sites.able[part.able], (part.line, part.sequences), team.step, chosen))
        .collect();
    let mut plan = Plan {
        sites: parts?,
        left_out: left_out(sites, tried, team),
        way: chosen.judged.way,
        step: team.step,
        round: chosen.judged.round,
        links: link_uses(sites, links, team, chosen),
        tokens_per_second: task.tokens * chosen.judged.loss.tokens / chosen.time.0,
        tokens_factor: chosen.judged.loss.tokens,
        extrapolated: chosen.judged.loss.extrapolated,
        time_for_tokens: Seconds(chosen.time.0 / chosen.judged.loss.tokens),
        time_to_loss: chosen.time,
        account: chosen.account,
        binding: Binding::Compute,
        reasons: Vec::new(),
        alternatives: alternatives(sites, wish, tried, chosen),
    };
    plan.binding = binding(&plan, sites, team);
    plan.reasons = reasons(&plan, team);
    Ok(plan)
}

fn site_plan(
    task: &Task,
    able: &Able<'_, '_>,
    (line, sequences): (usize, f64),
    step: Seconds,
    chosen: &Candidate,
) -> Result<SitePlan, PlanError> {
    let place = line;
    let line = &able.ability.lines[place];
    let prediction = predict(task, able.site, line, sequences.round())?;
    let memory = line.placement.devices.iter().filter_map(|device| device.memory());
    let powers = powers(able, place);
    Ok(SitePlan {
        name: able.site.name.clone(),
        layout: crate::model::layout::Layout { global_batch: sequences, ..line.layout },
        devices: line.used().into_iter().map(|(device, count)| (device.name.clone(), count)).collect(),
        stage_layers: line.placement.layers.clone(),
        prediction,
        memory_of_device: memory.fold(Bytes(f64::INFINITY), Bytes::min),
        share: sequences / f64::from(task.global_batch),
        tokens_per_second: sequences * task.shape.seq / step.0,
        account: site_account(task, able, &powers, &chosen.judged, chosen.time),
    })
}

fn left_out(sites: &AbleSites<'_, '_>, tried: &Candidates, team: &Team) -> Vec<LeftOut> {
    let members = team.members();
    let rest = sites.able.iter().enumerate().filter(|(place, _)| !members.contains(place));
    let slower = rest.map(|(place, able)| {
        let joins = |other: &Team| {
            let others = other.members();
            others.contains(&place) && members.iter().all(|member| others.contains(member))
        };
        let why = if tried.teams.iter().any(joins) {
            "it would cost more than it brings"
        } else {
            "the others are through with a step before it has done one micro-batch"
        };
        LeftOut { name: able.site.name.clone(), why: why.to_owned() }
    });
    slower.chain(sites.unable.iter().cloned()).collect()
}

fn link_uses(sites: &AbleSites<'_, '_>, links: &Links, team: &Team, chosen: &Candidate) -> Vec<LinkUse> {
    let members = team.members();
    let others = (members.len() as f64 - 1.0).max(1.0);
    let mean =
        BitsPerSecond::from_bytes_per_second(chosen.judged.round.sent * (1.0 / others) / chosen.judged.round.total());
    let mut uses = Vec::new();
    for (index, one) in members.iter().enumerate() {
        for other in &members[index + 1..] {
            let (one, other) = (&sites.able[*one], &sites.able[*other]);
            let Some(link) = links.between(one.place, other.place) else { continue };
            let carried = BitsPerSecond::from_bytes_per_second(link.throughput(link.up.min(link.down)));
            let between = (one.site.name.clone(), other.site.name.clone());
            uses.push(LinkUse { between, rate: link.up.min(link.down), mean, share: mean / carried });
        }
    }
    uses
}

/// What is lost by another strategy, by finer numbers, by a site less, by a site more.
fn alternatives(sites: &AbleSites<'_, '_>, wish: &Wish, tried: &Candidates, chosen: &Candidate) -> Vec<Alternative> {
    let mut found = Vec::new();
    let mut offer = |what: String, suits: &dyn Fn(&Candidate) -> bool| {
        let least = tried.all.iter().filter(|candidate| suits(candidate));
        let least = least.reduce(|best, next| if score(wish, next) < score(wish, best) { next } else { best });
        if let Some(other) = least {
            let ratio = score(wish, other) / score(wish, chosen);
            found.push(Alternative { what, way: other.judged.way, ratio });
        }
    };
    let way = chosen.judged.way;
    let members = tried.teams[chosen.team].members();
    if members.len() > 1 {
        for strategy in [Strategy::Synchronous, Strategy::Diloco, Strategy::Streaming] {
            let same_team =
                |candidate: &Candidate| candidate.team == chosen.team && candidate.judged.way.strategy == strategy;
            if strategy != way.strategy {
                offer(format!("{} instead of {}", strategy.name(), way.strategy.name()), &same_team);
            }
        }
        if way.bits < 16 {
            offer("16 bits or more instead of a code".to_owned(), &|candidate| {
                candidate.team == chosen.team && candidate.judged.way.bits >= 16
            });
        }
    }
    let by_members = |wanted: Vec<usize>| tried.teams.iter().position(|team| team.members() == wanted);
    for (place, able) in sites.able.iter().enumerate() {
        let (other, what) = if members.contains(&place) {
            (members.iter().copied().filter(|member| *member != place).collect(), "without")
        } else {
            let mut more = members.clone();
            more.push(place);
            more.sort_unstable();
            (more, "with")
        };
        if let Some(team) = by_members(other) {
            offer(format!("{what} {}", able.site.name), &|candidate| candidate.team == team);
        }
    }
    found.sort_by(|left, right| left.ratio.total_cmp(&right.ratio));
    found
}

fn binding(plan: &Plan, sites: &AbleSites<'_, '_>, team: &Team) -> Binding {
    if plan.round.utilisation < LINK_BINDS {
        return Binding::Link;
    }
    let groups = team.parts.iter().flat_map(|part| {
        let site = sites.able[part.able].site;
        site.groups.iter().map(|group| (site.powered(group), f64::from(group.devices)))
    });
    let (on, all) = groups.fold((0.0, 0.0), |(on, all), (powered, devices)| (on + powered, all + devices));
    if on < all * POWER_BINDS {
        return Binding::Power;
    }
    if team.memory_gain > MEMORY_BINDS {
        return Binding::Memory;
    }
    let mean =
        |share: fn(&Prediction) -> f64| plan.sites.iter().map(|site| site.share * share(&site.prediction)).sum::<f64>();
    let (inner, waiting) = (mean(|site| site.communication_share), mean(|site| site.bubble_share));
    match (inner > INNER_BINDS, waiting > BATCH_BINDS) {
        (_, true) if waiting > inner => Binding::Batch,
        (true, _) => Binding::InnerCommunication,
        (false, _) => Binding::Compute,
    }
}

fn reasons(plan: &Plan, team: &Team) -> Vec<String> {
    let mut reasons = Vec::new();
    if plan.sites.len() > 1 {
        reasons.push(format!(
            "{:.1} % of a round is inner steps: of {:.1} s of transfers {:.1} s stall",
            100.0 * plan.round.utilisation,
            plan.round.transfer.0,
            plan.round.stall.0
        ));
    }
    reasons.push(binding_reason(plan, team));
    if plan.sites.len() > 1 && plan.tokens_factor > 1.0 {
        let more = 100.0 * (plan.tokens_factor - 1.0);
        reasons.push(format!(
            "merging this seldom takes {more:.1} % more tokens to the loss of data parallelism (arXiv 2503.09799)"
        ));
    }
    if plan.extrapolated {
        reasons
            .push("the law of that loss is used beyond its data: 35M to 10B parameters, 8 sites, H = 300".to_owned());
    }
    reasons
}

fn binding_reason(plan: &Plan, team: &Team) -> String {
    match plan.binding {
        Binding::Link => {
            let busiest = plan.links.iter().max_by(|left, right| left.share.total_cmp(&right.share));
            busiest.map_or_else(
                || "the links bind".to_owned(),
                |link| {
                    let (one, other) = &link.between;
                    format!(
                        "the link {one} - {other} binds: {:.3} Gbit/s, used {:.0} % of the time",
                        link.rate.gigabits(),
                        100.0 * link.share
                    )
                },
            )
        }
        Binding::Power => "power limits bind: they leave devices off".to_owned(),
        Binding::Memory => {
            format!("memory binds: without its bound a step would be {:.2} times as fast", team.memory_gain)
        }
        Binding::InnerCommunication => "communication inside the sites binds".to_owned(),
        Binding::Batch => "the batch binds: pipelines wait for want of sequences".to_owned(),
        Binding::Compute => "the rate of matrix products binds".to_owned(),
    }
}
