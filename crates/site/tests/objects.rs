//! Deltas by way of an object store, through the agent: the same bits as directly, whatever the store does.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

#[allow(dead_code, unused_imports, reason = "the tests of engines in trouble need all of it")]
mod support;

use base::RunConfig;
use futures_util::future::join_all;
use site::agent::Outcome;
use site::{HangBounds, JoinOptions, RunFolder};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Coordinated, Run, TestEngine, coordinate};
use telemetry::{Event, EventLog, Reporter};
use tempfile::TempDir;

/// No test takes longer: a busy machine may need many times what an idle one does.
const PATIENCE: Duration = Duration::from_secs(120);

/// Between two looks at a folder.
const POLL: Duration = Duration::from_millis(10);

/// A folder that is an object store for the runs of these tests.
struct Store(TempDir);

impl Store {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn url(&self) -> String {
        format!("file://{}", self.0.path().display())
    }

    fn run(&self) -> PathBuf {
        self.0.path().join("engines")
    }

    /// Names of the objects that are in it as a whole; what is being written has a '#' in its name.
    fn names(&self) -> BTreeSet<String> {
        let Ok(entries) = fs::read_dir(self.run()) else { return BTreeSet::new() };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| !name.contains('#')).collect()
    }

    /// Takes over what `other` has and this has not, as `content` makes it. An object appears by a rename.
    fn take_over(&self, other: &Store, content: impl Fn(&Path) -> Option<Vec<u8>>) {
        fs::create_dir_all(self.run()).unwrap();
        for name in other.names().difference(&self.names()) {
            // One that has just been removed is not missed.
            let Some(content) = content(&other.run().join(name)) else { continue };
            let partial = self.run().join(format!("{name}#copy"));
            fs::write(&partial, content).unwrap();
            fs::rename(partial, self.run().join(name)).unwrap();
        }
    }
}

/// How a site takes part.
#[derive(Clone, Copy, Default)]
struct Part<'a> {
    store: Option<&'a Store>,
    cannot_be_dialled: bool,
}

const DIRECT: Part<'static> = Part { store: None, cannot_be_dialled: false };

fn with(store: &Store) -> Part<'_> {
    Part { store: Some(store), cannot_be_dialled: false }
}

fn alone(store: &Store) -> Part<'_> {
    Part { store: Some(store), cannot_be_dialled: true }
}

struct Joined {
    outcome: Outcome,
    events: Vec<Event>,
}

impl Joined {
    /// Ways that were chosen, and why.
    fn routes(&self) -> Vec<(&str, &str)> {
        let chosen = self.events.iter().filter_map(|event| match event {
            Event::RouteChosen { route, reason, .. } => Some((route.as_str(), reason.as_str())),
            _ => None,
        });
        chosen.collect()
    }

    fn warnings(&self) -> Vec<&str> {
        let warnings = self.events.iter().filter_map(|event| match event {
            Event::Warning { message, hint: Some(_) } => Some(message.as_str()),
            _ => None,
        });
        warnings.collect()
    }
}

async fn join(invite: wire::Invite, name: usize, part: Part<'_>, run: &Run, folder: RunFolder) -> Joined {
    let options = JoinOptions {
        invite,
        folder: folder.clone(),
        name: name.to_string(),
        listen: (!part.cannot_be_dialled).then(|| "127.0.0.1:0".parse().unwrap()),
        objects: part.store.map(Store::url),
        advertised_host: String::new(),
        proxy: None,
        engine: "test".to_owned(),
        threads: 1,
        slowdown: 1.0,
        measure_seconds: 0.0,
        coordinator_wait: std::time::Duration::ZERO,
        hang: HangBounds::default(),
    };
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&events);
    let log = EventLog::open(&folder.events(), &options.name, Box::new(|| 0)).unwrap();
    let watcher = move |record: &telemetry::Record| seen.lock().unwrap().push(record.event.clone());
    let engine = TestEngine::new(&run.config, &[]);
    let make = Box::new(move |_: &RunConfig, _: &site::TrainingState| Ok(Box::new(engine) as Box<dyn engine::Engine>));
    let joined = site::join(options, make, Reporter::new(log, Box::new(watcher)), std::future::pending()).await;
    let events = std::mem::take(&mut *events.lock().unwrap());
    Joined { outcome: joined.unwrap(), events }
}

