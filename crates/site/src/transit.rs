//! Deltas on their way: fetched directly from the sites that hold them or from an object store, and left in that store.
//!
//! [`rounds::routes`] says which way is tried first; the other one follows where it fails or takes long. Whichever brings
//! the delta, it is the same bytes: their length and BLAKE3 are what the coordinator has announced, and they are what an encoder
//! can have written. What is not is refused, named in the log, and fetched the other way or again, until the delta is here or its
//! round is over. So nothing is lost by a store that is away, or that gives something else back. Bytes that were announced so and are no
//! delta are not fetched again: their round goes on without their site, or ends.

pub(crate) mod sharded;

use crate::shelf::Shelf;
use base::{Hint, Round, SiteId};
use bytes::Bytes;
use objects::{ObjectKey, ObjectStore};
use rounds::{Contributor, FragmentCodec, OpenRoutes, Route, RouteChoice, Routes};
use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use telemetry::{Event, Reporter};
use tokio::sync::{Notify, watch};
use wire::{BlobClient, BlobKey, BlobRequest, FetchError, Holder, Traffic};

/// Pause before what could not be fetched or left is tried again.
pub(crate) const AGAIN: Duration = Duration::from_secs(1);

/// Streams for one delta or state.
pub(crate) const BULK_STREAMS: usize = 8;

/// How long an object is waited for before the log says so; then it is waited for again.
const STORE_PATIENCE: Duration = Duration::from_secs(30);

/// A delta whose round is not merged by then is left anew, because somebody may have removed or damaged it; and again after
/// twice as long, so that a round of a day costs eleven times its bytes and not a thousand times.
const LEAVE_ANEW: Duration = Duration::from_secs(60);

/// Own objects are removed from the store when those of so many rounds have become old: each time costs a listing.
const REMOVE_ROUNDS: u64 = 8;

const HINT_DIRECT: &str = "see that the sites reach each other: their addresses are in `beringia status`";
const HINT_NO_WAY: &str = "join with --objects and the object store that the other site leaves its deltas in";

/// A delta to be fetched.
pub(crate) struct Wanted {
    pub(crate) round: Round,
    pub(crate) fragment: u32,
    pub(crate) contributor: Contributor,
    pub(crate) codec: FragmentCodec,
}

impl Wanted {
    fn from(&self) -> SiteId {
        self.contributor.site
    }

    fn bytes(&self) -> u64 {
        self.contributor.delta_bytes
    }
}

/// One try to fetch it.
struct Attempt<'a> {
    wanted: &'a Wanted,
    /// Who may have it.
    holders: Vec<Holder>,
    /// From 1.
    number: u32,
    /// What was announced has come, and is no delta.
    is_hopeless: AtomicBool,
}

impl Attempt<'_> {
    /// Only the first asks the site that made it: later ones tell nothing of the ways to that site.
    fn is_first(&self) -> bool {
        self.number == 1
    }
}

/// How far the run is, for those who leave objects.
#[derive(Debug, Clone, Copy, Default)]
struct Horizon {
    /// The last round that is merged here.
    merged: Round,
    /// Deltas of rounds before this one are wanted by nobody any more.
    oldest: Round,
    /// What this was when objects were last removed.
    removed: Round,
}

/// Fetches and leaves deltas, from as many tasks as there are deltas.
pub(crate) struct Transit {
    site: SiteId,
    client: BlobClient,
    shelf: Arc<Shelf>,
    store: Option<ObjectStore>,
    routes: Mutex<Routes>,
    horizon: watch::Sender<Horizon>,
    traffic: Traffic,
    reporter: Arc<Mutex<Reporter>>,
}

/// What was refused or did not come, and what mends it.
struct Problem {
    message: String,
    hint: Option<String>,
    fault: Fault,
}

/// Whose fault that is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nobody's that is known: the next try may bring it.
    Unknown,
    /// Its maker's, who gave something else than was announced: the next try may bring that.
    Other,
    /// Its maker's, who announced what cannot be merged: no try brings anything else.
    Hopeless,
}

impl Problem {
    fn new(message: impl Into<String>, hint: Option<String>) -> Self {
        Self { message: message.into(), hint, fault: Fault::Unknown }
    }

    /// What came is what was announced, and that is wrong.
    fn hopeless(error: &formats::DecodeError) -> Self {
        Self { message: error.to_string(), hint: None, fault: Fault::Hopeless }
    }

    /// It could not be fetched, from its maker alone or from anybody.
    fn of_fetch(error: &FetchError, from_maker: bool) -> Self {
        let fault = if from_maker && matches!(error, FetchError::Hash { .. }) { Fault::Other } else { Fault::Unknown };
        Self { message: error.to_string(), hint: Some(HINT_DIRECT.to_owned()), fault }
    }
}

