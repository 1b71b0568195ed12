//! How the deltas of a round get from site to site: in a mesh, or sharded; and who merges which part of them.
//!
//! With S sites and deltas of b bits a value, a site sends and receives, in bits for each value of the fragment,
//! ```text
//! mesh:     (S - 1) b                       its delta, to everybody
//! sharded:  (1 - p) b + (S - 1) p 32        the others' slices of its delta, and the f32 merge of its own part p, to everybody
//! ```
//! and (1 - p) 32 + (S - 1) p b the other way. With equal parts p = 1/S that is (S - 1)/S (b + 32): less than a mesh where
//! S > 1 + 32/b. With unequal links the parts are such that all sites send for an equally long time: with u for a site's share of
//! all upload,
//! ```text
//! p = (u (S - 1) (b + 32) - b) / ((S - 1) 32 - b)      not below 0, and together 1
//! ```
//! unless equal parts take less time, because of what sites receive. The merged values are the same bits whichever way, and however
//! the parts are cut: every value is the sum of the same products in the same order. But for what is too long ([`super::clip`]): that is told
//! of each slice beside the other slices of its part.

use crate::plan::LinkReport;
use base::config::{Codec, Exchange};
use base::{ContentHash, SiteId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Most parts of a round: of more sites those merge that get the largest. 48 bytes each in a message of 1 MiB.
pub const PARTS_MAX: usize = 1_024;

/// Deltas below this are not worth the two more round trips that merged parts need: 2 x 50 ms at 20 Mbit/s are 250 kB.
const DELTA_BYTES_MIN: u64 = 256 << 10;

/// The other way must be this many times as fast as the one in use: links are measured with some noise.
const GAIN_MIN: f64 = 1.25;

/// Round trips more than a mesh needs: a merged part has to be announced and fetched.
const ROUND_TRIPS_MORE: f64 = 2.0;

/// Bytes of a merged value.
const MERGED_BYTES: u64 = size_of::<f32>() as u64;

/// Values of a round's fragment that one site merges for all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Who merges them.
    pub site: SiteId,
    /// Which: whole blocks of the codec.
    pub values: Range<u64>,
}

/// A part that is merged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergedPart {
    /// What was merged, and by whom.
    pub part: Part,
    /// BLAKE3 of the merge as little-endian f32.
    pub hash: ContentHash,
}

impl Part {
    /// Bytes of the merged values.
    pub fn merged_bytes(&self) -> u64 {
        self.values.end.saturating_sub(self.values.start).saturating_mul(MERGED_BYTES)
    }
}

/// Whether these follow one another from the first value on, none of them empty and no site twice, as a coordinator cuts them.
pub fn is_cut<'a>(parts: impl IntoIterator<Item = &'a Part>) -> bool {
    let (mut end, mut sites) = (0, BTreeSet::new());
    for part in parts {
        let follows = part.values.start == end && part.values.end > end;
        if !follows || !sites.insert(part.site) || sites.len() > PARTS_MAX {
            return false;
        }
        end = part.values.end;
    }
    end > 0
}

/// What travels in a round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Travelling {
    pub(crate) codec: Codec,
    /// Values of the fragment.
    pub(crate) elements: u64,
    /// Bytes of an encoded delta of it.
    pub(crate) delta_bytes: u64,
    /// Values that are coded together; `None` where the encoding cannot be cut.
    pub(crate) block_values: Option<usize>,
}

/// What a site can send and receive, bytes a second over all its links.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Rates {
    up: f64,
    down: f64,
}

/// Who takes part, and what is known of the links between them.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Links {
    /// The newest of each way, by receiver and sender.
    known: BTreeMap<(SiteId, SiteId), LinkReport>,
}

impl Links {
    /// What `receiver` says of its links.
    pub(crate) fn note(&mut self, receiver: SiteId, links: &[LinkReport]) {
        self.known.extend(links.iter().map(|link| ((receiver, link.from), *link)));
    }

    pub(crate) fn forget(&mut self, site: SiteId) {
        self.known.retain(|(to, from), _| *to != site && *from != site);
    }

