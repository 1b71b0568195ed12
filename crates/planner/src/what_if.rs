//! One thing about a cluster otherwise: one more site, more bandwidth on a link, other devices at a site.

use crate::cluster::{Cluster, ClusterError, LinkEntry};
use base::Hint;

/// Gbit/s that a link may get more.
const GIGABITS: core::ops::RangeInclusive<f64> = 1e-6..=1e6;

/// A change of a cluster.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// `site=NAME`: one more site like this one, with its links.
    Site(String),
    /// `link=A,B+G`: so many Gbit/s more on a link.
    Link {
        /// One end.
        one: String,
        /// The other.
        other: String,
        /// Gbit/s more.
        gigabits: f64,
    },
    /// `device=NAME:DEVICE`: another device at a site, as many.
    Device {
        /// The site.
        site: String,
        /// What stands there instead.
        device: String,
    },
}

/// Why a text is no change, or cannot be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError {
    /// Not of the three forms.
    #[error("\"{0}\" is no change that is known")]
    Form(String),
    /// No such link.
    #[error("no link joins {0} and {1}")]
    NoLink(String, String),
    /// The changed cluster cannot be.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
}

impl Hint for ChangeError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Form(_) => {
                Some("write site=NAME, link=A,B+GBIT or device=NAME:DEVICE, for example link=oslo,paris+1".to_owned())
            }
            Self::NoLink(..) => Some("name a pair of sites that [[link]] or [link_default] joins".to_owned()),
            Self::Cluster(error) => error.hint(),
        }
    }
}

impl Change {
    /// Reads one of the three forms.
    ///
    /// # Errors
    /// None of them.
    pub fn parse(text: &str) -> Result<Self, ChangeError> {
        let form = || ChangeError::Form(text.chars().take(80).collect());
        let (kind, rest) = text.split_once('=').ok_or_else(form)?;
        match kind.trim() {
            "site" if !rest.trim().is_empty() => Ok(Self::Site(rest.trim().to_owned())),
            "link" => {
                let (ends, gigabits) = rest.rsplit_once('+').ok_or_else(form)?;
                let (one, other) = ends.split_once(',').ok_or_else(form)?;
                let gigabits: f64 = gigabits.trim().parse().map_err(|_| form())?;
                if !GIGABITS.contains(&gigabits) {
                    return Err(form());
                }
                Ok(Self::Link { one: one.trim().to_owned(), other: other.trim().to_owned(), gigabits })
            }
            "device" => {
                let (site, device) =
                    rest.split_once(':').filter(|(_, device)| !device.trim().is_empty()).ok_or_else(form)?;
                Ok(Self::Device { site: site.trim().to_owned(), device: device.trim().to_owned() })
            }
            _ => Err(form()),
        }
    }

    /// In words.
    pub fn describe(&self) -> String {
        match self {
            Self::Site(name) => format!("one more site like {name}"),
            Self::Link { one, other, gigabits } => format!("{gigabits} Gbit/s more between {one} and {other}"),
            Self::Device { site, device } => format!("{device} at {site}"),
        }
    }

    /// The cluster with this change.
    ///
    /// # Errors
    /// It names what is not there, or the result cannot be.
    pub fn apply(&self, cluster: &Cluster) -> Result<Cluster, ChangeError> {
        let mut changed = cluster.clone();
        match self {
            Self::Site(name) => add_site(&mut changed, name)?,
            Self::Link { one, other, gigabits } => widen(&mut changed, one, other, *gigabits)?,
            Self::Device { site, device } => {
                let place = changed.place(site, "--what-if")?;
                let entry = &mut changed.sites[place];
                let all = entry.groups.iter().map(|group| group.devices).sum::<u32>() + entry.devices.unwrap_or(0);
                entry.groups.clear();
                (entry.device, entry.devices) = (Some(device.clone()), Some(all));
                // What was said of the old device's power and speed is not the new one's.
                (entry.power_w_per_device, entry.tokens_per_second) = (None, None);
            }
        }
        changed.check()?;
        Ok(changed)
    }
}

