//! The best plans for several sites: a layout for each, shares that follow their speeds, what travels between them, and what it costs.
//!
//! ```text
//! each site      sequences that it finishes in T seconds, over its layouts within memory            layouts
//! all of a team  the least T in which they finish the batch together; shares in proportion           teams
//! between them   strategy, H, fragments, bits, exchange: every one is tried                          between
//!                time = tokens x tokens(loss) / (batch / T x utilisation)
//! energy, money, carbon                                                                              account
//! the least by the objective within the caps, and what the next best would lose                      choice
//! ```
//! A team is a set of sites; up to ten able sites every set is tried, more by leaving out one after the other. Everything is a plain
//! enumeration of functions that never fall when links, memory or devices get better: they cannot make the fastest plan slower.

pub mod account;
pub mod between;
mod choice;
pub mod given;
pub mod layouts;
mod teams;

use crate::catalogue::{Device, Precision};
use crate::model::layout::Layout;
use crate::model::shape::Transformer;
use crate::model::{ModelError, Prediction};
use crate::units::{BitsPerSecond, Bytes, Seconds, Watts};
use crate::wan::{Link, RoundTime};
use account::{Account, Tariff};
use base::Hint;
use between::Way;
use given::{Given, GivenError};
use std::collections::BTreeMap;

/// Most sites of a plan.
pub const SITES_MAX: usize = 64;

/// Devices of one kind at a site.
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    /// What stands there.
    pub device: &'a Device,
    /// How many.
    pub devices: u32,
}

/// One site that may take part.
#[derive(Debug, Clone)]
pub struct SiteSpec<'a> {
    /// Its name.
    pub name: String,
    /// Its devices, one entry a kind; several may form one pipeline.
    pub groups: Vec<Group<'a>>,
    /// Devices of a node.
    pub devices_per_node: u32,
    /// Network between its nodes, for each device.
    pub network: BitsPerSecond,
    /// What all its traffic to other sites shares, each way; none where only the links bound it.
    pub access: Option<BitsPerSecond>,
    /// Number format of its matrix products.
    pub precision: Precision,
    /// Tokens a second that it has been seen to train on alone with the task's model, instead of what would be predicted.
    pub measured: Option<f64>,
    /// Power, prices, carbon.
    pub tariff: Tariff,
}

impl SiteSpec<'_> {
    /// Power of all its devices at the wall, cooling included, kW; none where it is unknown.
    fn kilowatts(&self) -> Option<f64> {
        let power = self.groups.iter().try_fold(Watts::ZERO, |sum, group| {
            Some(sum + account::device_power(&self.tariff, group)? * f64::from(group.devices))
        });
        power.map(|power| power.0 / 1e3)
    }

    /// Devices of a group that the site's power limit leaves running; all where the limit or their power is unknown.
    pub fn powered(&self, group: &Group<'_>) -> f64 {
        let all = self.kilowatts().map(|kilowatts| Watts(kilowatts * 1e3));
        let share = match (self.tariff.power_limit, all) {
            (Some(limit), Some(all)) if all > limit => limit / all,
            _ => 1.0,
        };
        (f64::from(group.devices) * share).floor()
    }
}

/// Links between sites, by their places in the list of sites.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Links {
    /// Named pairs, the smaller place first.
    pub pairs: BTreeMap<(usize, usize), Link>,
    /// For every other pair.
    pub default: Option<Link>,
}

impl Links {
    /// The same link between all.
    pub fn all(link: Link) -> Self {
        Self { pairs: BTreeMap::new(), default: Some(link) }
    }

    /// The link of two sites.
    pub fn between(&self, one: usize, other: usize) -> Option<Link> {
        self.pairs.get(&(one.min(other), one.max(other))).copied().or(self.default)
    }
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

/// What a plan is to have least of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// Time to the loss that data parallelism has after the tokens.
    Time,
    /// Money.
    Cost,
    /// Energy.
    Energy,
    /// Carbon.
    Carbon,
}

impl Objective {
    /// All, in the order of the caps.
    pub const ALL: [Self; 4] = [Self::Time, Self::Cost, Self::Energy, Self::Carbon];