    /// Those between these sites.
    fn among<'a>(&'a self, sites: &'a BTreeSet<SiteId>) -> impl Iterator<Item = (SiteId, &'a LinkReport)> {
        let is_among = |(to, from): &(SiteId, SiteId)| sites.contains(to) && sites.contains(from);
        self.known.iter().filter(move |(ends, _)| is_among(ends)).map(|((to, _), link)| (*to, link))
    }

    /// Of each of the sites; `None` where one has not been measured in both directions. Links of a site that have not been count as
    /// its others do on average.
    fn rates(&self, sites: &[SiteId]) -> Option<Vec<Rates>> {
        let others = sites.len().saturating_sub(1) as f64;
        let (mut up, mut down): (BTreeMap<SiteId, Mean>, BTreeMap<SiteId, Mean>) = Default::default();
        for (to, link) in self.among(&sites.iter().copied().collect()) {
            up.entry(link.from).or_default().add(link.bytes_per_second);
            down.entry(to).or_default().add(link.bytes_per_second);
        }
        let whole = |means: &BTreeMap<SiteId, Mean>, site: &SiteId| Some(means.get(site)?.value() * others);
        sites.iter().map(|site| Some(Rates { up: whole(&up, site)?, down: whole(&down, site)? })).collect()
    }

    fn round_trip_seconds(&self, sites: &[SiteId]) -> f64 {
        let sites = sites.iter().copied().collect();
        self.among(&sites).map(|(_, link)| link.round_trip_seconds).fold(0.0, f64::max)
    }
}

/// Of what has been added.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: u32,
}

impl Mean {
    fn add(&mut self, value: f64) {
        (self.sum, self.count) = (self.sum + value, self.count + 1);
    }

    fn value(self) -> f64 {
        self.sum / f64::from(self.count)
    }
}

/// How a round's deltas travel, and why.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Decision {
    /// Who merges what; empty in a mesh.
    pub(crate) parts: Vec<Part>,
    /// For people.
    pub(crate) reason: String,
}

impl Decision {
    fn mesh(reason: impl Into<String>) -> Self {
        Self { parts: Vec::new(), reason: reason.into() }
    }
}

/// Decides for a round in which `sites` take part; `undialled` is one of them that nobody can fetch from, `was_sharded` what the round before was.
pub(crate) fn decide(
    setting: Exchange,
    travelling: &Travelling,
    (sites, undialled): (&[SiteId], Option<SiteId>),
    links: &Links,
    was_sharded: bool,
) -> Decision {
    let Travelling { codec, elements, delta_bytes, block_values } = *travelling;
    let Some(block) = block_values else {
        return Decision::mesh(format!("{} deltas cannot be cut by values", codec.name()));
    };
    match (setting, undialled) {
        (Exchange::Mesh, _) => return Decision::mesh("as configured"),
        _ if sites.len() < 2 => return Decision::mesh("there are no other sites"),
        (_, Some(site)) => return Decision::mesh(format!("site {site} cannot be dialled")),
        (Exchange::Auto, _) if delta_bytes < DELTA_BYTES_MIN => {
            return Decision::mesh(format!("deltas of {delta_bytes} bytes are not worth more round trips"));
        }
        _ => {}
    }
    let rates = links.rates(sites);
    let cost = Cost::new(travelling, rates.as_deref(), sites.len());
    let (shares, sharded_seconds) = cost.best_shares(links.round_trip_seconds(sites));
    let mesh_seconds = cost.mesh();
    let reason = match (&rates, setting) {
        (_, Exchange::Sharded) => "as configured".to_owned(),
        (Some(_), _) => format!(
            "{} sites, {}: {sharded_seconds:.2} s sharded and {mesh_seconds:.2} s in a mesh, over the links as measured",
            sites.len(),
            codec.name()
        ),
        (None, _) => {
            let bits = |bytes: f64| 8.0 * bytes / elements.max(1) as f64;
            let (sharded, mesh) = (bits(sharded_seconds), bits(mesh_seconds));
            format!(
                "{} sites, {}: {sharded:.1} bits a value sharded and {mesh:.1} in a mesh",
                sites.len(),
                codec.name()
            )
        }
    };
    let is_faster = match was_sharded {
        true => mesh_seconds * GAIN_MIN > sharded_seconds,
        false => sharded_seconds * GAIN_MIN < mesh_seconds,
    };
    let is_sharded = setting == Exchange::Sharded || is_faster;
    let parts = if is_sharded { cut(elements, block as u64, sites, &shares) } else { Vec::new() };
    Decision { parts, reason }
}