/// Trains one and the same run over sites that take part like this, while `meanwhile` goes on beside them. All sites end with the
/// state that is given.
fn train(steps: u64, parts: &[Part<'_>], meanwhile: impl Future<Output = ()>) -> (Coordinated, Vec<Joined>) {
    let run = Run::new(|config| {
        config.train.steps = steps;
        config.sync.sites = parts.len() as u32;
        config.sync.shares = [1.0, 2.0, 5.0][..parts.len()].to_vec();
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let all = async {
        let (invite, coordinated) = coordinate(&run).await;
        let sites = parts.iter().enumerate().map(|(name, part)| {
            let folder = run.site_folder(&name.to_string());
            join(invite.clone(), name, *part, &run, folder)
        });
        let joined = tokio::select! {
            joined = join_all(sites) => joined,
            () = meanwhile => unreachable!("it goes on until the run has ended"),
        };
        (coordinated.await.unwrap(), joined)
    };
    let ended = runtime.block_on(async { tokio::time::timeout(PATIENCE, all).await });
    runtime.shutdown_background();
    let (coordinated, joined) = ended.unwrap();
    for site in &joined {
        assert_eq!(Some(site.outcome.state_hash), coordinated.state_hash);
    }
    assert_eq!((coordinated.ledger.returned, coordinated.ledger.lost), (0, 0));
    (coordinated, joined)
}

/// [`train`] with nothing beside it.
fn train_only(steps: u64, parts: &[Part<'_>]) -> (Coordinated, Vec<Joined>) {
    train(steps, parts, std::future::pending())
}

#[test]
fn sites_that_nobody_can_dial_hold_the_model_of_sites_that_dial_each_other() {
    let (direct, sites) = train_only(80, &[DIRECT; 3]);
    assert!(sites.iter().all(|site| site.routes().is_empty()), "nothing was chosen");
    let store = Store::new();
    let (by_store, sites) = train_only(80, &[alone(&store); 3]);
    assert_eq!((by_store.rounds, by_store.state_hash), (20, direct.state_hash));
    for site in sites {
        let only = ("object store", "there is no other way");
        assert_eq!(site.routes(), [only, only], "once for each other site");
        assert_eq!(site.warnings(), [""; 0]);
    }
    // Objects of rounds 1 to 7 have been removed by those who had left them, some rounds before the end.
    let left = store.names();
    let old = left.iter().find(|name| name.as_str() < "round-00000008");
    assert_eq!(old, None, "{left:?}");
    for site in 0..3 {
        assert!(left.iter().any(|name| name.contains(&format!("-site-{site}-"))), "{left:?}");
    }
}

#[test]
fn a_damaged_object_is_refused_and_its_delta_fetched_directly() {
    let good = Store::new();
    let (whole, _) = train_only(24, &[with(&good), with(&good)]);
    // The same run again; the store of the second site holds zeros under the names of the first one's objects.
    let damaged = Store::new();
    damaged.take_over(&good, |object| Some(vec![0; fs::read(object).unwrap().len()]));
    assert!(damaged.names().iter().any(|name| name.starts_with("round-00000002-fragment-0-site-0-")));
    let (again, sites) = train_only(24, &[DIRECT, with(&damaged)]);
    assert_eq!(again.state_hash, whole.state_hash);
    // The store is first tried in round 2.
    let warnings = sites[1].warnings();
    let refused = "the delta of site 0, round 2: delta of site 0, round 2, fragment 0 from the object store has hash ";
    assert!(warnings.len() == 1 && warnings[0].starts_with(refused), "{warnings:?}");
    let routes = sites[1].routes();
    assert!(routes.len() == 1 && routes[0].0 == "direct", "{routes:?}");
    assert!(routes[0].1.ends_with("and the other way failed"), "{routes:?}");
}

#[test]
fn who_has_no_store_gets_deltas_that_lie_there_from_a_site_that_has_one() {
    let (direct, _) = train_only(12, &[DIRECT; 3]);
    let store = Store::new();
    let (mixed, sites) = train_only(12, &[DIRECT, with(&store), alone(&store)]);
    assert_eq!(mixed.state_hash, direct.state_hash);
    let expected = "the delta of site 2, round 1: that site cannot be dialled, and this one has no object store";
    assert_eq!(sites[0].warnings().first(), Some(&expected));
}

#[test]
fn an_object_that_comes_late_is_waited_for() {
    let (direct, _) = train_only(12, &[DIRECT; 2]);
    let stores = [Store::new(), Store::new()];
    // Nothing passes between the two stores before both sites have left their first deltas.
    let carry = async {
        while stores.iter().any(|store| store.names().is_empty()) {
            tokio::time::sleep(POLL).await; // tidy: the interval of a poll that ends with its event
        }
        loop {
            stores[0].take_over(&stores[1], |object| fs::read(object).ok());
            stores[1].take_over(&stores[0], |object| fs::read(object).ok());
            tokio::time::sleep(POLL).await; // tidy: the interval of a carrier that ends with the run
        }
    };
    let (late, _) = train(12, &[alone(&stores[0]), alone(&stores[1])], carry);
    assert_eq!(late.state_hash, direct.state_hash);
}
