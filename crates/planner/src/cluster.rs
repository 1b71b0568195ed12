//! Sites and the links between them, as a strict TOML that a user writes. Keys end in their units; unknown keys and numbers that nobody can
//! mean are refused. `docs/plan.md` lists the keys.

use crate::catalogue::{Catalogue, CatalogueError, Precision};
use crate::search::account::Tariff;
use crate::search::{Group, Links, SITES_MAX, SiteSpec};
use crate::units::{BitsPerSecond, Seconds, Watts};
use crate::wan::Link;
use base::Hint;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Longest text, bytes: 64 sites and their 2,016 links take 300 KB.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Kinds of devices of one site.
const GROUPS_MAX: usize = 8;

/// TCP streams of a link where none are given: what our transport opens at most.
const STREAMS: f64 = 32.0;

/// Ranges of numbers that somebody can mean: key, least, greatest.
const RANGES: &[(&str, f64, f64)] = &[
    ("devices", 1.0, 1e8),
    ("devices_per_node", 1.0, 1e5),
    ("network_gbit_s", 1e-3, 1e6),
    ("wan_gbit_s", 1e-6, 1e6),
    ("gbit_s", 1e-6, 1e6),
    ("round_trip_ms", 0.0, 1e4),
    ("loss_percent", 0.0, 50.0),
    ("streams", 1.0, 4_096.0),
    ("power_w_per_device", 1.0, 1e5),
    ("waiting_power_share", 0.0, 1.0),
    ("pue", 1.0, 5.0),
    ("power_limit_kw", 1e-3, 1e8),
    ("price_per_device_hour", 0.0, 1e6),
    ("price_per_kwh", 0.0, 1e6),
    ("egress_price_per_gb", 0.0, 1e6),
    ("carbon_g_per_kwh", 0.0, 5_000.0),
];

/// A cluster as it is written.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Data centres.
    #[serde(rename = "site", default)]
    pub sites: Vec<SiteEntry>,
    /// Links of pairs of them.
    #[serde(rename = "link", default)]
    pub links: Vec<LinkEntry>,
    /// The link of every pair that has none of its own.
    pub link_default: Option<LinkFigures>,
}

/// One `[[site]]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteEntry {
    /// Its name.
    pub name: String,
    /// Device, by a name of the catalogue; or `group`.
    pub device: Option<String>,
    /// How many of it.
    pub devices: Option<u32>,
    /// Several kinds of devices, which may form one pipeline.
    #[serde(rename = "group", default)]
    pub groups: Vec<GroupEntry>,
    /// Devices of a node.
    #[serde(default = "devices_per_node")]
    pub devices_per_node: u32,
    /// Network of a node over its devices.
    #[serde(default = "network_gbit_s")]
    pub network_gbit_s: f64,
    /// bf16, fp8, fp16, tf32 or fp32.
    #[serde(default = "precision")]
    pub precision: String,
    /// What all traffic to other sites shares, each way.
    pub wan_gbit_s: Option<f64>,
    /// At the wall for each device, host included, cooling not.
    pub power_w_per_device: Option<f64>,
    /// Power of a waiting device over its full power.
    #[serde(default = "one")]
    pub waiting_power_share: f64,
    /// Power of the building over that of its computers.
    #[serde(default = "one")]
    pub pue: f64,
    /// What the site can draw, cooling included.
    pub power_limit_kw: Option<f64>,
    /// Money for one device and hour.
    pub price_per_device_hour: Option<f64>,
    /// Money for a kWh.
    pub price_per_kwh: Option<f64>,
    /// Money for a GB sent to other sites.
    #[serde(default)]
    pub egress_price_per_gb: f64,
    /// Grams of CO2 for a kWh.
    pub carbon_g_per_kwh: Option<f64>,
}

/// One `[[site.group]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupEntry {
    /// Device.
    pub device: String,
    /// How many.
    pub devices: u32,
}

