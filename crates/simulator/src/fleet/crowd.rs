//! The coordinator's decisions alone, for as many sites as one likes: every event of a round, one after the other.
//!
//! The sites are no state machines here: each says what an honest one says, at once. Their messages are those of a mesh: connecting and
//! being ready once; then in each round n times what was computed, n (n - 1) times a delta that is held, n times what was merged.

use base::config::{Codec, Exchange, Strategy, SyncSection};
use base::{ContentHash, ParameterSchema, Round, SiteId};
use rounds::{Command, Contribution, Coordinator, Directive, Event, FragmentPlan, Peer, Report, RoundPlan, Settings};

/// Samples of a step for each site, and tokens of a sample.
const SAMPLES_PER_SITE: u64 = 4;
const SEQUENCE_LENGTH: u64 = 128;

/// Seconds between two events: a round is over long before its deadline.
const EVENT_SECONDS: f64 = 1e-6;

/// What the sites are doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum CrowdPhase {
    /// Each is admitted.
    Connect,
    /// Each says what it holds.
    Ready,
    /// Each has made its inner steps.
    Compute,
    /// Each has fetched the delta of each other one.
    Hold,
    /// Each has merged.
    Apply,
}

impl CrowdPhase {
    /// All, in order; the last three repeat.
    pub const ALL: [Self; 5] = [Self::Connect, Self::Ready, Self::Compute, Self::Hold, Self::Apply];

    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Ready => "ready",
            Self::Compute => "compute",
            Self::Hold => "hold",
            Self::Apply => "apply",
        }
    }

    /// Events of it, of so many sites.
    pub fn events(self, sites: u64) -> u64 {
        match self {
            Self::Hold => sites * (sites - 1),
            _ => sites,
        }
    }
}

/// The coordinator with its crowd.
#[derive(Debug)]
pub struct Crowd {
    coordinator: Coordinator,
    sites: u64,
    phase: CrowdPhase,
    /// Events of the phase that have been.
    done: u64,
    now: f64,
    initial: ContentHash,
    delta_bytes: u64,
    plan: Option<RoundPlan>,
    commands: u64,
}

impl Crowd {
    /// A run of so many sites, none of which is there yet.
    pub fn new(sites: u32) -> Self {
        let sync = SyncSection {
            strategy: Strategy::DiLoCo,
            inner_steps: 2,
            codec: Codec::Mxfp4,
            exchange: Exchange::Mesh,
            sites,
            recompute_share: 0.0,
            ..SyncSection::default()
        };
        let settings = Settings {
            sites,
            seed: 0,
            batch_samples: SAMPLES_PER_SITE * u64::from(sites),
            sequence_length: SEQUENCE_LENGTH,
            steps_per_round: sync.inner_steps,
            steps_total: 1 << 40,
            sync,
            schema: ParameterSchema::new([("layers.0".to_owned(), vec![1 << 20])]),
        };
        let fragment = FragmentPlan { index: 0, count: 1, codec: settings.sync.codec, rank: settings.sync.rank };
        let delta_bytes = settings.delta_bytes(fragment);
        let initial = ContentHash::of(b"the state that every site begins with");
        let (coordinator, _) = Coordinator::recover(settings, initial, []);
        let (phase, sites) = (CrowdPhase::Connect, u64::from(sites));
        Self { coordinator, sites, phase, done: 0, now: 0.0, initial, delta_bytes, plan: None, commands: 0 }
    }

    /// What the next event belongs to.
    pub fn phase(&self) -> CrowdPhase {
        self.phase
    }

    /// Rounds committed.
    pub fn rounds(&self) -> u64 {
        self.coordinator.last().commit.round.0
    }

    /// Commands that the coordinator has given.
    pub fn commands(&self) -> u64 {
        self.commands
    }

    /// One event.
    pub fn step(&mut self) {
        let event = self.event();
        self.now += EVENT_SECONDS;
        let commands = self.coordinator.handle(event, self.now);
        self.commands += commands.len() as u64;
        for command in commands {
            if let Command::Send(SiteId(0), Directive::Begin(plan)) = command {
                self.plan = Some(plan);
            }
        }
        self.done += 1;
        if self.done == self.phase.events(self.sites) {
            self.done = 0;
            self.phase = match self.phase {
                CrowdPhase::Connect => CrowdPhase::Ready,
                CrowdPhase::Ready | CrowdPhase::Apply => CrowdPhase::Compute,
                CrowdPhase::Compute => CrowdPhase::Hold,
                CrowdPhase::Hold => CrowdPhase::Apply,
            };
        }
    }

    fn event(&self) -> Event {
        let sites = self.sites;
        let site = SiteId((self.done % sites) as u32);
        let round = self.plan.as_ref().map_or(Round(0), |plan| plan.round);
        let attempt = self.plan.as_ref().map_or(0, |plan| plan.attempt);
        match self.phase {
            CrowdPhase::Connect => {
                let (name, address) = (format!("site-{}", site.0), format!("site-{}.example:7000", site.0));
                Event::Connected(Peer { site, name, address, fingerprint: ContentHash::default() })
            }
            CrowdPhase::Ready => {
                let (round, state_hash) = (Round(0), self.initial);
                Event::Reported(site, Report::Ready { round, state_hash, tokens_per_second: 1e3, recall: 0 })
            }
            CrowdPhase::Compute => {
                let contribution = self.contribution(site);
                Event::Reported(site, Report::Computed { round, attempt, contribution, slice_hashes: Vec::new() })
            }
            CrowdPhase::Hold => {
                // Each in turn holds the delta of the site that many places after it: all hold equally many at any time.
                let from = SiteId(((self.done % sites + 1 + self.done / sites) % sites) as u32);
                Event::Reported(site, Report::Holds { round, attempt, from })
            }
            CrowdPhase::Apply => {
                let round = self.coordinator.last().commit.round;
                Event::Reported(site, Report::Applied { round, state_hash: ContentHash::of(&round.0.to_le_bytes()) })
            }
        }
    }

    fn contribution(&self, site: SiteId) -> Contribution {
        let samples = self.plan.as_ref().and_then(|plan| {
            let place = plan.assignments.binary_search_by_key(&site, |assignment| assignment.site).ok()?;
            Some(plan.assignments[place].samples)
        });
        let (delta_bytes, samples) = (self.delta_bytes, samples.unwrap_or(0));
        let delta_hash = ContentHash::of(&site.0.to_le_bytes());
        Contribution {
            tokens: samples * SEQUENCE_LENGTH,
            delta_hash,
            delta_bytes,
            loss_nats: 1.0,
            compute_seconds: 1.0,
        }
    }
}
