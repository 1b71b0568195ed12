//! Answers to `beringia doctor`: whoever holds the invite may ask how the connection is and what numbers an engine on this
//! machine computes.
//!
//! Apart from the loop that coordinates: a probe reads no state of the run and becomes no site. The numbers come from the
//! caller of [`crate::serve`], are computed once, and are all that this crate sees of an engine.

use base::ContentHash;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, RwLock};
use std::time::Duration;
use tokio::sync::{OnceCell, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use wire::Connection;
use wire::limits::{PROBE_ANSWER_SECONDS_MAX, PROBE_SLOT_SECONDS_MAX, PROBE_STREAMS, PROBES_MAX};
use wire::probe::{ProbeGreeting, ProbeKind, Reference, serve_probe, welcome_probe};

/// Computes the reference results on this machine. Called once, on a thread that may block.
#[derive(Clone)]
pub struct ReferenceSource(Arc<dyn Fn() -> Result<Reference, String> + Send + Sync>);

impl ReferenceSource {
    /// Results of `compute`, or why there are none.
    pub fn new(compute: impl Fn() -> Result<Reference, String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(compute))
    }
}

impl fmt::Debug for ReferenceSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("ReferenceSource(..)")
    }
}

/// What probes may see, and how many at a time.
pub(crate) struct Probes {
    run: String,
    /// Digests of the invites that are valid now.
    invites: Arc<RwLock<BTreeSet<ContentHash>>>,
    admitted: Arc<RwLock<BTreeSet<ContentHash>>>,
    source: Option<ReferenceSource>,
    computed: OnceCell<Result<Arc<Reference>, String>>,
    questions: Arc<Semaphore>,
    streams: Arc<Semaphore>,
}

impl Probes {
    pub(crate) fn new(
        run: String,
        invites: Arc<RwLock<BTreeSet<ContentHash>>>,
        admitted: Arc<RwLock<BTreeSet<ContentHash>>>,
        source: Option<ReferenceSource>,
    ) -> Self {
        Self {
            run,
            invites,
            admitted,
            source,
            computed: OnceCell::new(),
            questions: Arc::new(Semaphore::new(PROBES_MAX)),
            streams: Arc::new(Semaphore::new(PROBES_MAX * PROBE_STREAMS)),
        }
    }

    /// Answers one connection until it leaves; why it was refused, where it was.
    pub(crate) async fn answer(&self, mut connection: Connection, greeting_wait: Duration) -> Option<String> {
        let greeting: ProbeGreeting = match connection.recv_timeout(greeting_wait).await {
            Ok(greeting) => greeting,
            Err(problem) => return Some(format!("no greeting of a probe: {problem}")),
        };
        let refusal = self.refusal(&connection, &greeting);
        let slot = match refusal {
            None => self.slot(greeting.kind).await,
            Some(_) => None,
        };
        let busy = (format!("{PROBES_MAX} probes are being answered already"), "try again in half a minute");
        let refusal = refusal.or(slot.is_none().then_some(busy));
        let told = refusal.as_ref().map(|(reason, hint)| (reason.as_str(), *hint));
        if welcome_probe(&mut connection, env!("CARGO_PKG_VERSION"), told).await.is_ok() && refusal.is_none() {
            // The peer sees for itself where it got no answer; it takes no part in the run.
            let _ended = serve_probe(&mut connection, &greeting, || self.reference()).await;
        }
        refusal.map(|(reason, _)| reason)
    }

    fn refusal(&self, connection: &Connection, greeting: &ProbeGreeting) -> Option<(String, &'static str)> {
        let again = "ask for a new invite: `beringia admit` makes one";
        if !greeting.is_acceptable() {
            let same = "use the same version of beringia on both sides";
            return Some(("its greeting is out of bounds".to_owned(), same));
        }
        if greeting.run != self.run {
            return Some((format!("this is run '{}', not '{}'", self.run, greeting.run), again));
        }
        let known = self.admitted.read().is_ok_and(|admitted| admitted.contains(&connection.peer()));
        let invites = |digest| self.invites.read().is_ok_and(|invites| invites.contains(&digest));
        let invited = greeting.secret.as_ref().is_some_and(|secret| invites(secret.digest()));
        (!known && !invited).then(|| ("the invite is not valid any more".to_owned(), again))
    }

    /// A place among the probes that are answered, once there is one.
    async fn slot(&self, kind: ProbeKind) -> Option<OwnedSemaphorePermit> {
        let slots = match kind {
            ProbeKind::Questions => &self.questions,
            ProbeKind::Stream => &self.streams,
        };
        let slot = timeout(Duration::from_secs(PROBE_SLOT_SECONDS_MAX), Arc::clone(slots).acquire_owned());
        slot.await.ok().and_then(Result::ok)
    }

    async fn reference(&self) -> Result<Arc<Reference>, String> {
        let Some(source) = self.source.clone() else {
            return Err("this coordinator has no engine to compare with".to_owned());
        };
        let compute = async {
            let computed = tokio::task::spawn_blocking(move || (source.0)()).await;
            let computed = computed.unwrap_or_else(|error| Err(format!("the reference was not computed: {error}")));
            let fits = computed.and_then(|reference| match reference.is_acceptable() {
                true => Ok(reference),
                false => Err("the reference results are larger than what may be sent".to_owned()),
            });
            fits.map(Arc::new)
        };
        let result = timeout(Duration::from_secs(PROBE_ANSWER_SECONDS_MAX), self.computed.get_or_init(|| compute));
        result.await.map_or_else(|_| Err("the reference takes too long to compute here".to_owned()), Clone::clone)
    }
}
