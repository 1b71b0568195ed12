//! What the coordinator remembers, and how much it says, however long a run is and however many sites it has.

use super::*;
use crate::plan::Peer;
use base::ParameterSchema;
use base::config::Exchange;

const INITIAL: ContentHash = ContentHash([7; 32]);

/// That a delta can be fetched takes 80 bytes, and n of them are said at once.
const COMMAND_BYTES_MAX: usize = 96;

/// A coordinator and honest sites that answer at once.
struct Run {
    coordinator: Coordinator,
    sites: u32,
    /// The newest.
    plan: Option<Arc<RoundPlan>>,
    now: f64,
}

impl Run {
    fn new(sites: u32, exchange: Exchange) -> Self {
        let sync = SyncSection { inner_steps: 1, exchange, sites, recompute_share: 0.5, ..SyncSection::default() };
        let settings = Settings {
            sites,
            seed: 0,
            batch_samples: 2 * u64::from(sites),
            sequence_length: 8,
            steps_per_round: 1,
            steps_total: 1 << 40,
            sync,
            schema: ParameterSchema::new([("layers.0".to_owned(), vec![4_096])]),
        };
        let (coordinator, _) = Coordinator::recover(settings, INITIAL, []);
        Self { coordinator, sites, plan: None, now: 0.0 }
    }

    fn tell(&mut self, event: Event) -> Vec<Command> {
        self.now += 0.001;
        let commands = self.coordinator.handle(event, self.now);
        for command in &commands {
            match command {
                Command::Send(_, Directive::Begin(plan)) => self.plan = Some(Arc::clone(plan)),
                Command::Send(_, Directive::Dropped { reason }) => panic!("{reason:?}"),
                _ => {}
            }
        }
        commands
    }

    fn connect(&mut self, site: u32) -> Vec<Command> {
        let (name, address) = (format!("site-{site}"), "host:1".to_owned());
        self.tell(Event::Connected(Peer { site: SiteId(site), name, address, fingerprint: INITIAL }))
    }

    fn say(&mut self, site: u32, report: Report) -> Vec<Command> {
        self.tell(Event::Reported(SiteId(site), report))
    }

    fn ready(&mut self, site: u32, round: Round, state_hash: ContentHash) -> Vec<Command> {
        self.say(site, Report::Ready { round, state_hash, tokens_per_second: 1.0, recall: 0 })
    }

    fn begun(sites: u32, exchange: Exchange) -> Self {
        let mut run = Self::new(sites, exchange);
        (0..sites).for_each(|site| {
            run.connect(site);
        });
        (0..sites).for_each(|site| {
            run.ready(site, Round(0), INITIAL);
        });
        run
    }

    fn state_after(round: Round) -> ContentHash {
        ContentHash::of(&round.0.to_le_bytes())
    }

    /// Every word of a round.
    fn round(&mut self) {
        let plan = self.plan.clone().unwrap();
        let RoundPlan { round, attempt, .. } = *plan;
        let delta_bytes = self.coordinator.settings.delta_bytes(plan.fragment);
        for assignment in &plan.assignments {
            let contribution = Contribution {
                tokens: 8 * assignment.samples,
                delta_hash: INITIAL,
                delta_bytes,
                loss_nats: 1.0,
                compute_seconds: 1.0,
            };
            let slice_hashes = vec![INITIAL; plan.parts.len()];
            self.say(assignment.site.0, Report::Computed { round, attempt, contribution, slice_hashes });
        }
        let makers: Vec<SiteId> = match plan.parts.is_empty() {
            true => plan.assignments.iter().map(|assignment| assignment.site).collect(),
            false => plan.parts.iter().map(|part| part.site).collect(),
        };
        for part in &plan.parts {
            for from in plan.assignments.iter().map(|assignment| assignment.site).filter(|from| *from != part.site) {
                self.say(part.site.0, Report::HoldsSlice { round, attempt, from });
            }
        }
        for part in &plan.parts {
            self.say(part.site.0, Report::Reduced { round, attempt, hash: INITIAL });
        }
        for site in 0..self.sites {
            for from in makers.iter().copied().filter(|from| *from != SiteId(site)) {
                self.say(
                    site,
                    match plan.parts.is_empty() {
                        true => Report::Holds { round, attempt, from },
                        false => Report::HoldsPart { round, attempt, from },
                    },
                );
            }
        }
        assert_eq!(self.coordinator.last().commit.round, round);
        for site in 0..self.sites {
            self.say(site, Report::Applied { round, state_hash: Self::state_after(round) });
        }
    }

