//! Energy, money and carbon of a plan: what its sites draw and charge while it runs.
//!
//! ```text
//! energy = devices x W x PUE x time (u + (1 - u) w)      u: share of time in inner steps, w: a waiting device's share of full power
//! cost   = device-hours x price + kWh x price + bytes sent x price
//! carbon = kWh x g/kWh
//! ```
//! W is what the user gives, else the maker's TDP times [`NODE_OVER_TDP`]. w is 1 unless given: a device that waits counts as if it computed, which
//! is an upper bound. What is not known makes the sum unknown, never smaller.

use super::{Group, SiteSpec, Task};
use crate::units::{Bytes, Grams, Joules, Seconds, Watts};

/// Power of a node at the wall for each device over the device's TDP: 856 W for each H100 of 700 W on 64 nodes of eight that trained GPT-3 in
/// FP8 (MLPerf Training v4.0, node power logs of `smc-ac-power`).
pub const NODE_OVER_TDP: f64 = 856.0 / 700.0;

/// Bytes of a GB, as egress is sold.
const GIGABYTE: f64 = 1e9;

/// What a site charges and emits. `None` is unknown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tariff {
    /// At the wall for each device, host included, cooling not; none: from the device's TDP.
    pub power: Option<Watts>,
    /// Power of a device that waits over its full power.
    pub waiting: f64,
    /// Power of the building over that of its computers.
    pub pue: f64,
    /// What the site can draw, cooling included.
    pub power_limit: Option<Watts>,
    /// Money for one device and hour.
    pub device_hour: Option<f64>,
    /// Money for a kWh.
    pub kilowatt_hour: Option<f64>,
    /// Money for a GB (10^9 bytes) sent to other sites.
    pub egress_gigabyte: f64,
    /// Grams of CO2 for a kWh.
    pub carbon_per_kilowatt_hour: Option<f64>,
}

impl Default for Tariff {
    fn default() -> Self {
        Self {
            power: None,
            waiting: 1.0,
            pue: 1.0,
            power_limit: None,
            device_hour: None,
            kilowatt_hour: None,
            egress_gigabyte: 0.0,
            carbon_per_kilowatt_hour: None,
        }
    }
}

/// Sums of a whole run; `None` where a figure of a site is unknown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Account {
    /// Energy at the wall, cooling included.
    pub energy: Option<Joules>,
    /// Money, in whatever the cluster's prices are in.
    pub cost: Option<f64>,
    /// Carbon.
    pub carbon: Option<Grams>,
}

impl Account {
    /// Nothing yet.
    pub const NONE: Self = Self { energy: Some(Joules::ZERO), cost: Some(0.0), carbon: Some(Grams::ZERO) };

    /// Both together; unknown where one of them is.
    pub fn and(self, other: Self) -> Self {
        let sum = |left: Option<f64>, right: Option<f64>| Some(left? + right?);
        Self {
            energy: self.energy.and_then(|energy| Some(energy + other.energy?)),
            cost: sum(self.cost, other.cost),
            carbon: self.carbon.and_then(|carbon| Some(carbon + other.carbon?)),
        }
    }
}

/// Power of one device of a group at the wall, cooling included.
pub fn device_power(tariff: &Tariff, group: &Group<'_>) -> Option<Watts> {
    let power = tariff.power.or_else(|| Some(Watts(group.device.tdp_w? * NODE_OVER_TDP)));
    power.map(|power| power * tariff.pue)
}

/// A part of a run on one site.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Devices that its layout takes.
    pub devices: f64,
    /// How long.
    pub time: Seconds,
    /// Share of it in inner steps.
    pub utilisation: f64,
    /// Sent to other sites.
    pub sent: Bytes,
}

/// What a site's part of a run takes.
pub fn account(site: &SiteSpec<'_>, powers: &[(Option<Watts>, f64)], usage: Usage) -> Account {
    let tariff = &site.tariff;
    let busy = usage.utilisation + (1.0 - usage.utilisation) * tariff.waiting;
    let power = powers.iter().try_fold(Watts::ZERO, |sum, (power, count)| Some(sum + (*power)? * *count));
    let energy = power.map(|power| power * usage.time * busy);
    let hours = tariff.device_hour.map(|price| price * usage.devices * usage.time.hours());
    let current = tariff.kilowatt_hour.map(|price| energy.map(|energy| price * energy.kilowatt_hours()));
    let cost = match (hours, current) {
        (None, None) => None,
        (hours, current) => current.unwrap_or(Some(0.0)).map(|current| current + hours.unwrap_or(0.0)),
    };
    let egress = tariff.egress_gigabyte * usage.sent.0 / GIGABYTE;
    let carbon = tariff.carbon_per_kilowatt_hour.and_then(|grams| Some(Grams(grams * energy?.kilowatt_hours())));
    Account { energy, cost: cost.map(|cost| cost + egress), carbon }
}

/// Rounds of a run whose rounds have so many steps.
pub fn rounds(task: &Task, tokens_factor: f64, inner_steps: f64) -> f64 {
    task.tokens * tokens_factor / (inner_steps * f64::from(task.global_batch) * task.shape.seq)
}
