//! A member that lies, seen from the agents of the others: what it gives in place of a delta is refused and counted, it is out of the run, and
//! the others go on with one model.
//!
//! An honest site's encoder refuses such numbers before they are sent, so the liar is no agent: it says what a site says, and has its own
//! shelf.

#![allow(clippy::unwrap_used, reason = "a test's helper may panic")]

#[allow(dead_code, unused_imports, reason = "the tests of engines in trouble need all of it")]
mod support;

use base::config::Codec;
use base::{ContentHash, Round, RunConfig, SiteId};
use futures_util::future::join_all;
use rounds::plan::LeaveReason;
use rounds::{Contribution, Directive, FragmentCodec, Report, RoundPlan};
use site::agent::Outcome;
use site::{HangBounds, JoinOptions, RunFolder};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::{Coordinated, Run, TestEngine, coordinate};
use telemetry::{Event, EventLog, Reporter};
use wire::message::{FromCoordinator, FromSite, Greeting, Role, SiteHello};
use wire::{Blob, BlobKey, BlobSource, Identity, Incoming, Invite, Listener, ListenerEvent, Purpose, Traffic};

/// No test takes longer: a busy machine may need many times what an idle one does.
const PATIENCE: Duration = Duration::from_secs(120);

/// When a round does without whom it waits for: long beside what an honest site needs here, which is milliseconds.
const DEADLINE_SECONDS: f64 = 4.0;

const LIAR: SiteId = SiteId(2);

/// What the liar serves, from the length of a delta, and the hash that it announces.
type Lie = fn(usize) -> (Vec<u8>, ContentHash);

/// Numbers as `Codec::F32` writes them, one of them not a number.
fn not_a_number(bytes: usize) -> (Vec<u8>, ContentHash) {
    let mut delta = vec![0; bytes];
    delta[28..32].copy_from_slice(&f32::NAN.to_le_bytes());
    let hash = ContentHash::of(&delta);
    (delta, hash)
}

/// The same, infinite, in `Codec::Bf16`.
fn infinite(bytes: usize) -> (Vec<u8>, ContentHash) {
    let mut delta = vec![0; bytes];
    delta[14..16].copy_from_slice(&0x7f80_u16.to_le_bytes());
    let hash = ContentHash::of(&delta);
    (delta, hash)
}

/// A delta, and the hash of another.
fn not_what_was_announced(bytes: usize) -> (Vec<u8>, ContentHash) {
    (vec![0; bytes], ContentHash::of(b"another"))
}

struct Shelf(Blob);

impl BlobSource for Shelf {
    fn open(&self, _peer: ContentHash, key: &BlobKey) -> Option<Blob> {
        matches!(key, BlobKey::Delta { .. }).then(|| self.0.clone())
    }
}

/// Serves that shelf to everybody.
async fn serve(mut listener: Listener, shelf: Arc<Shelf>) {
    while let Some(event) = listener.next().await {
        if let ListenerEvent::Incoming(Incoming { connection, .. }) = event {
            tokio::spawn(wire::serve_blobs(connection, Arc::clone(&shelf) as Arc<dyn BlobSource>));
        }
    }
}

/// Takes part with a lie, until it is dropped.
async fn lie(run: &Run, invite: Invite, lie: Lie) -> LeaveReason {
    let (identity, traffic) = (Identity::generate().unwrap(), Traffic::new());
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &identity, &traffic).await.unwrap();
    let (name, port) = (LIAR.to_string(), listener.address().port());
    let (advertised_host, engine) = (String::new(), "none".to_owned());
    let hello = SiteHello { name, advertised_host, port, engine, threads: 1, slowdown: 1.0 };
    let (address, fingerprint) = (invite.address(), invite.fingerprint());
    let connecting = wire::connect(&identity, &traffic, address, fingerprint, Purpose::Control);
    let mut connection = connecting.await.unwrap();
    let (run_name, secret) = (invite.run().to_owned(), Some(invite.secret().clone()));
    connection.send(&Greeting { run: run_name, secret, role: Role::Site(hello) }).await.unwrap();
    assert!(matches!(connection.recv().await.unwrap(), FromCoordinator::Welcome(_)));
    let schema = run.config.schema();
    let codec_of = |plan: &RoundPlan| FragmentCodec::new(plan.fragment, 1, &schema, &schema.whole());
    let (mut listener, mut attempt) = (Some(listener), 0);
    let (round, state_hash) = (Round(0), run.initial_state().global.hash());
    let ready = Report::Ready { round, state_hash, tokens_per_second: 1e6, recall: 0 };
    connection.send(&FromSite::Report(ready)).await.unwrap();
    loop {
        let FromCoordinator::Directive(directive) = connection.recv().await.unwrap() else { continue };
        let report = match directive {
            Directive::Begin(plan) => {
                attempt = plan.attempt;
                let (delta, delta_hash) = lie(codec_of(&plan).encoded_bytes());
                let contribution = contribution(run, &plan, delta_hash, delta.len() as u64);
                if let Some(listener) = listener.take() {
                    tokio::spawn(serve(listener, Arc::new(Shelf(Blob::memory(delta)))));
                }
                Report::Computed { round: plan.round, attempt, contribution, slice_hashes: Vec::new() }
            }
            // Nobody sees whether that is true.
            Directive::DeltaReady { round, contributor, .. } => {
                Report::Holds { round, attempt, from: contributor.site }
            }
            Directive::Dropped { reason } => return reason,
            _ => continue,
        };
        connection.send(&FromSite::Report(report)).await.unwrap();
    }
}