/// One `[[link]]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkEntry {
    /// Names of its two sites.
    pub between: [String; 2],
    /// Each way.
    pub gbit_s: f64,
    /// Round trip.
    #[serde(default)]
    pub round_trip_ms: f64,
    /// Segments lost.
    #[serde(default)]
    pub loss_percent: f64,
    /// TCP streams side by side.
    #[serde(default = "streams")]
    pub streams: f64,
    /// Whether the congestion control takes loss for congestion (CUBIC does, BBR does not).
    #[serde(default)]
    pub loss_based: bool,
}

/// `[link_default]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkFigures {
    /// Each way.
    pub gbit_s: f64,
    /// Round trip.
    #[serde(default)]
    pub round_trip_ms: f64,
    /// Segments lost.
    #[serde(default)]
    pub loss_percent: f64,
    /// TCP streams side by side.
    #[serde(default = "streams")]
    pub streams: f64,
    /// Whether the congestion control takes loss for congestion.
    #[serde(default)]
    pub loss_based: bool,
}

fn devices_per_node() -> u32 {
    8
}

fn network_gbit_s() -> f64 {
    200.0
}

fn precision() -> String {
    "bf16".to_owned()
}

fn one() -> f64 {
    1.0
}

fn streams() -> f64 {
    STREAMS
}

/// Why a text is no cluster.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// No TOML, or a key that means nothing here.
    #[error("the cluster file cannot be read: {0}")]
    Syntax(String),
    /// More than is planned.
    #[error("the cluster file has {found} {what}: at most {maximum} are read")]
    TooMuch {
        /// bytes, sites or kinds of devices.
        what: &'static str,
        /// How much there is.
        found: usize,
        /// How much there may be.
        maximum: usize,
    },
    /// No site.
    #[error("the cluster file describes no site")]
    Empty,
    /// Two sites of one name.
    #[error("two sites are called \"{0}\"")]
    Twice(String),
    /// A number that nobody can mean.
    #[error("{place}: {key} = {found} is not between {least} and {greatest}")]
    Absurd {
        /// The site or link.
        place: String,
        /// The key.
        key: &'static str,
        /// Its value.
        found: f64,
        /// Least that is meant.
        least: f64,
        /// Greatest.
        greatest: f64,
    },
    /// A site that says neither or both ways what stands there.
    #[error("site \"{0}\" needs either device and devices, or [[site.group]] tables with them")]
    Devices(String),
    /// A number format that is none.
    #[error("site \"{site}\": \"{found}\" is no precision")]
    Precision {
        /// The site.
        site: String,
        /// What it says.
        found: String,
    },
    /// A device that nobody knows.
    #[error("site \"{site}\": {error}")]
    Device {
        /// The site.
        site: String,
        /// Which.
        #[source]
        error: CatalogueError,
    },
    /// A link's end, or something changed, that is no site.
    #[error("{place} names \"{name}\", which is no site")]
    UnknownSite {
        /// Who names it.
        place: String,
        /// The name.
        name: String,
        /// The nearest site.
        near: Option<String>,
    },
    /// A link from a site to itself.
    #[error("a link joins \"{0}\" with itself")]
    Loop(String),
}

impl Hint for ClusterError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Syntax(_) | Self::Devices(_) => {
                "compare with the example of docs/plan.md, which lists the keys".to_owned()
            }
            Self::TooMuch { .. } => "describe fewer".to_owned(),
            Self::Empty => "add a [[site]] with name, device and devices".to_owned(),
            Self::Twice(name) => format!("give one \"{name}\" another name"),
            Self::Absurd { key, .. } => format!("give {key} its true value, in the unit of its name"),
            Self::Precision { .. } => "write bf16, fp8, fp16, tf32 or fp32".to_owned(),
            Self::Device { error, .. } => return error.hint(),
            Self::UnknownSite { near: Some(near), .. } => format!("did you mean \"{near}\"?"),
            Self::UnknownSite { .. } => "name a site as its name = \"...\" does".to_owned(),
            Self::Loop(_) => "name two sites in between".to_owned(),
        })
    }
}

