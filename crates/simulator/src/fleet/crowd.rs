//! The coordinator's decisions alone, for as many sites as one likes: every event of a round, one after the other.
//!
//! The sites are no state machines here: each says what an honest one says, at once. Each is connected and ready once. A round of n sites
//! is, in a mesh, n times what was computed, n (n - 1) times a delta that is held, n times what was merged. Where it is sharded, and r of them
//! merge, between the first and the last are r (n - 1) times a slice that is held, r parts that are merged, and r (n - 1) times one that is held.
//! Messages are counted, and dropped as by a socket that has sent them.

use base::config::{Codec, Exchange, Strategy, SyncSection};
use base::{ContentHash, ParameterSchema, Round, SiteId};
use rounds::{Command, Contribution, Coordinator, Directive, Event, FragmentPlan, Peer, Report, RoundPlan, Settings};
use std::sync::Arc;

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
    /// Mesh: each has fetched the delta of each other one.
    Hold,
    /// Sharded: each that merges has fetched its slice of each other one's delta.
    Gather,
    /// Sharded: each of them has merged its part.
    Reduce,
    /// Sharded: each has fetched the parts that the others merged.
    Spread,
    /// Each has merged.
    Apply,
}

impl CrowdPhase {
    /// One word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Ready => "ready",
            Self::Compute => "compute",
            Self::Hold => "hold",
            Self::Gather => "gather",
            Self::Reduce => "reduce",
            Self::Spread => "spread",
            Self::Apply => "apply",
        }
    }

    /// Whether it is said in every round.
    pub fn repeats(self) -> bool {
        !matches!(self, Self::Connect | Self::Ready)
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
    plan: Option<Arc<RoundPlan>>,
    commands: u64,
}

impl Crowd {
    /// A run of so many sites, none of which is there yet, whose rounds are a mesh.
    pub fn new(sites: u32) -> Self {
        Self::exchanging(sites, Exchange::Mesh)
    }

    /// The same with that exchange.
    pub fn exchanging(sites: u32, exchange: Exchange) -> Self {
        let sync = SyncSection {
            strategy: Strategy::DiLoCo,
            inner_steps: 2,
            codec: Codec::Mxfp4,
            exchange,
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

    /// Whether the round is sharded; `None` before the first is planned.
    pub fn is_sharded(&self) -> Option<bool> {
        self.plan.as_ref().map(|plan| !plan.parts.is_empty())
    }

    /// Rounds committed.
    pub fn rounds(&self) -> u64 {
        self.coordinator.last().commit.round.0
    }

    /// Commands that the coordinator has given.
    pub fn commands(&self) -> u64 {
        self.commands
    }

    /// Sites that merge a part of the round.
    fn reducers(&self) -> u64 {
        self.plan.as_ref().map_or(0, |plan| plan.parts.len() as u64)
    }

    /// Events of the present phase.
    pub fn events(&self) -> u64 {
        match self.phase {
            CrowdPhase::Hold => self.sites * (self.sites - 1),
            CrowdPhase::Gather | CrowdPhase::Spread => self.reducers() * (self.sites - 1),
            CrowdPhase::Reduce => self.reducers(),
            CrowdPhase::Connect | CrowdPhase::Ready | CrowdPhase::Compute | CrowdPhase::Apply => self.sites,
        }
    }

    /// One event.
    pub fn step(&mut self) {
        let event = self.event();
        self.tell(event);
        self.done += 1;
        if self.done == self.events() {
            self.done = 0;
            self.phase = match self.phase {
                CrowdPhase::Connect => CrowdPhase::Ready,
                CrowdPhase::Ready | CrowdPhase::Apply => CrowdPhase::Compute,
                CrowdPhase::Compute if self.reducers() > 0 => CrowdPhase::Gather,
                CrowdPhase::Compute => CrowdPhase::Hold,
                CrowdPhase::Gather => CrowdPhase::Reduce,
                CrowdPhase::Reduce => CrowdPhase::Spread,
                CrowdPhase::Hold | CrowdPhase::Spread => CrowdPhase::Apply,
            };
        }
    }

    /// A second passes.
    pub fn tick(&mut self) {
        self.tell(Event::Tick);
    }

    fn tell(&mut self, event: Event) {
        self.now += EVENT_SECONDS;
        let commands = self.coordinator.handle(event, self.now);
        self.commands += commands.len() as u64;
        for command in commands {
            if let Command::Send(SiteId(0), Directive::Begin(plan)) = command {
                self.plan = Some(plan);
            }
        }
    }

    fn event(&self) -> Event {
        let site = match self.phase {
            CrowdPhase::Gather | CrowdPhase::Reduce => self.reducer(self.done % self.reducers()),
            CrowdPhase::Spread => self.receiver(),
            _ => SiteId((self.done % self.sites) as u32),
        };
        match self.phase {
            CrowdPhase::Connect => {
                let (name, address) = (format!("site-{}", site.0), format!("site-{}.example:7000", site.0));
                Event::Connected(Peer { site, name, address, fingerprint: ContentHash::default() })
            }
            _ => Event::Reported(site, self.report(site)),
        }
    }

    fn report(&self, site: SiteId) -> Report {
        let round = self.plan.as_ref().map_or(Round(0), |plan| plan.round);
        let attempt = self.plan.as_ref().map_or(0, |plan| plan.attempt);
        match self.phase {
            CrowdPhase::Connect | CrowdPhase::Ready => {
                Report::Ready { round: Round(0), state_hash: self.initial, tokens_per_second: 1e3, recall: 0 }
            }
            CrowdPhase::Compute => {
                let slice_hashes = vec![ContentHash::default(); self.reducers() as usize];
                Report::Computed { round, attempt, contribution: self.contribution(site), slice_hashes }
            }
            // Each in turn holds what the site made that is that many places after it: all hold equally many at any time.
            CrowdPhase::Hold => Report::Holds { round, attempt, from: self.after(site, self.done / self.sites) },
            CrowdPhase::Gather => {
                Report::HoldsSlice { round, attempt, from: self.after(site, self.done / self.reducers()) }
            }
            CrowdPhase::Reduce => Report::Reduced { round, attempt, hash: ContentHash::of(&site.0.to_le_bytes()) },
            CrowdPhase::Spread => Report::HoldsPart { round, attempt, from: self.part_of(site) },
            CrowdPhase::Apply => {
                let round = self.coordinator.last().commit.round;
                Report::Applied { round, state_hash: ContentHash::of(&round.0.to_le_bytes()) }
            }
        }
    }

    /// The site that is so many places and one after that one, all around.
    fn after(&self, site: SiteId, places: u64) -> SiteId {
        SiteId(((u64::from(site.0) + 1 + places) % self.sites) as u32)
    }

    fn reducer(&self, place: u64) -> SiteId {
        let part = self.plan.as_ref().and_then(|plan| plan.parts.get(place as usize));
        part.map_or(SiteId(0), |part| part.site)
    }

    /// Who says next that it holds a part. Those who merge are the first sites: they have their own, and so the last words are the others'.
    fn receiver(&self) -> SiteId {
        let last_words = self.sites * (self.reducers() - 1);
        match self.done.checked_sub(last_words) {
            Some(after) => SiteId((self.reducers() + after) as u32),
            None => SiteId((self.done % self.sites) as u32),
        }
    }

    /// Whose part that is: the one after those that it holds, and for who merges none of them its own.
    fn part_of(&self, site: SiteId) -> SiteId {
        let held = (self.done / self.sites).min(self.reducers() - 1);
        self.reducer((u64::from(site.0) + 1 + held) % self.reducers())
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
