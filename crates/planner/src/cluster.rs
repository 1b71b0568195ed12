//! Sites and the links between them, as a strict TOML that a user writes. Keys end in their units; unknown keys and numbers that nobody can
//! mean are refused. `docs/plan.md` lists the keys.

use crate::catalogue::{Catalogue, CatalogueError, Fp8Scale, Precision};
use crate::search::account;
use crate::search::account::Tariff;
use crate::search::{Group, Links, SITES_MAX, SiteSpec};
use crate::units::{BitsPerSecond, Seconds, Watts, plain};
use crate::wan::Link;
use base::Hint;
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, BTreeSet};
use toml::Spanned;

/// Longest text, bytes: 64 sites and their 2,016 links take 300 KB.
const TEXT_BYTES_MAX: usize = 1 << 20;

/// Kinds of devices of one site.
const GROUPS_MAX: usize = 8;

/// Longest name of a site, characters: one column of a terminal's table.
const NAME_CHARACTERS_MAX: usize = 64;

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
    ("tokens_per_second", 1e-3, 1e12),
    ("power_w_per_device", 1.0, 1e5),
    ("waiting_power_share", 0.0, 1.0),
    ("pue", 1.0, 5.0),
    ("power_limit_kw", 1e-3, 1e8),
    ("price_per_device_hour", 0.0, 1e6),
    ("price_per_kwh", 0.0, 1e6),
    ("egress_price_per_gb", 0.0, 1e6),
    ("carbon_g_per_kwh", 0.0, 5_000.0),
];

/// A cluster.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Data centres.
    pub sites: Vec<SiteEntry>,
    /// Links of pairs of them.
    pub links: Vec<LinkEntry>,
    /// The link of every pair that has none of its own.
    pub link_default: Option<LinkFigures>,
}

/// A cluster as it is written, with the places of its tables in the text.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    #[serde(rename = "site", default)]
    sites: Vec<Spanned<SiteEntry>>,
    #[serde(rename = "link", default)]
    links: Vec<Spanned<LinkEntry>>,
    link_default: Option<LinkFigures>,
}

impl Written {
    fn cluster(self, text: &str) -> Cluster {
        let line = |start: usize| Some(1 + text.as_bytes()[..start].iter().filter(|byte| **byte == b'\n').count());
        let sites =
            self.sites.into_iter().map(|entry| SiteEntry { line: line(entry.span().start), ..entry.into_inner() });
        let links =
            self.links.into_iter().map(|entry| LinkEntry { line: line(entry.span().start), ..entry.into_inner() });
        Cluster { sites: sites.collect(), links: links.collect(), link_default: self.link_default }
    }
}

/// One `[[site]]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteEntry {
    /// Line of the file on which its table begins, if it comes from one.
    #[serde(skip)]
    pub line: Option<usize>,
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
    /// Speed that the site has been seen to have alone with the model that is planned, instead of what would be predicted.
    pub tokens_per_second: Option<f64>,
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
    /// Line of the file on which its table begins, if it comes from one.
    #[serde(skip)]
    pub line: Option<usize>,
    /// Names of its two sites.
    #[serde(deserialize_with = "pair")]
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