impl Cluster {
    /// Reads a cluster and refuses what nobody can mean.
    ///
    /// # Errors
    /// No TOML of that form, too much of it, absurd numbers, names that do not fit together.
    pub fn parse(text: &str) -> Result<Self, ClusterError> {
        bounded("bytes", text.len(), TEXT_BYTES_MAX)?;
        let cluster: Self =
            toml::from_str(text).map_err(|error| ClusterError::Syntax(error.to_string().trim_end().to_owned()))?;
        cluster.check()?;
        Ok(cluster)
    }

    /// Refuses what nobody can mean, as after a change.
    ///
    /// # Errors
    /// Absurd numbers, names that do not fit together.
    pub fn check(&self) -> Result<(), ClusterError> {
        bounded("sites", self.sites.len(), SITES_MAX)?;
        if self.sites.is_empty() {
            return Err(ClusterError::Empty);
        }
        for (index, site) in self.sites.iter().enumerate() {
            if self.sites[..index].iter().any(|other| other.name == site.name) {
                return Err(ClusterError::Twice(site.name.clone()));
            }
            site.check()?;
        }
        for link in &self.links {
            link.check()?;
            let [one, other] = &link.between;
            let ends = (self.place(one, "a link")?, self.place(other, "a link")?);
            if ends.0 == ends.1 {
                return Err(ClusterError::Loop(one.clone()));
            }
        }
        self.link_default.as_ref().map_or(Ok(()), |link| link.check("link_default"))
    }

    /// Where a site of this name is in the list.
    ///
    /// # Errors
    /// There is none.
    pub fn place(&self, name: &str, by: &str) -> Result<usize, ClusterError> {
        self.sites.iter().position(|site| site.name == name).ok_or_else(|| {
            let scored = self.sites.iter().map(|site| (strsim::jaro_winkler(name, &site.name), &site.name));
            let near =
                scored.max_by(|left, right| left.0.total_cmp(&right.0)).filter(|(similarity, _)| *similarity > 0.6);
            let name = name.chars().take(80).collect();
            ClusterError::UnknownSite { place: by.to_owned(), name, near: near.map(|(_, name)| name.clone()) }
        })
    }

    /// The sites with what the catalogue knows of their devices.
    ///
    /// # Errors
    /// A device is not in the catalogue, or a precision is none.
    pub fn specs<'a>(&self, catalogue: &'a Catalogue) -> Result<Vec<SiteSpec<'a>>, ClusterError> {
        self.sites.iter().map(|site| site.spec(catalogue)).collect()
    }

    /// The links by the places of their sites.
    ///
    /// # Errors
    /// A link names no site.
    pub fn network(&self) -> Result<Links, ClusterError> {
        let mut pairs = BTreeMap::new();
        for link in &self.links {
            let (one, other) = (self.place(&link.between[0], "a link")?, self.place(&link.between[1], "a link")?);
            pairs.insert((one.min(other), one.max(other)), link.figures().link());
        }
        Ok(Links { pairs, default: self.link_default.as_ref().map(LinkFigures::link) })
    }
}

fn bounded(what: &'static str, found: usize, maximum: usize) -> Result<(), ClusterError> {
    if found > maximum { Err(ClusterError::TooMuch { what, found, maximum }) } else { Ok(()) }
}