impl Transit {
    pub(crate) fn new(
        site: SiteId,
        client: BlobClient,
        shelf: Arc<Shelf>,
        store: Option<ObjectStore>,
        reporter: Arc<Mutex<Reporter>>,
    ) -> Self {
        let traffic = client.traffic().clone();
        Self {
            site,
            client,
            shelf,
            store,
            routes: Mutex::default(),
            horizon: watch::Sender::default(),
            traffic,
            reporter,
        }
    }

    fn emit(&self, event: Event) {
        self.reporter.lock().unwrap_or_else(PoisonError::into_inner).emit(event);
    }

    fn routes(&self) -> std::sync::MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells people of the first, second, fourth, eighth ... failure.
    fn warn(&self, what: impl Display, problem: Problem, attempt: u32) {
        if attempt.is_power_of_two() {
            let message = format!("{what}: {}", problem.message);
            self.emit(Event::Warning { message, hint: problem.hint });
        }
    }

    /// The same, where it may be the fault of the site that made it.
    fn blame(&self, what: impl Display, (round, from_site): (Round, SiteId), problem: Problem, attempt: u32) {
        match problem.fault {
            Fault::Unknown => self.warn(what, problem, attempt),
            Fault::Other if !attempt.is_power_of_two() => {}
            Fault::Other | Fault::Hopeless => {
                self.emit(Event::DeltaRefused { round, from_site, reason: problem.message });
            }
        }
    }

    /// Fetches a delta, and goes on until it is here.
    pub(crate) async fn fetch(&self, wanted: &Wanted) -> Bytes {
        let mut attempt = 1;
        loop {
            if let Some(delta) = self.attempt(wanted, attempt).await {
                return delta;
            }
            tokio::time::sleep(AGAIN).await;
            attempt += 1;
        }
    }

    /// At first from the site that made it; then, since whoever holds it gives the same bytes, from anybody.
    async fn attempt(&self, wanted: &Wanted, number: u32) -> Option<Bytes> {
        let is_first = number == 1;
        let holders = if is_first { self.shelf.first_holders(wanted.from()) } else { self.shelf.all_holders() };
        let open = OpenRoutes { direct: !holders.is_empty(), object_store: self.store.is_some() };
        let Some(choice) = self.routes().choose(wanted.from(), wanted.bytes(), open) else {
            let message = "that site cannot be dialled, and this one has no object store".to_owned();
            self.warn(describe(wanted), Problem::new(message, Some(HINT_NO_WAY.to_owned())), number);
            return None;
        };
        if is_first && choice.is_news && self.store.is_some() {
            let (from_site, route, reason) = (wanted.from(), choice.first.to_string(), choice.reason.to_string());
            self.emit(Event::RouteChosen { from_site, route, reason });
        }
        let attempt = Attempt { wanted, holders, number, is_hopeless: AtomicBool::new(false) };
        let taken = match choice.second {
            None => self.take(&attempt, choice.first).await,
            Some(second) => self.race(&attempt, choice, second).await,
        };
        if attempt.is_hopeless.load(Ordering::Relaxed) {
            // Until its round is over, which ends this.
            std::future::pending::<()>().await;
        }
        taken
    }

    /// The first way, and where it fails or its head start is over, the second one too: what comes first.
    async fn race(&self, attempt: &Attempt<'_>, choice: RouteChoice, second: Route) -> Option<Bytes> {
        let (began, failed, has_failed) = (Instant::now(), Notify::new(), AtomicBool::new(false));
        let by_first = async {
            let taken = self.take(attempt, choice.first).await;
            if taken.is_none() {
                has_failed.store(true, Ordering::Relaxed);
                failed.notify_one();
            }
            taken
        };
        let by_second = async {
            let head_start = Duration::from_secs_f64(choice.head_start_seconds);
            let _failed_early = tokio::time::timeout(head_start, failed.notified()).await;
            if attempt.is_hopeless.load(Ordering::Relaxed) { None } else { self.take(attempt, second).await }
        };
        let (delta, route) = tokio::select! {
            Some(delta) = by_first => (delta, choice.first),
            Some(delta) = by_second => (delta, second),
            else => return None,
        };
        if route == second && !has_failed.load(Ordering::Relaxed) {
            // It has been overtaken: it is no faster than this.
            self.measured(attempt, choice.first, began);
        }
        Some(delta)
    }

    /// Fetches by one way, and notes how that went.
    async fn take(&self, attempt: &Attempt<'_>, route: Route) -> Option<Bytes> {
        let began = Instant::now();
        let taken = match (route, &self.store) {
            (Route::ObjectStore, Some(store)) => self.take_from_store(store, attempt.wanted).await,
            _ => self.take_directly(attempt).await,
        };
        let checked = taken.and_then(|delta| match attempt.wanted.codec.check(&delta) {
            Ok(()) => Ok(delta),
            Err(error) => Err(Problem::hopeless(&error)),
        });
        match checked {
            Ok(delta) => {
                self.measured(attempt, route, began);
                Some(delta)
            }
            Err(problem) => {
                let (wanted, is_hopeless) = (attempt.wanted, problem.fault == Fault::Hopeless);
                // Both ways bring the same.
                if !(is_hopeless && attempt.is_hopeless.swap(true, Ordering::Relaxed)) {
                    self.blame(describe(wanted), (wanted.round, wanted.from()), problem, attempt.number);
                }
                if attempt.is_first() {
                    self.routes().failed(attempt.wanted.from(), route);
                }
                None
            }
        }
    }

