//! Time of collectives by size and link.
//!
//! An all-gather or reduce-scatter of S bytes over k devices of a node moves (k-1)/k S over the link of each; over m nodes then
//! (m-1)/m S over the network that the k members of a node have together (hierarchical, as NCCL's trees are; Thakur et al. 2005 for the
//! terms). An all-reduce is both, one after the other. An all-to-all moves (n-1)/n of what each device holds. Latency
//! grows with the steps of a tree: log2 n.

use super::constants::Constants;
use super::rates::Links;
use crate::units::{Bytes, BytesPerSecond, Seconds};

/// Microseconds in a second.
const MICRO: f64 = 1e-6;

/// Latency between nodes over that inside a node.
const NETWORK_LATENCY_RATIO: f64 = 2.0;

/// How many devices a group has, and how many of them on one node.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// Members.
    pub size: f64,
    /// Members on one node.
    pub per_node: f64,
}

impl Group {
    /// A group of ranks that lie `stride` apart on nodes of `node` devices: tensor-parallel ranks are neighbours, data-parallel
    /// ranks are a whole model-parallel block apart.
    pub fn placed(size: f64, stride: f64, node: f64) -> Self {
        let per_node = (node / stride).floor().clamp(1.0, size.max(1.0));
        Self { size, per_node }
    }

    /// Whether it spans nodes.
    pub fn spans_nodes(&self) -> bool {
        self.size > self.per_node
    }
}

fn latency(group: Group, constants: &Constants) -> Seconds {
    let ratio = if group.spans_nodes() { NETWORK_LATENCY_RATIO } else { 1.0 };
    Seconds(constants.collective_latency_microseconds * MICRO * ratio * group.size.log2().max(1.0) / 3.0)
}

/// All-gather or reduce-scatter whose full size is `bytes`.
pub fn gather(bytes: Bytes, group: Group, links: &Links, constants: &Constants) -> Seconds {
    if group.size <= 1.0 {
        return Seconds::ZERO;
    }
    let inside = bytes * ((group.per_node - 1.0) / group.per_node) / links.inside(constants);
    let nodes = group.size / group.per_node;
    let between = if group.spans_nodes() {
        bytes * ((nodes - 1.0) / nodes) / network(group.per_node, links, constants)
    } else {
        Seconds::ZERO
    };
    inside + between + latency(group, constants)
}

/// What the members on one node have of its network, one way.
fn network(members: f64, links: &Links, constants: &Constants) -> BytesPerSecond {
    links.network.bytes_per_second() * (members * constants.network_fraction)
}

/// All-reduce of `bytes` on each member: a reduce-scatter and an all-gather.
pub fn all_reduce(bytes: Bytes, group: Group, links: &Links, constants: &Constants) -> Seconds {
    gather(bytes, group, links, constants) * 2.0
}

/// All-to-all of `bytes` held by each member.
pub fn all_to_all(bytes: Bytes, group: Group, links: &Links, constants: &Constants) -> Seconds {
    if group.size <= 1.0 {
        return Seconds::ZERO;
    }
    let inside = if group.per_node > 1.0 { links.inside(constants) } else { BytesPerSecond(f64::INFINITY) };
    let within = bytes * ((group.per_node - 1.0) / group.size) / inside;
    // What leaves the node goes over this device's own share of the network.
    let between = if group.spans_nodes() {
        bytes * ((group.size - group.per_node) / group.size) / network(1.0, links, constants)
    } else {
        Seconds::ZERO
    };
    within + between + latency(group, constants)
}

/// A transfer to a neighbour.
pub fn send(bytes: Bytes, between_nodes: bool, links: &Links, constants: &Constants) -> Seconds {
    let group = Group { size: 2.0, per_node: if between_nodes { 1.0 } else { 2.0 } };
    let rate = if between_nodes { network(1.0, links, constants) } else { links.inside(constants) };
    bytes / rate + latency(group, constants)
}