    /// Entries of every list that is kept from round to round, but those of landmarks.
    fn entries(&self) -> usize {
        let Coordinator { history, ledger, open, polls, parted, checks, away, weights, .. } = &self.coordinator;
        let of = |committed: &Committed| committed.commit.contributors.len() + committed.commit.parts.len();
        let commits: usize = history.newest_first().map(of).sum();
        let (polls, checks, away) = (polls.entries(), checks.entries(), away.entries());
        commits + ledger.entries() + open.len() + polls + checks + away + parted.len() + weights.len()
    }
}

#[test]
fn thousands_of_rounds_leave_no_more_than_some_do() {
    for exchange in [Exchange::Mesh, Exchange::Sharded] {
        let mut run = Run::begun(3, exchange);
        assert_eq!(run.plan.as_ref().unwrap().parts.is_empty(), exchange == Exchange::Mesh);
        let mut rounds = |count: u32| {
            let mut most = 0;
            for round in 0..count {
                run.round();
                if round % 10 == 0 {
                    // A site comes back, from the state that it had, in a round that goes on without it.
                    let last = run.coordinator.last().commit.round;
                    run.tell(Event::Disconnected(SiteId(2), LeaveReason::ConnectionLost));
                    run.connect(2);
                    run.ready(2, last, Run::state_after(last));
                    run.tell(Event::Tick);
                }
                most = most.max(run.entries());
            }
            most
        };
        let some = rounds(300);
        let thousands = rounds(3_000);
        assert!(thousands <= some, "{exchange:?}: {some} entries in 300 rounds, and {thousands} in 3,000 after them");
    }
}

#[test]
fn sites_that_come_together_are_told_of_each_other_together() {
    const SITES: u32 = 200;
    let told = |commands: &[Command]| {
        let peers = commands.iter().filter(|command| matches!(command, Command::Send(_, Directive::Peers(_))));
        peers.count()
    };
    let mut run = Run::new(SITES, Exchange::Mesh);
    assert_eq!(told(&run.connect(0)), 1, "the first change is told at once");
    let later: usize = (1..SITES).map(|site| told(&run.connect(site))).sum();
    assert_eq!(later, 0);
    assert_eq!(told(&run.tell(Event::Tick)), SITES as usize);
    assert_eq!(told(&run.tell(Event::Tick)), 0);
    (0..SITES - 2).for_each(|site| assert_eq!(told(&run.ready(site, Round(0), INITIAL)), 0));
    // Two come anew.
    assert_eq!(told(&run.connect(SITES - 1)), SITES as usize - 1);
    assert_eq!(told(&run.connect(SITES - 2)), 0);
    run.ready(SITES - 1, Round(0), INITIAL);
    let commands = run.ready(SITES - 2, Round(0), INITIAL);
    let place = |wanted: fn(&Directive) -> bool| {
        commands.iter().position(|command| matches!(command, Command::Send(_, directive) if wanted(directive)))
    };
    let (peers, begin) =
        (place(|said| matches!(said, Directive::Peers(_))), place(|said| matches!(said, Directive::Begin(_))));
    assert!(peers.unwrap() < begin.unwrap(), "nobody is named before the others know where it is");
    assert_eq!(told(&commands), SITES as usize);
}

#[test]
fn what_all_are_told_is_there_once() {
    const SITES: u32 = 50;
    let mut run = Run::new(SITES, Exchange::Mesh);
    (0..SITES).for_each(|site| {
        run.connect(site);
    });
    let mut commands = Vec::new();
    (0..SITES).for_each(|site| commands = run.ready(site, Round(0), INITIAL));
    let plans = commands.iter().filter_map(|command| match command {
        Command::Send(_, Directive::Begin(plan)) => Some(Arc::as_ptr(plan)),
        _ => None,
    });
    let plans: Vec<_> = plans.collect();
    assert_eq!(plans.len(), SITES as usize);
    assert!(plans.iter().all(|plan| std::ptr::eq(*plan, plans[0])));
    assert!(size_of::<Command>() <= COMMAND_BYTES_MAX, "{} bytes", size_of::<Command>());
}
