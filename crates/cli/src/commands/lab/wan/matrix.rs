//! Which link lies between whom: one for all, or a file that names pairs and directions.

use super::link::LinkSpec;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Name of the end that is no site.
pub(super) const COORDINATOR: &str = "coordinator";

/// Between two ends in a file: this direction, or both.
const ONE_WAY: &str = "->";
const BOTH_WAYS: &str = "<->";

/// Why a connection to the coordinator is never broken.
const NO_LOSS_TO_COORDINATOR: &str = "a site leaves the run when its connection to the coordinator breaks, so that this \
                                      link takes a rate and a round trip, and no loss";

/// The directed links of a lab. Ends are numbered: the sites in their order, then the coordinator.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Links {
    names: Vec<String>,
    /// By source, then destination. The diagonal is not used.
    specs: Vec<Vec<LinkSpec>>,
}

/// A file of links.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LinksFile {
    default: LinkSpec,
    coordinator: Option<LinkSpec>,
    #[serde(default)]
    links: BTreeMap<String, LinkSpec>,
}

impl Links {
    /// The same link everywhere, without loss to and from the coordinator.
    pub(crate) fn uniform(text: &str, sites: &[String]) -> Result<Self, String> {
        Ok(Self::of(text.parse()?, None, sites))
    }

    /// As a file says.
    pub(crate) fn from_toml(text: &str, sites: &[String]) -> Result<Self, String> {
        let file: LinksFile = toml::from_str(text).map_err(|error| error.to_string())?;
        let to_coordinator = file.coordinator.map(|spec| refuse_loss("coordinator", spec)).transpose()?;
        let mut links = Self::of(file.default, to_coordinator, sites);
        let mut named = BTreeMap::new();
        for (pair, spec) in file.links {
            for (from, to) in links.directions(&pair)? {
                let spec = match from.max(to) == sites.len() {
                    true => refuse_loss(&pair, spec)?,
                    false => spec,
                };
                if let Some(before) = named.insert((from, to), pair.clone()) {
                    return Err(format!("'{before}' and '{pair}' name the same direction"));
                }
                links.specs[from][to] = spec;
            }
        }
        Ok(links)
    }

    /// As a file that says the same, for whoever wants to know later what lay between the sites.
    pub(crate) fn to_toml(&self) -> String {
        let mut text = format!("default = \"{}\"\n\n[links]\n", self.specs[0][1]);
        for (from, row) in self.specs.iter().enumerate() {
            for (to, spec) in row.iter().enumerate().filter(|(to, _)| *to != from) {
                text.push_str(&format!("\"{} {ONE_WAY} {}\" = \"{spec}\"\n", self.names[from], self.names[to]));
            }
        }
        text
    }

    /// Bytes a second from one end to another, and the round trip, seconds. The sites have their numbers, the coordinator the next.
    pub(crate) fn way(&self, from: usize, to: usize) -> (f64, f64) {
        let (there, back) = (self.specs[from][to], self.specs[to][from]);
        (there.bits_per_second as f64 / 8.0, (there.round_trip + back.round_trip).as_secs_f64() / 2.0)
    }

    fn of(default: LinkSpec, coordinator: Option<LinkSpec>, sites: &[String]) -> Self {
        let names: Vec<String> = sites.iter().cloned().chain([COORDINATOR.to_owned()]).collect();
        let to_coordinator = coordinator.unwrap_or_else(|| default.without_loss());
        let spec = |from: usize, to: usize| if from.max(to) == sites.len() { to_coordinator } else { default };
        let row = |from| (0..names.len()).map(|to| spec(from, to)).collect();
        let specs = (0..names.len()).map(row).collect();
        Self { names, specs }
    }

    /// The directions that a key of the file means.
    fn directions(&self, pair: &str) -> Result<Vec<(usize, usize)>, String> {
        let both = pair.contains(BOTH_WAYS);
        let split = pair.split_once(if both { BOTH_WAYS } else { ONE_WAY });
        let (from, to) = split.ok_or_else(|| format!("'{pair}' is neither 'A {ONE_WAY} B' nor 'A {BOTH_WAYS} B'"))?;
        let (from, to) = (self.end(from.trim(), pair)?, self.end(to.trim(), pair)?);
        match (from == to, both) {
            (true, _) => Err(format!("'{pair}': there is no link from an end to itself")),
            (false, true) => Ok(vec![(from, to), (to, from)]),
            (false, false) => Ok(vec![(from, to)]),
        }
    }

    fn end(&self, name: &str, pair: &str) -> Result<usize, String> {
        let known = || self.names.join(", ");
        let index = self.names.iter().position(|known| known == name);
        index.ok_or_else(|| format!("'{pair}': there is no '{name}'; this lab has {}", known()))
    }