/// Whether rounds of that many sites may be sharded, as far as a site can tell: how much sites keep depends on it.
pub(crate) fn may_be_sharded(setting: Exchange, travelling: &Travelling, sites: usize) -> bool {
    let cost = Cost::new(travelling, None, sites);
    match setting {
        _ if travelling.block_values.is_none() || sites < 2 => false,
        Exchange::Mesh => false,
        Exchange::Sharded => true,
        Exchange::Auto => travelling.delta_bytes >= DELTA_BYTES_MIN && cost.best_shares(0.0).1 < cost.mesh(),
    }
}

/// Time of the busiest direction of the busiest site. Without measured rates all sites send a byte a second, so that it counts bytes.
struct Cost {
    rates: Vec<Rates>,
    delta_bytes: f64,
    merged_bytes: f64,
}

impl Cost {
    fn new(travelling: &Travelling, rates: Option<&[Rates]>, sites: usize) -> Self {
        let rates = rates.map_or_else(|| vec![Rates { up: 1.0, down: 1.0 }; sites], <[Rates]>::to_vec);
        let merged_bytes = travelling.elements.saturating_mul(MERGED_BYTES) as f64;
        Self { rates, delta_bytes: travelling.delta_bytes as f64, merged_bytes }
    }

    fn copies(&self) -> f64 {
        self.rates.len().saturating_sub(1) as f64
    }

    fn mesh(&self) -> f64 {
        let bytes = self.copies() * self.delta_bytes;
        self.rates.iter().map(|rates| bytes / rates.up.min(rates.down)).fold(0.0, f64::max)
    }

    fn sharded(&self, shares: &[f64]) -> f64 {
        let seconds = |(rates, share): (&Rates, &f64)| {
            let sent = (1.0 - share) * self.delta_bytes + self.copies() * share * self.merged_bytes;
            let received = (1.0 - share) * self.merged_bytes + self.copies() * share * self.delta_bytes;
            (sent / rates.up).max(received / rates.down)
        };
        self.rates.iter().zip(shares).map(seconds).fold(0.0, f64::max)
    }

    /// Equal shares or those with which all send equally long, whichever take less time, and that time.
    fn best_shares(&self, round_trip_seconds: f64) -> (Vec<f64>, f64) {
        let equal = largest_shares(vec![1.0; self.rates.len()]);
        let best = match self.shares_by_upload() {
            Some(by_upload) if self.sharded(&by_upload) < self.sharded(&equal) => by_upload,
            _ => equal,
        };
        let seconds = self.sharded(&best) + ROUND_TRIPS_MORE * round_trip_seconds;
        (best, seconds)
    }

    fn shares_by_upload(&self) -> Option<Vec<f64>> {
        let total: f64 = self.rates.iter().map(|rates| rates.up).sum();
        let (copies, delta, merged) = (self.copies(), self.delta_bytes, self.merged_bytes);
        let each = copies * merged - delta;
        let share = |rates: &Rates| ((rates.up / total * copies * (delta + merged) - delta) / each).max(0.0);
        let shares: Vec<f64> = self.rates.iter().map(share).collect();
        let sum: f64 = shares.iter().sum();
        (each > 0.0 && sum.is_finite() && sum > 0.0).then(|| largest_shares(shares))
    }
}

