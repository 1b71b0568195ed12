//! Where each site's time goes.

/// What a site's engine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    /// Inner steps.
    Training,
    /// It takes part, and has nothing to do before a merge or a plan comes.
    Waiting,
    /// Its process runs, but has no part in the run yet: it catches up, or fetches a state.
    Joining,
    /// A device has failed, and nothing of the site trains.
    Failed,
    /// A planned stop.
    Stopped,
    /// The site has left, or the coordinator let it go.
    Left,
}

/// Kinds of [`Doing`].
const KINDS: usize = 6;

/// Tokens that were not committed, by cause: each second of a site counts as what it trains in one.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Lost {
    /// Failed devices: from the failure until the site trains again, and after that what the missing replicas would have trained.
    pub failures: f64,
    /// Planned stops.
    pub stops: f64,
    /// Sites that had left, or that the coordinator let go.
    pub leaving: f64,
    /// From a process's start until it trains: catching up, states that are fetched, the next round's begin.
    pub joining: f64,
    /// Slow spells: what the site would have trained more.
    pub slow: f64,
    /// Sites that wait for merges, plans or other sites.
    pub waiting: f64,
    /// Trained, and lost with the process that held it, or on its way when the run ended.
    pub uncommitted: f64,
}

impl Lost {
    /// All of it.
    pub fn total(&self) -> f64 {
        let Self { failures, stops, leaving, joining, slow, waiting, uncommitted } = *self;
        failures + stops + leaving + joining + slow + waiting + uncommitted
    }
}

/// What a site has of its full speed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Pace {
    /// Part of its replicas that are there.
    pub(super) there: f64,
    /// Part of their speed that those have.
    pub(super) slow: f64,
}

impl Pace {
    pub(super) fn speed(self) -> f64 {
        self.there * self.slow
    }
}

/// One site's time.
#[derive(Debug, Clone)]
pub(super) struct Clock {
    doing: Doing,
    since: f64,
    seconds: [f64; KINDS],
    /// Of the training, what missing replicas and slow spells cost.
    missing_seconds: f64,
    slow_seconds: f64,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { doing: Doing::Joining, since: 0.0, seconds: [0.0; KINDS], missing_seconds: 0.0, slow_seconds: 0.0 }
    }

    /// Does that from now on. `pace` is what it had until now.
    pub(super) fn turn(&mut self, doing: Doing, pace: Pace, now: f64) {
        let passed = now - self.since;
        self.seconds[self.doing as usize] += passed;
        if self.doing == Doing::Training {
            self.missing_seconds += passed * (1.0 - pace.there);
            self.slow_seconds += passed * (pace.there - pace.speed());
        }
        (self.doing, self.since) = (doing, now);
    }

    pub(super) fn doing(&self) -> Doing {
        self.doing
    }

    /// Tokens trained, and tokens lost, of a site of that speed.
    pub(super) fn tokens(&self, tokens_per_second: f64) -> (f64, Lost) {
        let of = |doing: Doing| self.seconds[doing as usize] * tokens_per_second;
        let (missing, slow) = (self.missing_seconds * tokens_per_second, self.slow_seconds * tokens_per_second);
        let lost = Lost {
            failures: of(Doing::Failed) + missing,
            stops: of(Doing::Stopped),
            leaving: of(Doing::Left),
            joining: of(Doing::Joining),
            slow,
            waiting: of(Doing::Waiting),
            uncommitted: 0.0,
        };
        (of(Doing::Training) - slow - missing, lost)
    }
}

impl std::ops::AddAssign for Lost {
    fn add_assign(&mut self, other: Self) {
        self.failures += other.failures;
        self.stops += other.stops;
        self.leaving += other.leaving;
        self.joining += other.joining;
        self.slow += other.slow;
        self.waiting += other.waiting;
        self.uncommitted += other.uncommitted;
    }
}
