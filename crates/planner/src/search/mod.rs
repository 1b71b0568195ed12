//! The best plan for several sites: a layout for each, shares that follow their speeds, and what travels between them.
//!
//! ```text
//! each site      best layout by tokens a second within memory                                   layouts
//! all sites      shares in proportion to speed, so that all finish an inner step together
//! between them   the strategy, H, fragments and bits with the least time to the same loss       between
//!                time = tokens * tokens(loss) / (sum of speeds * utilisation)
//! ```
//! Sites may be left out: a slow link or one replica more can cost more than a small site brings. Every candidate is a plain enumeration,
//! so a better link, more memory or more devices only ever add candidates or better ones: they cannot make the best plan worse.

pub mod between;
pub mod layouts;

use crate::catalogue::{Device, Precision};
use crate::model::shape::Transformer;
use crate::model::{ModelError, Prediction};
use crate::units::{BitsPerSecond, Seconds};
use crate::wan::{Link, RoundTime};
use base::Hint;
use between::{Way, best_way};
use layouts::best_layout;

/// Most sites of a plan.
const SITES_MAX: usize = 64;

/// Utilisation below which the links are what binds.
const LINK_BINDS: f64 = 0.9;

/// A gain by more memory above which memory is what binds.
const MEMORY_BINDS: f64 = 1.05;

/// One site that may take part.
#[derive(Debug, Clone)]
pub struct SiteSpec<'a> {
    /// Its name.
    pub name: String,
    /// What stands there.
    pub device: &'a Device,
    /// How many.
    pub devices: u32,
    /// Devices of a node.
    pub devices_per_node: u32,
    /// Network between its nodes, for each device.
    pub network: BitsPerSecond,
    /// Its way to the other sites.
    pub link: Link,
    /// Number format of its matrix products.
    pub precision: Precision,
}

/// What is to be trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Task {
    /// The model.
    pub shape: Transformer,
    /// Sequences of an inner step of all sites together.
    pub global_batch: u32,
    /// Tokens to train on, if it were data parallelism.
    pub tokens: f64,
}

/// What keeps a plan from being faster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// Devices' memory forces a slower layout.
    Memory,
    /// The links between sites.
    Link,
    /// The rate of matrix products.
    Compute,
    /// Communication inside the sites.
    InnerCommunication,
}

/// One site's part.
#[derive(Debug, Clone)]
pub struct SitePlan {
    /// Its name.
    pub name: String,
    /// Its layout.
    pub layout: crate::model::layout::Layout,
    /// What a step of its share takes.
    pub prediction: Prediction,
    /// Share of the tokens.
    pub share: f64,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// How much faster it would be if memory were unbounded.
    pub memory_gain: f64,
}

/// A plan with its reasons.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Sites that take part.
    pub sites: Vec<SitePlan>,
    /// Sites that are better left out.
    pub left_out: Vec<String>,
    /// What travels between them.
    pub way: Way,
    /// The round between them.
    pub round: RoundTime,
    /// Tokens a second of all sites, stalls deducted.
    pub tokens_per_second: f64,
    /// Tokens to the loss of data parallelism over its tokens.
    pub tokens_factor: f64,
    /// Time to that loss.
    pub time_to_loss: Seconds,
    /// What binds.
    pub binding: Binding,
    /// Why so, one sentence each.
    pub reasons: Vec<String>,
}

/// Why there is no plan.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Nobody to plan for.
    #[error("{found} sites: 1 to {SITES_MAX} can be planned")]
    Sites {
        /// How many there are.
        found: usize,
    },
    /// No layout of any site holds the model.
    #[error(
        "{site} cannot hold the model: the leanest layout needs {needed_gib:.1} GiB of a device that has {usable_gib:.1} usable"
    )]
    DoesNotFit {
        /// The site that comes nearest.
        site: String,
        /// Memory of its leanest layout.
        needed_gib: f64,
        /// What a device has for it.
        usable_gib: f64,
        /// The least multiple of its devices that would do, where more devices help.
        devices_factor: Option<f64>,
    },
    /// The model refuses.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl Hint for PlanError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Sites { .. } => Some("describe one [[site]] for each data centre".to_owned()),
            Self::DoesNotFit { devices_factor: Some(factor), site, .. } => {
                Some(format!("give {site} {factor} times its devices, or shorten the sequence"))
            }
            Self::DoesNotFit { .. } => Some("shorten the sequence or take devices with more memory".to_owned()),
            Self::Model(error) => error.hint(),
        }
    }
}

