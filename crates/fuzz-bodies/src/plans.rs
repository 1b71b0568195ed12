//! What `beringia plan` reads: clusters, devices, tables, and words of a command line.

use crate::memory::Bound;
use planner::cluster::Cluster;
use planner::predict::predict_table;
use planner::what_if::Change;
use planner::{Catalogue, fit, models, units};
use std::sync::LazyLock;

/// A TOML value takes some hundred bytes of memory for a few of text; the catalogue that comes with the program is 1 MiB with what it is
/// made of.
const TOML: Bound = Bound { base_bytes: 4 << 20, per_byte: 512 };

static BUILT_IN: LazyLock<Catalogue> = LazyLock::new(Catalogue::built_in);

/// A cluster that is accepted has links and devices by the places of its sites.
pub fn cluster(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    LazyLock::force(&BUILT_IN);
    let Ok(cluster) = TOML.check(text.len(), || Cluster::parse(text)) else { return };
    cluster.network().expect("every link joins two sites");
    let _ = cluster.specs(&BUILT_IN);
    let [first, last] =
        [cluster.sites.first(), cluster.sites.last()].map(|site| site.expect("it has sites").name.clone());
    if let Ok(changed) = Change::Site(first.clone()).apply(&cluster) {
        assert_eq!(changed.sites.len(), cluster.sites.len() + 1);
    }
    let device = Change::Device { site: first.clone(), device: "H100".to_owned() };
    let link = Change::Link { one: first, other: last, gigabits: 1e6 };
    for change in [device, link] {
        if let Ok(changed) = change.apply(&cluster) {
            changed.network().expect("every link joins two sites");
        }
    }
}

/// A catalogue of one's own devices.
pub fn device_catalogue(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    LazyLock::force(&BUILT_IN);
    let Ok(catalogue) = TOML.check(text.len(), || BUILT_IN.with_user_file(text)) else { return };
    assert!(catalogue.devices().len() >= BUILT_IN.devices().len());
    for device in catalogue.devices() {
        catalogue.find(&device.name).expect("a device is found by its name");
    }
}

/// A table of layouts: as many rows come out as went in, each with a prediction or with why there is none.
pub fn layout_table(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    LazyLock::force(&BUILT_IN);
    // A cell of nothing takes 24 bytes; numbers of a prediction go beside each row.
    let bound = Bound { base_bytes: 1 << 20, per_byte: 1_024 };
    if let Ok(predicted) = bound.check(text.len(), || predict_table(&BUILT_IN, text)) {
        for prediction in predicted.rows.iter().flatten() {
            assert!(prediction.mfu.is_finite(), "{prediction:?}");
        }
    }
    let _ = fit::memory::compare(&BUILT_IN, text);
    for (_, read) in fit::tables::TABLES {
        let _ = read(&BUILT_IN, text);
    }
}

/// Counts, models and changes, as words.
pub fn command_texts(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    if let Some(count) = units::parse_count(text) {
        assert!(count.is_finite());
    }
    let _ = models::parse(text);
    if let Ok(change) = Change::parse(text) {
        assert!(!change.describe().is_empty());
    }
}