/// Exactly two names: an array's own deserialisation would leave out a third without a word.
fn pair<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[String; 2], D::Error> {
    let names = Vec::<String>::deserialize(deserializer)?;
    let count = names.len();
    names.try_into().map_err(|_| serde::de::Error::invalid_length(count, &"the names of two sites"))
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
    #[error("{place}: another site has that name already")]
    Twice {
        /// The second.
        place: String,
        /// The name.
        name: String,
    },
    /// A name that a table or a terminal cannot show.
    #[error(
        "{place}: the name is empty, begins or ends with a space, is longer than {NAME_CHARACTERS_MAX} characters, or holds control characters"
    )]
    Name {
        /// The site.
        place: String,
    },
    /// Two links of one pair.
    #[error("{place}: another link joins these two already")]
    LinkTwice {
        /// The second.
        place: String,
    },
    /// A number that nobody can mean.
    #[error("{place}: {key} = {} is not between {least} and {greatest}", plain(*found))]
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
    #[error("{0} needs either device and devices, or [[site.group]] tables with them")]
    Devices(String),
    /// A number format that is none.
    #[error("{site}: \"{found}\" is no precision")]
    Precision {
        /// The site.
        site: String,
        /// What it says.
        found: String,
    },
    /// FP8 where the device has none.
    #[error("{site}: precision = \"fp8\", but {device} has no FP8 products")]
    NoFp8 {
        /// The site.
        site: String,
        /// Its device.
        device: String,
    },
    /// A limit of power over devices whose power nobody knows.
    #[error("{site}: power_limit_kw is given, but the power of {device} is unknown, and nothing is guessed")]
    UnknownPower {
        /// The site.
        site: String,
        /// Its device.
        device: String,
    },
    /// A device that nobody knows.
    #[error("{site}: {error}")]
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
    #[error("{0} joins a site with itself")]
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
            Self::Twice { name, .. } => format!("give one \"{name}\" another name"),
            Self::Name { .. } => "give the site a short name of letters, digits or hyphens".to_owned(),
            Self::LinkTwice { .. } => "keep one of the two".to_owned(),
            Self::NoFp8 { .. } => "write precision = \"bf16\"".to_owned(),
            Self::UnknownPower { .. } => "give the site power_w_per_device".to_owned(),
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
        let written: Written =
            toml::from_str(text).map_err(|error| ClusterError::Syntax(error.to_string().trim_end().to_owned()))?;
        let cluster = written.cluster(text);
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
                return Err(ClusterError::Twice { place: site.place(), name: site.name.clone() });
            }
            site.check()?;
        }
        let mut joined = BTreeSet::new();
        for link in &self.links {
            link.check()?;
            let (one, other) = self.ends(link)?;
            if one == other {
                return Err(ClusterError::Loop(link.place()));
            }
            if !joined.insert((one, other)) {
                return Err(ClusterError::LinkTwice { place: link.place() });
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
            pairs.insert(self.ends(link)?, link.figures().link());
        }
        Ok(Links { pairs, default: self.link_default.as_ref().map(LinkFigures::link) })
    }

    /// Places of a link's sites, the smaller first.
    fn ends(&self, link: &LinkEntry) -> Result<(usize, usize), ClusterError> {
        let by = link.place();
        let (one, other) = (self.place(&link.between[0], &by)?, self.place(&link.between[1], &by)?);
        Ok((one.min(other), one.max(other)))
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
            return Err(ClusterError::Absurd {
                place: place.to_owned(),
                key,
                found,
                least: *least,
                greatest: *greatest,
            });
        }
    }
    Ok(())
}

/// `line 12, ` where the line is known.
fn at(line: Option<usize>) -> String {
    line.map_or_else(String::new, |line| format!("line {line}, "))
}

/// A name as a message shows it: bounded, control characters escaped.
fn shown(name: &str) -> String {
    name.chars().take(NAME_CHARACTERS_MAX).flat_map(char::escape_debug).collect()
}

impl SiteEntry {
    /// The site in a message, with its line.
    fn place(&self) -> String {
        format!("{}site \"{}\"", at(self.line), shown(&self.name))
    }

    fn check(&self) -> Result<(), ClusterError> {
        let place = self.place();
        let printable = self.name.chars().all(|letter| !letter.is_control());
        if self.name.is_empty()
            || self.name.trim() != self.name
            || self.name.chars().count() > NAME_CHARACTERS_MAX
            || !printable
        {
            return Err(ClusterError::Name { place });
        }
        bounded("kinds of devices at a site", self.groups.len(), GROUPS_MAX)?;
        let counts = self.groups.iter().map(|group| group.devices).chain(self.devices);
        for devices in counts {
            in_range(&place, &[("devices", Some(f64::from(devices)))])?;
        }
        let figures = [
            ("devices_per_node", Some(f64::from(self.devices_per_node))),
            ("network_gbit_s", Some(self.network_gbit_s)),
            ("wan_gbit_s", self.wan_gbit_s),
            ("tokens_per_second", self.tokens_per_second),
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
            _ => Err(ClusterError::Devices(place)),
        }
    }