/// The best plans, fastest to the same loss first, at most `count`: one for each set of sites.
pub fn plans(task: &Task, sites: &[SiteSpec<'_>], count: usize) -> Result<Vec<Plan>, PlanError> {
    if !(1..=SITES_MAX).contains(&sites.len()) {
        return Err(PlanError::Sites { found: sites.len() });
    }
    let mut able = Vec::new();
    let mut refusals = Vec::new();
    for site in sites {
        match best_layout(task, site, weight(site) / sites.iter().map(weight).sum::<f64>()) {
            Ok(best) => able.push((site, best)),
            Err(error) => refusals.push(error),
        }
    }
    if able.is_empty() {
        return Err(refusals.into_iter().next().unwrap_or(PlanError::Sites { found: 0 }));
    }
    // Fastest first: every prefix is a candidate set.
    able.sort_by(|left, right| right.1.tokens_per_second.total_cmp(&left.1.tokens_per_second));
    let mut plans: Vec<Plan> = (1..=able.len()).map(|taken| together(task, sites, &able[..taken])).collect();
    plans.sort_by(|left, right| left.time_to_loss.0.total_cmp(&right.time_to_loss.0));
    plans.truncate(count);
    Ok(plans)
}

/// First guess of a site's share: its peak rate, whatever the precision that is known.
fn weight(site: &SiteSpec<'_>) -> f64 {
    site.device.peak(site.precision).map_or(1.0, |rate| rate.tera()) * f64::from(site.devices)
}

fn together(task: &Task, all: &[SiteSpec<'_>], taken: &[(&SiteSpec<'_>, SitePlan)]) -> Plan {
    let speed: f64 = taken.iter().map(|(_, plan)| plan.tokens_per_second).sum();
    let step = Seconds(f64::from(task.global_batch) * task.shape.seq / speed);
    let link = narrowest(taken.iter().map(|(site, _)| site.link));
    let (way, round, tokens_factor) = best_way(task, taken.len(), step, link);
    let sites: Vec<SitePlan> =
        taken.iter().map(|(_, plan)| SitePlan { share: plan.tokens_per_second / speed, ..plan.clone() }).collect();
    let tokens_per_second = speed * round.utilisation;
    let left_out: Vec<String> = all
        .iter()
        .filter(|site| !taken.iter().any(|(other, _)| core::ptr::eq(*other, *site)))
        .map(|site| site.name.clone())
        .collect();
    let binding = binding(&sites, &round);
    let reasons = reasons(&sites, &round, &way, binding, &left_out);
    Plan {
        sites,
        left_out,
        way,
        round,
        tokens_per_second,
        tokens_factor,
        time_to_loss: Seconds(task.tokens * tokens_factor / tokens_per_second),
        binding,
        reasons,
    }
}

/// The link that bounds an exchange in which all take part: the least of everything.
fn narrowest(links: impl Iterator<Item = Link>) -> Link {
    links
        .reduce(|worst, link| Link {
            up: worst.up.min(link.up),
            down: worst.down.min(link.down),
            round_trip: worst.round_trip.max(link.round_trip),
            loss: worst.loss.max(link.loss),
            streams: worst.streams.min(link.streams),
            loss_based: worst.loss_based || link.loss_based,
        })
        .unwrap_or_else(|| unreachable!("a plan has a site"))
}

fn binding(sites: &[SitePlan], round: &RoundTime) -> Binding {
    if round.utilisation < LINK_BINDS {
        return Binding::Link;
    }
    let weighted = |value: fn(&SitePlan) -> f64| sites.iter().map(|site| site.share * value(site)).sum::<f64>();
    if weighted(|site| site.memory_gain) > MEMORY_BINDS {
        return Binding::Memory;
    }
    if weighted(|site| site.prediction.communication_share) > 0.3 {
        Binding::InnerCommunication
    } else {
        Binding::Compute
    }
}

fn reasons(sites: &[SitePlan], round: &RoundTime, way: &Way, binding: Binding, left_out: &[String]) -> Vec<String> {
    let mut reasons = vec![format!(
        "{} with {} inner steps a round, {} fragments and {} bits: {:.1} % of a round is computation, {:.1} s of {:.1} s transfers stall",
        way.strategy.name(),
        way.inner_steps,
        way.fragments,
        way.bits,
        100.0 * round.utilisation,
        round.stall.0,
        round.transfer.0
    )];
    reasons.push(match binding {
        Binding::Link => "the links between sites bind".to_owned(),
        Binding::Memory => {
            let most = sites.iter().max_by(|left, right| left.memory_gain.total_cmp(&right.memory_gain));
            let (name, gain) = most.map_or(("no site", 1.0), |site| (site.name.as_str(), site.memory_gain));
            format!("memory binds: without its bound {name} would be {gain:.2} times as fast")
        }
        Binding::InnerCommunication => "communication inside the sites binds".to_owned(),
        Binding::Compute => "the rate of matrix products binds".to_owned(),
    });
    reasons.extend(
        left_out
            .iter()
            .map(|name| format!("{name} is left out: it would add less than it costs, or cannot hold the model")),
    );
    reasons
}

#[cfg(test)]
mod tests;