    /// Names of the ends: the sites, then the coordinator.
    pub(super) fn names(&self) -> &[String] {
        &self.names
    }

    pub(super) fn spec(&self, from: usize, to: usize) -> LinkSpec {
        self.specs[from][to]
    }
}

fn refuse_loss(what: &str, spec: LinkSpec) -> Result<LinkSpec, String> {
    match spec.loss_parts_per_million {
        0 => Ok(spec),
        _ => Err(format!("'{what}': {NO_LOSS_TO_COORDINATOR}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sites() -> Vec<String> {
        ["site-a", "site-b", "site-c"].map(str::to_owned).into()
    }

    fn from_toml(text: &str) -> Result<Links, String> {
        Links::from_toml(text, &sites())
    }

    /// Every direction, as source and destination.
    fn directions(links: &Links) -> impl Iterator<Item = (usize, usize)> {
        let ends = links.names().len();
        (0..ends).flat_map(move |from| (0..ends).map(move |to| (from, to))).filter(|(from, to)| from != to)
    }

    #[test]
    fn one_link_is_for_all_and_never_breaks_the_coordinators() {
        let links = Links::uniform("20Mbit/s,50ms,1%", &sites()).unwrap();
        assert_eq!(links.names(), ["site-a", "site-b", "site-c", COORDINATOR]);
        assert_eq!(directions(&links).count(), 12);
        for (from, to) in directions(&links) {
            let expected = if from.max(to) == 3 { "20Mbit/s,50ms" } else { "20Mbit/s,50ms,1%" };
            assert_eq!(links.spec(from, to).to_string(), expected);
        }
    }

    #[test]
    fn a_file_names_pairs_and_directions() {
        let text = r#"
            default = "20Mbit/s,50ms,0.1%"
            coordinator = "100Mbit/s,10ms"
            [links]
            "site-a <-> site-b" = "1Gbit/s,2ms"
            "site-a -> site-c" = "5Mbit/s,80ms,5ms"
            "coordinator -> site-b" = "1Mbit/s"
        "#;
        let links = from_toml(text).unwrap();
        let found: Vec<_> =
            directions(&links).map(|(from, to)| format!("{from}{to} {}", links.spec(from, to))).collect();
        let expected = [
            "01 1000Mbit/s,2ms",
            "02 5Mbit/s,80ms,5ms",
            "03 100Mbit/s,10ms",
            "10 1000Mbit/s,2ms",
            "12 20Mbit/s,50ms,0.1%",
            "13 100Mbit/s,10ms",
            "20 20Mbit/s,50ms,0.1%",
            "21 20Mbit/s,50ms,0.1%",
            "23 100Mbit/s,10ms",
            "30 100Mbit/s,10ms",
            "31 1Mbit/s",
            "32 100Mbit/s,10ms",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_written_down_is_read_back() {
        let links = from_toml(
            "default = \"20Mbit/s,50ms,2ms,0.1%\"\n[links]\n\"site-a -> site-c\" = \"5Mbit/s,80ms\"\n\"site-b <-> coordinator\" = \"7Mbit/s\"",
        )
        .unwrap();
        assert_eq!(Links::from_toml(&links.to_toml(), &sites()).unwrap(), links);
        // A round trip is half of each direction's.
        assert_eq!((links.way(0, 2), links.way(2, 0)), ((625_000.0, 0.065), (2_500_000.0, 0.065)));
    }

    #[test]
    fn a_file_that_makes_no_sense_is_refused_with_the_reason() {
        let links = |pair: &str| format!("default = \"1Mbit/s\"\n[links]\n{pair}");
        for (text, reason) in [
            ("", "missing field `default`"),
            ("default = \"20\"", "'20' has no unit"),
            ("default = 20", "expected a string"),
            ("default = \"1Mbit/s\"\nspeed = 1", "unknown field `speed`"),
            ("default = \"1Mbit/s\"\ncoordinator = \"1Mbit/s,1%\"", "no loss"),
            (&links("\"site-a -> coordinator\" = \"1Mbit/s,1%\""), "no loss"),
            (&links("\"site-a\" = \"1Mbit/s\""), "neither 'A -> B' nor 'A <-> B'"),
            (
                &links("\"site-a -> site-d\" = \"1Mbit/s\""),
                "no 'site-d'; this lab has site-a, site-b, site-c, coordinator",
            ),
            (&links("\"site-a -> site-a\" = \"1Mbit/s\""), "to itself"),
            (&links("\"site-a -> site-b\" = \"1Mbit/s\"\n\"site-b <-> site-a\" = \"1Mbit/s\""), "the same direction"),
            (&links("\"site-a -> site-b\" = \"1Mbit/s,1ms,2ms,3ms\""), "one too many"),
        ] {
            let refused = from_toml(text).unwrap_err();
            assert!(refused.contains(reason), "{text}: {refused}");
        }
    }
}