fn in_range(place: &str, figures: &[(&'static str, Option<f64>)]) -> Result<(), ClusterError> {
    for (key, found) in figures {
        let (Some(found), Some((_, least, greatest))) = (*found, RANGES.iter().find(|(name, ..)| name == key)) else {
            continue;
        };
        if !(*least..=*greatest).contains(&found) {
            let place = place.chars().take(80).collect();
            return Err(ClusterError::Absurd { place, key, found, least: *least, greatest: *greatest });
        }
    }
    Ok(())
}

impl SiteEntry {
    fn check(&self) -> Result<(), ClusterError> {
        bounded("kinds of devices at a site", self.groups.len(), GROUPS_MAX)?;
        let place = format!("site \"{}\"", self.name);
        let counts = self.groups.iter().map(|group| group.devices).chain(self.devices);
        for devices in counts {
            in_range(&place, &[("devices", Some(f64::from(devices)))])?;
        }
        let figures = [
            ("devices_per_node", Some(f64::from(self.devices_per_node))),
            ("network_gbit_s", Some(self.network_gbit_s)),
            ("wan_gbit_s", self.wan_gbit_s),
            ("power_w_per_device", self.power_w_per_device),
            ("waiting_power_share", Some(self.waiting_power_share)),
            ("pue", Some(self.pue)),
            ("power_limit_kw", self.power_limit_kw),
            ("price_per_device_hour", self.price_per_device_hour),
            ("price_per_kwh", self.price_per_kwh),
            ("egress_price_per_gb", Some(self.egress_price_per_gb)),
            ("carbon_g_per_kwh", self.carbon_g_per_kwh),
        ];
        in_range(&place, &figures)?;
        let single = self.device.is_some() && self.devices.is_some();
        match (single, self.groups.is_empty()) {
            (true, true) => Ok(()),
            (false, false) if self.device.is_none() && self.devices.is_none() => Ok(()),
            _ => Err(ClusterError::Devices(self.name.clone())),
        }
    }

    fn spec<'a>(&self, catalogue: &'a Catalogue) -> Result<SiteSpec<'a>, ClusterError> {
        let precision = Precision::parse(&self.precision).ok_or_else(|| ClusterError::Precision {
            site: self.name.clone(),
            found: self.precision.chars().take(40).collect(),
        })?;
        let single = self.device.clone().zip(self.devices).map(|(device, devices)| GroupEntry { device, devices });
        let groups: Result<Vec<Group<'a>>, ClusterError> = single
            .iter()
            .chain(&self.groups)
            .map(|group| match catalogue.find(&group.device) {
                Ok(device) => Ok(Group { device, devices: group.devices }),
                Err(error) => Err(ClusterError::Device { site: self.name.clone(), error }),
            })
            .collect();
        Ok(SiteSpec {
            name: self.name.clone(),
            groups: groups?,
            devices_per_node: self.devices_per_node,
            network: BitsPerSecond::from_gigabits(self.network_gbit_s),
            access: self.wan_gbit_s.map(BitsPerSecond::from_gigabits),
            precision,
            tariff: self.tariff(),
        })
    }

    fn tariff(&self) -> Tariff {
        Tariff {
            power: self.power_w_per_device.map(Watts),
            waiting: self.waiting_power_share,
            pue: self.pue,
            power_limit: self.power_limit_kw.map(|kilowatts| Watts(kilowatts * 1e3)),
            device_hour: self.price_per_device_hour,
            kilowatt_hour: self.price_per_kwh,
            egress_gigabyte: self.egress_price_per_gb,
            carbon_per_kilowatt_hour: self.carbon_g_per_kwh,
        }
    }
}

impl LinkEntry {
    fn check(&self) -> Result<(), ClusterError> {
        self.figures().check(&format!("link {} - {}", self.between[0], self.between[1]))
    }

    fn figures(&self) -> LinkFigures {
        let Self { gbit_s, round_trip_ms, loss_percent, streams, loss_based, .. } = *self;
        LinkFigures { gbit_s, round_trip_ms, loss_percent, streams, loss_based }
    }
}

impl LinkFigures {
    fn check(&self, place: &str) -> Result<(), ClusterError> {
        let figures = [
            ("gbit_s", Some(self.gbit_s)),
            ("round_trip_ms", Some(self.round_trip_ms)),
            ("loss_percent", Some(self.loss_percent)),
            ("streams", Some(self.streams)),
        ];
        in_range(place, &figures)
    }