/// As if it had trained what it was given.
fn contribution(run: &Run, plan: &RoundPlan, delta_hash: ContentHash, delta_bytes: u64) -> Contribution {
    let assignment = plan.assignments.iter().find(|assignment| assignment.site == LIAR).unwrap();
    let tokens = assignment.samples * run.config.data.sequence_length as u64;
    Contribution { tokens, delta_hash, delta_bytes, loss_nats: 1.0, compute_seconds: 1.0 }
}

struct Joined {
    outcome: Outcome,
    events: Vec<Event>,
}

impl Joined {
    /// Round and reason of each refusal of the liar's delta.
    fn refusals(&self) -> Vec<(u64, &str)> {
        let refused = self.events.iter().filter_map(|event| match event {
            Event::DeltaRefused { round, from_site: LIAR, reason } => Some((round.0, reason.as_str())),
            Event::DeltaRefused { .. } => panic!("only one lies: {event:?}"),
            _ => None,
        });
        refused.collect()
    }
}

async fn join(invite: Invite, name: usize, run: &Run, folder: RunFolder) -> Joined {
    let options = JoinOptions {
        invite,
        folder: folder.clone(),
        name: name.to_string(),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        objects: None,
        advertised_host: String::new(),
        proxy: None,
        engine: "test".to_owned(),
        threads: 1,
        slowdown: 1.0,
        measure_seconds: 0.0,
        coordinator_wait: Duration::ZERO,
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

/// Two honest sites and a liar. The honest ones end with the state that is given, and the liar is out.
fn train_with(codec: Codec, told: Lie) -> (Coordinated, Vec<Joined>) {
    let run = Run::new(|config| {
        config.sync.codec = codec;
        config.sync.sites = 3;
        config.sync.shares = vec![1.0; 3];
        config.sync.deadline_seconds = DEADLINE_SECONDS;
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let all = async {
        let (invite, coordinated) = coordinate(&run).await;
        let honest = (0..2).map(|name| join(invite.clone(), name, &run, run.site_folder(&name.to_string())));
        let (joined, reason) = tokio::join!(join_all(honest), lie(&run, invite.clone(), told));
        assert_eq!(reason, LeaveReason::DeltaUnwanted);
        (coordinated.await.unwrap(), joined)
    };
    let ended = runtime.block_on(async { tokio::time::timeout(PATIENCE, all).await });
    runtime.shutdown_background();
    let (coordinated, joined) = ended.unwrap();
    assert_eq!(coordinated.left(LIAR.0), Some(LeaveReason::DeltaUnwanted));
    assert_eq!(coordinated.rounds, 3);
    for site in &joined {
        assert!(site.outcome.finished);
        assert_eq!(Some(site.outcome.state_hash), coordinated.state_hash);
    }
    let ledger = coordinated.ledger;
    assert_eq!(ledger.leased, ledger.committed + ledger.returned);
    assert!(ledger.returned > 0, "what the liar was to train is trained by nobody: {ledger:?}");
    (coordinated, joined)
}

/// Each site refuses it once: no other try would bring anything else.
fn assert_refused_once(codec: Codec, lie: Lie, reason: &str) {
    let (_, joined) = train_with(codec, lie);
    for site in joined {
        assert_eq!(site.refusals(), [(1, reason)]);
    }
}

#[test]
fn a_delta_with_nan_in_it_is_refused_counted_and_its_site_dropped() {
    assert_refused_once(Codec::F32, not_a_number, "f32: infinite, or not a number, in the block of value 0");
}

#[test]
fn an_infinite_delta_is_refused_counted_and_its_site_dropped() {
    assert_refused_once(Codec::Bf16, infinite, "bf16: infinite, or not a number, in the block of value 0");
}

#[test]
fn a_delta_with_another_hash_than_announced_is_refused_counted_and_its_site_dropped() {
    let (_, joined) = train_with(Codec::F32, not_what_was_announced);
    for site in joined {
        let refusals = site.refusals();
        assert!(!refusals.is_empty(), "{:?}", site.events);
        let expected = "delta of site 2, round 1, fragment 0 has hash ";
        assert!(refusals.iter().all(|(round, reason)| *round == 1 && reason.starts_with(expected)), "{refusals:?}");
    }
}