    fn spec<'a>(&self, catalogue: &'a Catalogue) -> Result<SiteSpec<'a>, ClusterError> {
        let precision = Precision::parse(&self.precision).ok_or_else(|| ClusterError::Precision {
            site: self.place(),
            found: self.precision.chars().take(40).collect(),
        })?;
        let single = self.device.clone().zip(self.devices).map(|(device, devices)| GroupEntry { device, devices });
        let groups: Result<Vec<Group<'a>>, ClusterError> = single
            .iter()
            .chain(&self.groups)
            .map(|group| match catalogue.find(&group.device) {
                Ok(device) => Ok(Group { device, devices: group.devices }),
                Err(error) => Err(ClusterError::Device { site: self.place(), error }),
            })
            .collect();
        let groups = groups?;
        self.check_devices(&groups, precision)?;
        Ok(SiteSpec {
            name: self.name.clone(),
            groups,
            devices_per_node: self.devices_per_node,
            network: BitsPerSecond::from_gigabits(self.network_gbit_s),
            access: self.wan_gbit_s.map(BitsPerSecond::from_gigabits),
            precision,
            measured: self.tokens_per_second,
            tariff: self.tariff(),
        })
    }

    /// Refuses what contradicts the devices: FP8 that they do not have, a limit of power that nobody can hold them to.
    fn check_devices(&self, groups: &[Group<'_>], precision: Precision) -> Result<(), ClusterError> {
        for group in groups {
            let (site, device) = (self.place(), group.device.name.clone());
            if precision == Precision::Fp8 && group.device.fp8_scale == Fp8Scale::None {
                return Err(ClusterError::NoFp8 { site, device });
            }
            if self.power_limit_kw.is_some() && account::device_power(&self.tariff(), group).is_none() {
                return Err(ClusterError::UnknownPower { site, device });
            }
        }
        Ok(())
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
        self.figures().check(&self.place())
    }

    /// The link in a message, with its line.
    fn place(&self) -> String {
        format!("{}link {} - {}", at(self.line), shown(&self.between[0]), shown(&self.between[1]))
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

    fn refused(from: &str, to: &str) -> ClusterError {
        let text = TWO.replace(from, to);
        assert_ne!(text, TWO);
        Cluster::parse(&text).and_then(|cluster| cluster.specs(&Catalogue::built_in()).map(|_| ())).unwrap_err()
    }

    #[test]
    fn what_nobody_can_mean_is_refused() {
        let error = refused("gbit_s = 10\n", "gbit_s = 1e9\n");
        assert_eq!(
            error.to_string(),
            "line 17, link lyon - oslo: gbit_s = 1000000000 is not between 0.000001 and 1000000"
        );
        let error = refused("pue = 1.1", "pue = 0.5");
        assert_eq!(error.to_string(), "line 2, site \"oslo\": pue = 0.5 is not between 1 and 5");
        assert!(refused("pue = 1.1", "pue = nan").to_string().contains("pue = NaN"));
        assert!(refused("gbit_s = 10\n", "gb_s = 10\n").to_string().contains("unknown field `gb_s`"));
        assert!(matches!(refused("devices = 512\n", ""), ClusterError::Devices(_)));
        assert!(matches!(refused("pue = 1.1", "precision = \"int3\""), ClusterError::Precision { .. }));
        assert!(matches!(Cluster::parse(""), Err(ClusterError::Empty)));
    }

    #[test]
    fn names_that_do_not_fit_together_are_refused() {
        let error = refused("[\"lyon\", \"oslo\"]", "[\"lyon\", \"olso\"]");
        assert_eq!(error.to_string(), "line 17, link lyon - olso names \"olso\", which is no site");
        assert_eq!(error.hint().as_deref(), Some("did you mean \"oslo\"?"));
        let error = refused("\"H100\"", "\"H1000\"");
        assert_eq!(error.to_string(), "line 2, site \"oslo\": no device is called \"H1000\" in the catalogue");
        assert!(error.hint().unwrap().starts_with("did you mean \"H100"), "{:?}", error.hint());
        let error = refused("\"lyon\"\n", "\"oslo\"\n");
        assert_eq!(error.to_string(), "line 8, site \"oslo\": another site has that name already");
        assert!(matches!(refused("[\"lyon\", \"oslo\"]", "[\"lyon\", \"lyon\"]"), ClusterError::Loop(_)));
        let error = refused("[\"lyon\", \"oslo\"]", "[\"lyon\", \"oslo\", \"paris\"]");
        assert!(error.to_string().contains("invalid length 3, expected the names of two sites"), "{error}");
        let again = "[[link]]\nbetween = [\"oslo\", \"lyon\"]\ngbit_s = 1\n[[link]]\nbetween = [\"lyon\"";
        let error = refused("[[link]]\n        between = [\"lyon\"", again);
        assert_eq!(error.to_string(), "line 20, link lyon - oslo: another link joins these two already");
        for name in ["", " oslo", "os\\nlo", "\\u001b[31mred", &"x".repeat(65)] {
            let error = refused("name = \"oslo\"", &format!("name = \"{name}\""));
            assert!(matches!(error, ClusterError::Name { .. }), "{name}: {error}");
            assert!(error.to_string().chars().all(|letter| !letter.is_control()), "{error}");
        }
    }

    #[test]
    fn what_contradicts_a_device_is_refused() {
        let error = refused("network_gbit_s = 100", "precision = \"fp8\"");
        assert_eq!(
            error.to_string(),
            "line 8, site \"lyon\": precision = \"fp8\", but A100 SXM4 80GB has no FP8 products"
        );
        let error = refused("device = \"H100\"\n", "device = \"TPU v5p\"\npower_limit_kw = 5\n");
        assert!(matches!(error, ClusterError::UnknownPower { .. }), "{error}");
    }
}