    /// As an option spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Cost => "cost",
            Self::Energy => "energy",
            Self::Carbon => "carbon",
        }
    }

    /// Unit of its figures.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Time => "h",
            Self::Cost => "units of money",
            Self::Energy => "kWh",
            Self::Carbon => "t of CO2",
        }
    }
}

/// Most that a plan may take, each in its objective's unit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Caps {
    /// Hours.
    pub hours: Option<f64>,
    /// Money.
    pub cost: Option<f64>,
    /// kWh.
    pub kilowatt_hours: Option<f64>,
    /// Tonnes of CO2.
    pub carbon_tonnes: Option<f64>,
}

impl Caps {
    /// The cap on one figure.
    pub fn of(&self, objective: Objective) -> Option<f64> {
        match objective {
            Objective::Time => self.hours,
            Objective::Cost => self.cost,
            Objective::Energy => self.kilowatt_hours,
            Objective::Carbon => self.carbon_tonnes,
        }
    }
}

/// What is wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wish {
    /// Least of what.
    pub objective: Objective,
    /// Within what.
    pub caps: Caps,
    /// How many plans, at most one for each set of sites.
    pub count: usize,
    /// What is settled of the way between the sites.
    pub given: Given,
    /// Whether every site must take part.
    pub all_sites: bool,
}

impl Default for Wish {
    fn default() -> Self {
        let given = Given::default();
        Self { objective: Objective::Time, caps: Caps::default(), count: 3, given, all_sites: false }
    }
}

/// What keeps a plan from being faster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Binding {
    /// Devices' memory forces a slower layout.
    Memory,
    /// The links between sites.
    Link,
    /// A site's power limit leaves devices off.
    Power,
    /// The rate of matrix products.
    Compute,
    /// Communication inside the sites.
    InnerCommunication,
    /// Too few sequences to keep pipelines full.
    Batch,
}

impl Binding {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Link => "link",
            Self::Power => "power",
            Self::Compute => "compute",
            Self::InnerCommunication => "communication inside the sites",
            Self::Batch => "batch",
        }
    }
}

/// One site's part.
#[derive(Debug, Clone)]
pub struct SitePlan {
    /// Its name.
    pub name: String,
    /// Its layout; the batch is its share.
    pub layout: Layout,
    /// Devices that the layout takes, by kind.
    pub devices: Vec<(String, f64)>,
    /// Layers of each stage where they are not even.
    pub stage_layers: Option<Vec<f64>>,
    /// What a step of its share takes.
    pub prediction: Prediction,
    /// Memory of the least of its devices.
    pub memory_of_device: Bytes,
    /// Share of the tokens.
    pub share: f64,
    /// Tokens a second in an inner step.
    pub tokens_per_second: f64,
    /// Energy, money, carbon of its part.
    pub account: Account,
}

/// A link in use.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkUse {
    /// Its ends.
    pub between: (String, String),
    /// Its rate.
    pub rate: BitsPerSecond,
    /// What crosses it each way, mean over a round.
    pub mean: BitsPerSecond,
    /// That over what its streams carry.
    pub share: f64,
}

/// A site that takes no part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name.
    pub name: String,
    /// Why.
    pub why: String,
}

/// What would be otherwise.
#[derive(Debug, Clone, PartialEq)]
pub struct Alternative {
    /// What is done otherwise.
    pub what: String,
    /// Its way between the sites.
    pub way: Way,
    /// The objective's figure over the plan's; above 1 it is worse.
    pub ratio: f64,
}

/// A plan with its reasons.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Sites that take part.
    pub sites: Vec<SitePlan>,
    /// Sites that do not.
    pub left_out: Vec<LeftOut>,
    /// What travels between them.
    pub way: Way,
    /// Time of an inner step.
    pub step: Seconds,
    /// The round between them.
    pub round: RoundTime,
    /// Use of the links.
    pub links: Vec<LinkUse>,
    /// Tokens a second of all sites, stalls deducted.
    pub tokens_per_second: f64,
    /// Tokens to the loss of data parallelism over its tokens.
    pub tokens_factor: f64,
    /// Whether the law of that loss is used beyond its data.
    pub extrapolated: bool,
    /// Time for the tokens that were asked for.
    pub time_for_tokens: Seconds,
    /// Time to the loss that data parallelism has after them.
    pub time_to_loss: Seconds,
    /// Energy, money, carbon until then.
    pub account: Account,
    /// What binds.
    pub binding: Binding,
    /// Why so, one sentence each.
    pub reasons: Vec<String>,
    /// Why not otherwise, worst last.
    pub alternatives: Vec<Alternative>,
}