    fn measured(&self, attempt: &Attempt<'_>, route: Route, began: Instant) {
        if attempt.is_first() {
            let (from, bytes) = (attempt.wanted.from(), attempt.wanted.bytes());
            self.routes().measured(from, route, bytes, began.elapsed().as_secs_f64());
        }
    }

    async fn take_directly(&self, attempt: &Attempt<'_>) -> Result<Bytes, Problem> {
        let Attempt { wanted, holders, .. } = attempt;
        let Contributor { site, delta_hash, delta_bytes, .. } = wanted.contributor;
        let request = BlobRequest {
            key: BlobKey::Delta { round: wanted.round, fragment: wanted.fragment, site },
            bytes: delta_bytes,
            bytes_max: wanted.codec.encoded_bytes() as u64,
            hash: delta_hash,
            holders: holders.clone(),
            streams: BULK_STREAMS,
        };
        let fetched = self.client.fetch(&request).await;
        fetched.map(Bytes::from).map_err(|error| Problem::of_fetch(&error, attempt.is_first()))
    }

    async fn take_from_store(&self, store: &ObjectStore, wanted: &Wanted) -> Result<Bytes, Problem> {
        let Contributor { site, delta_hash, delta_bytes, .. } = wanted.contributor;
        let expected = wanted.codec.encoded_bytes() as u64;
        if delta_bytes != expected {
            let message = format!("it was announced with {delta_bytes} bytes, its codec writes {expected}");
            return Err(Problem { fault: Fault::Hopeless, ..Problem::new(message, None) });
        }
        let key = ObjectKey::Delta { round: wanted.round, fragment: wanted.fragment, site };
        match store.get(&key, delta_bytes, delta_hash, STORE_PATIENCE).await {
            Ok(fetched) => {
                self.traffic.add(0, delta_bytes);
                Ok(fetched.content)
            }
            Err(error) => Err(Problem::new(error.to_string(), error.hint())),
        }
    }

    /// Leaves an own delta in the object store, if there is one, and sees that it stays there until its round is merged.
    pub(crate) async fn leave(self: Arc<Self>, round: Round, fragment: u32, delta: Bytes) {
        let Some(store) = &self.store else { return };
        tokio::select! {
            () = self.until(|horizon| horizon.oldest > round) => {}
            () = self.leave_until_merged(store, round, fragment, delta) => {}
        }
    }

    async fn leave_until_merged(&self, store: &ObjectStore, round: Round, fragment: u32, delta: Bytes) {
        let key = ObjectKey::Delta { round, fragment, site: self.site };
        let (mut attempt, mut patience) = (1, LEAVE_ANEW);
        loop {
            match store.put(&key, delta.clone()).await {
                Ok(transfer) => {
                    self.traffic.add(transfer.bytes, 0);
                    let merged = self.until(|horizon| horizon.merged >= round);
                    if tokio::time::timeout(patience, merged).await.is_ok() {
                        return;
                    }
                    patience *= 2;
                }
                Err(error) => {
                    let problem = Problem::new(error.to_string(), error.hint());
                    self.warn("the own delta", problem, attempt);
                    attempt += 1;
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    async fn until(&self, is_reached: impl Fn(&Horizon) -> bool) {
        let mut horizon = self.horizon.subscribe();
        // The sender lives as long as this.
        let _reached = horizon.wait_for(is_reached).await;
    }

    /// Notes that a round is merged here, and that nobody wants deltas of rounds before `oldest` any more. True where it is time to
    /// remove own objects of such rounds, some rounds' at a time: [`Transit::remove_before`].
    pub(crate) fn advance(&self, merged: Round, oldest: Round) -> bool {
        let mut is_time = false;
        self.horizon.send_modify(|horizon| {
            (horizon.merged, horizon.oldest) = (merged, oldest);
            is_time = oldest.0 >= horizon.removed.0 + REMOVE_ROUNDS;
            if is_time {
                horizon.removed = oldest;
            }
        });
        is_time && self.store.is_some()
    }

    pub(crate) async fn remove_before(self: Arc<Self>, oldest: Round) {
        let Some(store) = &self.store else { return };
        if let Err(error) = store.forget_before(oldest, self.site).await {
            self.emit(Event::Warning { message: error.to_string(), hint: error.hint() });
        }
    }
}

fn describe(wanted: &Wanted) -> String {
    format!("the delta of site {}, round {}", wanted.from(), wanted.round)
}