    fn link(&self) -> Link {
        let rate = BitsPerSecond::from_gigabits(self.gbit_s);
        Link {
            up: rate,
            down: rate,
            round_trip: Seconds::from_milliseconds(self.round_trip_ms),
            loss: self.loss_percent / 100.0,
            streams: self.streams,
            loss_based: self.loss_based,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
        [[site]]
        name = "oslo"
        device = "H100"
        devices = 512
        pue = 1.1
        price_per_kwh = 0.05
        [[site]]
        name = "lyon"
        network_gbit_s = 100
        [[site.group]]
        device = "A100"
        devices = 64
        [[site.group]]
        device = "MI300X"
        devices = 32
        [[link]]
        between = ["lyon", "oslo"]
        gbit_s = 10
        round_trip_ms = 30
        loss_percent = 0.1
    "#;

    #[test]
    fn sites_groups_and_links_are_read_with_their_units() {
        let catalogue = Catalogue::built_in();
        let cluster = Cluster::parse(TWO).unwrap();
        let (sites, links) = (cluster.specs(&catalogue).unwrap(), cluster.network().unwrap());
        assert_eq!((sites[0].groups.len(), sites[1].groups.len()), (1, 2));
        assert_eq!((sites[1].groups[1].device.name.as_str(), sites[1].groups[1].devices), ("Instinct MI300X", 32));
        assert_eq!((sites[0].tariff.pue, sites[0].tariff.kilowatt_hour), (1.1, Some(0.05)));
        let link = links.between(1, 0).unwrap();
        assert_eq!((link.up.gigabits(), link.round_trip, link.loss), (10.0, Seconds(0.03), 0.001));
    }

    #[test]
    fn what_nobody_can_mean_is_refused() {
        let refused = |from: &str, to: &str| {
            let text = TWO.replace(from, to);
            assert_ne!(text, TWO);
            Cluster::parse(&text).and_then(|cluster| cluster.specs(&Catalogue::built_in()).map(|_| ())).unwrap_err()
        };
        let error = refused("gbit_s = 10\n", "gbit_s = 1e9\n");
        assert_eq!(error.to_string(), "link lyon - oslo: gbit_s = 1000000000 is not between 0.000001 and 1000000");
        assert_eq!(refused("pue = 1.1", "pue = 0.5").to_string(), "site \"oslo\": pue = 0.5 is not between 1 and 5");
        assert!(refused("pue = 1.1", "pue = nan").to_string().contains("pue = NaN"));
        assert!(refused("gbit_s = 10\n", "gb_s = 10\n").to_string().contains("unknown field `gb_s`"));
        let error = refused("[\"lyon\", \"oslo\"]", "[\"lyon\", \"olso\"]");
        assert_eq!(error.to_string(), "a link names \"olso\", which is no site");
        assert_eq!(error.hint().as_deref(), Some("did you mean \"oslo\"?"));
        let error = refused("\"H100\"", "\"H1000\"");
        assert_eq!(error.to_string(), "site \"oslo\": no device is called \"H1000\" in the catalogue");
        assert!(error.hint().unwrap().starts_with("did you mean \"H100"), "{:?}", error.hint());
        assert!(matches!(refused("\"lyon\"\n", "\"oslo\"\n"), ClusterError::Twice(_)));
        assert!(matches!(refused("[\"lyon\", \"oslo\"]", "[\"lyon\", \"lyon\"]"), ClusterError::Loop(_)));
        assert!(matches!(refused("devices = 512\n", ""), ClusterError::Devices(_)));
        assert!(matches!(refused("pue = 1.1", "precision = \"int3\""), ClusterError::Precision { .. }));
        assert!(matches!(Cluster::parse(""), Err(ClusterError::Empty)));
    }
}