impl Plan {
    /// The figure of an objective in its unit; `None` where it is unknown.
    pub fn figure(&self, objective: Objective) -> Option<f64> {
        figure(objective, self.time_to_loss, &self.account)
    }
}

fn figure(objective: Objective, time: Seconds, account: &Account) -> Option<f64> {
    match objective {
        Objective::Time => Some(time.hours()),
        Objective::Cost => account.cost,
        Objective::Energy => account.energy.map(crate::units::Joules::kilowatt_hours),
        Objective::Carbon => account.carbon.map(crate::units::Grams::tonnes),
    }
}

/// A figure in a message: four digits after the point, or as a power of ten where that would be long or nothing. Rounded up, so that a cap which is
/// raised to it can be met.
fn figure_of(figure: f64) -> String {
    let plain = (figure * 1e4).ceil() / 1e4;
    if (1e-2..1e12).contains(&figure) { format!("{plain}") } else { format!("{figure:.4e}") }
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
        "{site} cannot hold the model: the leanest layout needs {needed_gib:.1} GiB of a device that has {usable_gib:.1} usable, {:.1} too few",
        needed_gib - usable_gib
    )]
    DoesNotFit {
        /// The site that comes nearest.
        site: String,
        /// Memory of its leanest layout.
        needed_gib: f64,
        /// What a device has for it.
        usable_gib: f64,
        /// Its devices.
        devices: u32,
        /// How many would do, where more help.
        devices_needed: Option<u32>,
        /// The longest sequence that would do, where a shorter one helps.
        sequence_that_fits: Option<u32>,
        /// The limit of its power, kW, that would let enough devices run, where the limit is what keeps the model out.
        kilowatts_needed: Option<f64>,
    },
    /// A power limit under which nothing runs.
    #[error("{site}: power_limit_kw = {limit_kilowatts} does not run one of its devices")]
    Dark {
        /// The site.
        site: String,
        /// Its limit.
        limit_kilowatts: f64,
        /// What would do for all its devices.
        all_kilowatts: f64,
    },
    /// A measured speed that its devices cannot have.
    #[error("{site}: tokens_per_second = {measured} would be {} times the peak of its devices", figure_of(*times))]
    TooFast {
        /// The site.
        site: String,
        /// What was given.
        measured: f64,
        /// Its share of the peak, above 1.
        times: f64,
    },
    /// A site without work, where all must take part.
    #[error(
        "not every site gets a part of {sequences} sequences: the others are through with a step before the slowest has done one micro-batch"
    )]
    Idle {
        /// The batch.
        sequences: u32,
    },
    /// Settings that contradict themselves.
    #[error(transparent)]
    Given(#[from] GivenError),
    /// Fewer tokens than one round trains on.
    #[error("the run ends before its first merge: {tokens:e} tokens are {steps:.1} steps of the batch")]
    Short {
        /// Tokens of the run.
        tokens: f64,
        /// Its steps.
        steps: f64,
    },
    /// Two sites that nothing joins.
    #[error("no link joins {one} and {other}")]
    NoLink {
        /// One.
        one: String,
        /// The other.
        other: String,
    },
    /// A figure that the objective or a cap needs.
    #[error("{what} of {site} is unknown, and nothing is guessed")]
    UnknownTariff {
        /// The site.
        site: String,
        /// Power, price or carbon.
        what: &'static str,
        /// The key that gives it.
        key: &'static str,
    },
    /// One cap that no plan meets.
    #[error("no plan takes at most {} {unit}: the least is {} {unit}", figure_of(*cap), figure_of(*least))]
    OutOfReach {
        /// The cap.
        cap: f64,
        /// The least there is.
        least: f64,
        /// Unit of both.
        unit: &'static str,
        /// The option that set it.
        option: &'static str,
    },
    /// Caps that can each be met, but not together.
    #[error("the caps contradict each other: {}", .conflicts.join("; "))]
    Contradictory {
        /// For each cap, the least of it that the others allow.
        conflicts: Vec<String>,
    },
    /// The batch is too small for every site.
    #[error("no layout of any set of sites takes a batch of {sequences} sequences")]
    Batch {
        /// The batch.
        sequences: u32,
    },
    /// The model refuses.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl PlanError {
    /// Whether it is the description of the sites that has to change, and not what was asked for.
    pub fn is_about_sites(&self) -> bool {
        use PlanError::{Dark, DoesNotFit, Model, NoLink, Sites, TooFast, UnknownTariff};
        matches!(
            self,
            Sites { .. }
                | DoesNotFit { .. }
                | Dark { .. }
                | TooFast { .. }
                | NoLink { .. }
                | UnknownTariff { .. }
                | Model(_)
        )
    }
}