/// A twin with a name of its own, joined to the others as its model is, and to it as it is to its fastest neighbour.
fn add_site(cluster: &mut Cluster, name: &str) -> Result<(), ChangeError> {
    let mut twin = cluster.sites[cluster.place(name, "--what-if")?].clone();
    let taken = |name: &str| cluster.sites.iter().any(|site| site.name == name);
    let free = (2..).map(|number| format!("{name}-{number}")).find(|name| !taken(name));
    twin.line = None;
    twin.name = free.unwrap_or_else(|| unreachable!("numbers do not end"));
    let new = |link: LinkEntry| LinkEntry { line: None, ..link };
    let mine: Vec<LinkEntry> =
        cluster.links.iter().filter(|link| link.between.iter().any(|end| end == name)).cloned().map(new).collect();
    let fastest = mine.iter().max_by(|left, right| left.gbit_s.total_cmp(&right.gbit_s)).cloned();
    for mut link in mine {
        link.between.iter_mut().filter(|end| *end == name).for_each(|end| end.clone_from(&twin.name));
        cluster.links.push(link);
    }
    if let Some(link) = fastest {
        cluster.links.push(LinkEntry { between: [name.to_owned(), twin.name.clone()], ..link });
    }
    cluster.sites.push(twin);
    Ok(())
}

fn widen(cluster: &mut Cluster, one: &str, other: &str, gigabits: f64) -> Result<(), ChangeError> {
    cluster.place(one, "--what-if")?;
    cluster.place(other, "--what-if")?;
    let joins = |link: &&mut LinkEntry| link.between.iter().all(|end| end == one || end == other);
    if let Some(link) = cluster.links.iter_mut().find(joins) {
        link.gbit_s += gigabits;
        return Ok(());
    }
    let figures = cluster.link_default.clone().ok_or_else(|| ChangeError::NoLink(one.to_owned(), other.to_owned()))?;
    cluster.links.push(LinkEntry {
        line: None,
        between: [one.to_owned(), other.to_owned()],
        gbit_s: figures.gbit_s + gigabits,
        round_trip_ms: figures.round_trip_ms,
        loss_percent: figures.loss_percent,
        streams: figures.streams,
        loss_based: figures.loss_based,
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = "
        [[site]]
        name = \"oslo\"
        device = \"H100\"
        devices = 512
        [[site]]
        name = \"lyon\"
        device = \"A100\"
        devices = 64
        power_w_per_device = 500
        [[link]]
        between = [\"lyon\", \"oslo\"]
        gbit_s = 10
    ";

    fn changed(text: &str) -> Result<Cluster, ChangeError> {
        Change::parse(text)?.apply(&Cluster::parse(TWO).unwrap())
    }

    #[test]
    fn a_twin_is_joined_as_its_model() {
        let cluster = changed("site=oslo").unwrap();
        assert_eq!((cluster.sites.len(), cluster.sites[2].name.as_str()), (3, "oslo-2"));
        let links = cluster.network().unwrap();
        assert!([(0, 1), (1, 2), (0, 2)].into_iter().all(|(one, other)| links.between(one, other).is_some()));
    }

    #[test]
    fn a_link_is_widened_and_a_device_replaced() {
        assert_eq!(changed("link=oslo,lyon+1.5").unwrap().links[0].gbit_s, 11.5);
        let cluster = changed("device=lyon:H20").unwrap();
        let lyon = &cluster.sites[1];
        assert_eq!((lyon.device.as_deref(), lyon.devices, lyon.power_w_per_device), (Some("H20"), Some(64), None));
    }

    #[test]
    fn other_words_are_refused_with_the_forms() {
        let links = ["link=oslo,lyon", "link=oslo,lyon+x", "link=oslo,lyon+-1", "link=oslo,lyon+1e300"];
        for text in ["", "more", "site= ", "device=lyon", "device=lyon:", "city=oslo"].into_iter().chain(links) {
            let error = changed(text).unwrap_err();
            assert!(
                matches!(error, ChangeError::Form(_)) && error.hint().unwrap().contains("link=oslo,paris+1"),
                "{error}"
            );
        }
        assert_eq!(changed("site=olso").unwrap_err().hint().as_deref(), Some("did you mean \"oslo\"?"));
    }
}