/// Shares that together are 1, in proportion to these: of the [`PARTS_MAX`] largest, and of equals those of the first.
fn largest_shares(mut weights: Vec<f64>) -> Vec<f64> {
    if weights.len() > PARTS_MAX {
        let mut order: Vec<usize> = (0..weights.len()).collect();
        order.sort_by(|&one, &other| weights[other].total_cmp(&weights[one]).then(one.cmp(&other)));
        order[PARTS_MAX..].iter().for_each(|index| weights[*index] = 0.0);
    }
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// Cuts `elements` values at multiples of `block` in proportion to the shares. Who would get none is left out.
fn cut(elements: u64, block: u64, sites: &[SiteId], shares: &[f64]) -> Vec<Part> {
    let blocks = elements.div_ceil(block.max(1));
    let total: f64 = shares.iter().sum();
    let (mut sum, mut start, mut parts) = (0.0, 0, Vec::new());
    for (index, (site, share)) in sites.iter().zip(shares).enumerate() {
        sum += share;
        let is_last = index + 1 == sites.len();
        let end_block = if is_last { blocks } else { ((sum / total * blocks as f64).round() as u64).min(blocks) };
        let end = (end_block * block).min(elements);
        if end > start {
            parts.push(Part { site: *site, values: start..end });
            start = end;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ELEMENTS: u64 = 1 << 24;

    fn travelling(codec: Codec, bits: f64, block: Option<usize>) -> Travelling {
        let delta_bytes = (ELEMENTS as f64 * bits / 8.0) as u64;
        Travelling { codec, elements: ELEMENTS, delta_bytes, block_values: block }
    }

    fn sites(count: u32) -> Vec<SiteId> {
        (0..count).map(SiteId).collect()
    }

    fn is_sharded(setting: Exchange, travelling: &Travelling, count: u32) -> bool {
        !decide(setting, travelling, (&sites(count), None), &Links::default(), false).parts.is_empty()
    }

    /// All links of each site carry the same.
    fn links(up: &[f64], down: &[f64]) -> Links {
        let mut links = Links::default();
        let share = up.len() as f64 - 1.0;
        for (to, down) in (0..).zip(down) {
            let from = (0..).zip(up).filter(|(from, _)| *from != to);
            let report = |(from, up): (u32, &f64)| LinkReport {
                from: SiteId(from),
                bytes_per_second: up.min(*down) / share,
                round_trip_seconds: 0.0,
                loss: 0.0,
            };
            links.note(SiteId(to), &from.map(report).collect::<Vec<_>>());
        }
        links
    }

    #[test]
    fn it_pays_where_a_site_sends_fewer_bits() {
        // S > 1 + 32/b, and a quarter beyond it: (S - 1) b > 1.25 (S - 1)/S (b + 32).
        let first = |codec, bits, block| {
            let travelling = travelling(codec, bits, Some(block));
            (2..64).find(|count| is_sharded(Exchange::Auto, &travelling, *count)).unwrap()
        };
        assert_eq!(first(Codec::F32, 32.0, 1), 3);
        assert_eq!(first(Codec::Bf16, 16.0, 1), 4);
        assert_eq!(first(Codec::Int8, 8.125, 128), 7);
        assert_eq!(first(Codec::E3m0, 4.0625, 128), 12);
    }

    #[test]
    fn what_cannot_be_sharded_is_not() {
        let f32 = travelling(Codec::F32, 32.0, Some(1));
        assert!(is_sharded(Exchange::Sharded, &f32, 2) && !is_sharded(Exchange::Mesh, &f32, 8));
        assert!(!is_sharded(Exchange::Sharded, &f32, 1));
        assert!(!is_sharded(Exchange::Sharded, &travelling(Codec::LowRank, 1.0, None), 8));
        let undialled = decide(Exchange::Sharded, &f32, (&sites(3), Some(SiteId(2))), &Links::default(), false);
        assert_eq!(undialled, Decision::mesh("site 2 cannot be dialled"));
        let small = Travelling { elements: 1_000, delta_bytes: 4_000, ..f32 };
        assert!(!is_sharded(Exchange::Auto, &small, 8) && is_sharded(Exchange::Sharded, &small, 8));
    }

    #[test]
    fn parts_follow_the_upload_so_that_all_send_equally_long() {
        let bf16 = travelling(Codec::Bf16, 16.0, Some(1));
        let up = [2e6, 3e6, 3e6, 4e6];
        let links = links(&up, &[1e9; 4]);
        let Decision { parts, reason } = decide(Exchange::Auto, &bf16, (&sites(4), None), &links, false);
        let seconds = parts.iter().map(|part| {
            let share = (part.values.end - part.values.start) as f64 / ELEMENTS as f64;
            ((1.0 - share) * 2.0 + 3.0 * share * 4.0) * ELEMENTS as f64 / up[part.site.0 as usize]
        });
        let seconds: Vec<f64> = seconds.collect();
        assert_eq!(seconds.len(), 4);
        // T = (S - 1) (b + 32) / sum of u: 3 x 6 bytes a value over 12 MB/s; in a mesh the slowest sends 3 x 2 bytes at 2 MB/s.
        let expected = 18.0 * ELEMENTS as f64 / 12e6;
        assert!(seconds.iter().all(|seconds| (seconds / expected - 1.0).abs() < 1e-3), "{seconds:?}, {expected}");
        // The last merges 2/5 of the values: it receives 3 x 2/5 x 2 + 3/5 x 4 bytes a value, and was seen to receive 8/3 MB/s.
        assert!(reason.contains("30.20 s sharded and 50.33 s in a mesh"), "{reason}");
    }

    #[test]
    fn a_site_that_receives_slowly_keeps_the_parts_equal_or_the_mesh() {
        let bf16 = travelling(Codec::Bf16, 16.0, Some(1));
        // The first site sends slowly: it would merge nothing, and receive 32 bits a value over its slow link instead of 16 x 3 = 48.
        let slow = [0.25e6, 4e6, 4e6, 4e6];
        let Decision { parts, .. } = decide(Exchange::Sharded, &bf16, (&sites(4), None), &links(&slow, &slow), false);
        assert_eq!(parts[0].site, SiteId(1), "{parts:?}");
        assert!(is_cut(&parts));
    }

    #[test]
    fn of_very_many_sites_those_merge_that_can_send_most() {
        let fp4 = travelling(Codec::Mxfp4, 4.25, Some(32));
        let Decision { parts, .. } = decide(Exchange::Auto, &fp4, (&sites(3_000), None), &Links::default(), false);
        assert!(is_cut(&parts) && parts.len() == PARTS_MAX);
        assert_eq!(parts.last().map(|part| part.site), Some(SiteId(PARTS_MAX as u32 - 1)), "all alike: the first");
        let weights = (0..3_000).map(|index| if index == 2_999 { 3.0 } else { 1.0 }).collect();
        let shares = largest_shares(weights);
        assert_eq!(shares.iter().filter(|share| **share > 0.0).count(), PARTS_MAX);
        assert!(shares[2_999] > shares[PARTS_MAX - 2] && shares[PARTS_MAX - 1] == 0.0);
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn noise_does_not_change_the_exchange() {
        let bf16 = travelling(Codec::Bf16, 16.0, Some(1));
        let three = |was_sharded| {
            let links = links(&[1e6; 3], &[1e6; 3]);
            !decide(Exchange::Auto, &bf16, (&sites(3), None), &links, was_sharded).parts.is_empty()
        };
        // At 1 + 32/b sites both cost the same.
        assert!(!three(false) && three(true));
    }

    proptest! {
        #[test]
        fn parts_cover_all_values_at_blocks(
            elements in 1u64..100_000, block in prop::sample::select(vec![1u64, 32, 128, 4096]),
            shares in prop::collection::vec(0.01f64..10.0, 1..20),
        ) {
            let parts = cut(elements, block, &sites(shares.len() as u32), &shares);
            prop_assert!(is_cut(&parts));
            prop_assert_eq!(parts.last().unwrap().values.end, elements);
            prop_assert!(parts.iter().all(|part| part.values.start % block == 0));
        }
    }
}