impl Hint for PlanError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Sites { .. } => "describe one [[site]] for each data centre".to_owned(),
            Self::DoesNotFit { kilowatts_needed: Some(needed), site, .. } => {
                format!("raise power_limit_kw of {site} to {}", figure_of(*needed))
            }
            Self::DoesNotFit { devices_needed: Some(needed), site, devices, sequence_that_fits, .. } => {
                let sequence =
                    sequence_that_fits.map_or_else(String::new, |tokens| format!(", or take --sequence {tokens}"));
                format!("give {site} {needed} devices (it has {devices}), or devices with more memory{sequence}")
            }
            Self::DoesNotFit { sequence_that_fits: Some(tokens), .. } => {
                format!("take --sequence {tokens} or devices with more memory")
            }
            Self::DoesNotFit { .. } => "take devices with more memory or a smaller model".to_owned(),
            Self::Dark { site, all_kilowatts, .. } => {
                format!("raise power_limit_kw of {site}: all its devices draw {} kW", figure_of(*all_kilowatts))
            }
            Self::TooFast { site, .. } => {
                format!("give {site} the tokens_per_second of all its devices with this model, or leave the key out")
            }
            Self::Idle { .. } => "take a larger --batch, or leave out --all-sites".to_owned(),
            Self::Given(error) => return error.hint(),
            Self::Short { .. } => "raise --tokens, or take a smaller --batch or fewer --inner-steps".to_owned(),
            Self::NoLink { one, other } => {
                format!("add [[link]] with between = [\"{one}\", \"{other}\"], or [link_default] for all pairs")
            }
            Self::UnknownTariff { site, key, .. } => format!("give the site {site} {key}"),
            Self::OutOfReach { option, least, .. } => {
                format!("raise {option} to {} at least, or drop it", figure_of(*least))
            }
            Self::Contradictory { .. } => "raise one of them".to_owned(),
            Self::Batch { .. } => "take a larger --batch".to_owned(),
            Self::Model(error) => return error.hint(),
        })
    }
}

/// The best plans, best first: one for each set of sites, at most as many as are wished.
///
/// # Errors
/// No site holds the model, sites are not joined, a figure is unknown that the objective or a cap needs, or no plan meets the caps.
pub fn plans(task: &Task, sites: &[SiteSpec<'_>], links: &Links, wish: &Wish) -> Result<Vec<Plan>, PlanError> {
    if !(1..=SITES_MAX).contains(&sites.len()) {
        return Err(PlanError::Sites { found: sites.len() });
    }
    wish.given.check()?;
    joined(sites, links)?;
    let able = teams::able(task, sites, wish)?;
    choice::known(wish, &able)?;
    let candidates = teams::candidates(task, &able, links, wish)?;
    choice::choose(task, &able, links, wish, &candidates)
}

fn joined(sites: &[SiteSpec<'_>], links: &Links) -> Result<(), PlanError> {
    for (place, site) in sites.iter().enumerate() {
        if let Some(other) = (place + 1..sites.len()).find(|other| links.between(place, *other).is_none()) {
            return Err(PlanError::NoLink { one: site.name.clone(), other: sites[other].name.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
