//! The coordinator's desk: everything between "a site said this" and "write that down, then send these", without a socket, a clock or
//! a task.
//!
//! [`crate::serve`] is the I/O around it, and a simulator can be another: time is an argument, the log is a [`Store`], and what leaves
//! goes through an [`Outlet`]. So what is simulated is what ships: who is admitted, which words count, that a decision is on stable
//! storage before its effect is sent, and that a site which does not read its messages is dropped, not waited for.
//!
//! It decides no more than that itself: rounds are decided by [`rounds::Coordinator`].

use crate::access::{Access, Member};
use crate::store::{Line, Store, StoreError};
use base::{ContentHash, Round, RunConfig, SiteId, Term};
use rounds::adaptive::Choice;
use rounds::coordinator::{Lateness, Note, Record};
use rounds::{
    Command, Commit, Coordinator, Directive, Event as Input, LeaveReason, LedgerTotals, Peer, Settings, SiteDevice,
    StepMismatch, StepVerdict,
};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use telemetry::event::{Contributor, SampleSpan, SiteShare};
use telemetry::{Event, LeaseShare};
use wire::Secret;
use wire::message::{FromCoordinator, FromSite, Greeting, Role, RunFile, SiteHello, Welcome};

/// Machines one invite can admit: a run with more sites than that wants more than one coordinator.
pub const ADMISSIONS_MAX: usize = 10_000;

/// Words of one site that become events, a minute: what it has fetched, measured, and what else only it decides on. In a run of 500 it has
/// fetched 500 deltas in a round of 10 s; two sites that merge every step say this a hundred times a second. At 150 bytes a line, one that says
/// as much as it may takes 2.6 GB of disk a day, where it could take 53.
pub const WORDS_TOLD_PER_MINUTE_MAX: u32 = 12_000;

/// The span over which they are counted, seconds.
const WORDS_SPAN_SECONDS: f64 = 60.0;

/// What a site is told of its run, and what the decisions begin with.
#[derive(Debug, Clone)]
pub struct Briefing {
    /// Settings.
    pub config: RunConfig,
    /// Their text, as every site gets it.
    pub config_text: String,
    /// What a site fetches before it begins.
    pub files: Vec<RunFile>,
    /// Hash of the global state of round 0.
    pub initial_hash: ContentHash,
    /// Number of parameters, for people.
    pub parameters: u64,
}

/// How to coordinate.
#[derive(Debug, Clone)]
pub struct DeskOptions {
    /// What a machine must know that was not admitted before, while invites for all are valid.
    pub secret: Secret,
    /// For how long they are, seconds of the desk's clock; none: only invites for one machine are.
    pub invite_seconds: Option<f64>,
    /// Finish after this many rounds of the run, if that is before its end.
    pub rounds_max: Option<u64>,
    /// Finish after this time of training.
    pub train_seconds_max: Option<f64>,
}

/// Which connection of a site: words of an older one are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkNumber(u64);

/// Where messages and events leave. Nothing here waits.
pub trait Outlet {
    /// Queues a message behind those that were queued before; false where the site does not take its messages.
    fn send(&mut self, link: LinkNumber, message: FromCoordinator) -> bool;

    /// Sends what is queued, then closes.
    fn close(&mut self, link: LinkNumber);

    /// Tells people.
    fn tell(&mut self, event: Event);
}

/// Who stands at the door: an authenticated connection that has greeted.
#[derive(Debug, Clone)]
pub struct Visitor {
    /// BLAKE3 of its certificate.
    pub fingerprint: ContentHash,
    /// Where it comes from.
    pub address: SocketAddr,
    /// What it wants.
    pub greeting: Greeting,
}

/// When somebody is judged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moment {
    /// Seconds of the desk's clock, which never goes back.
    pub now: f64,
    /// Seconds since 1970, by which invites end that were made elsewhere.
    pub unix_seconds: u64,
}

/// A machine that was admitted.
#[derive(Debug, Clone)]
struct Known {
    site: SiteId,
    name: String,
}

/// How much people were told of what one site says.
#[derive(Debug, Clone, Copy)]
struct Talk {
    since: f64,
    words: u32,
}

/// The answer to a visitor.
#[derive(Debug)]
pub enum Verdict {
    /// It is told why, and what mends that.
    Refused {
        /// Why.
        reason: String,
        /// What mends it.
        hint: &'static str,
    },
    /// It may see the status once.
    Observer,
    /// It is a site. Its connection gets the number [`Admission::link`]; then [`Desk::enter`] lets it in.
    Site(Box<Admission>),
}

/// A site that may come in. That it was admitted is in the log.
#[derive(Debug)]
pub struct Admission {
    /// The number of its connection.
    pub link: LinkNumber,
    /// Who it is.
    pub peer: Peer,
    hello: SiteHello,
}

/// How the run, or this coordinator's part in it, ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Rounds committed.
    pub rounds: Round,
    /// BLAKE3 of the state that every site holds; `None` where not all could say so.
    pub state_hash: Option<ContentHash>,
    /// Tokens committed.
    pub tokens: u64,
    /// Sample accounting.
    pub ledger: LedgerTotals,
    /// Whether every planned step was done.
    pub finished: bool,
}

/// A coordinator without its sockets and its clock.
pub struct Desk {
    briefing: Briefing,
    store: Box<dyn Store>,
    coordinator: Coordinator,
    options: DeskOptions,
    admitted: BTreeMap<ContentHash, Known>,
    /// Machines that may not come back.
    revoked: BTreeSet<ContentHash>,
    /// Invites for one machine: those that may still be used, and those that were.
    invites: BTreeMap<ContentHash, u64>,
    used: BTreeSet<ContentHash>,
    links: BTreeMap<SiteId, LinkNumber>,
    links_made: u64,
    /// When the first round began.
    training_since: Option<f64>,
    /// Commits that not all sites have confirmed, with the seconds that their rounds took.
    unsettled: BTreeMap<Round, (Arc<Commit>, f64)>,
    talks: BTreeMap<SiteId, Talk>,
    done: bool,
}

impl Desk {
    /// Goes on where the log ends, in a new term, which is in the log when this returns.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn open(
        briefing: Briefing,
        (mut store, lines): (Box<dyn Store>, Vec<Line>),
        options: DeskOptions,
        outlet: &mut dyn Outlet,
    ) -> Result<Self, StoreError> {
        let mut settings = Settings::new(&briefing.config);
        if let Some(rounds) = options.rounds_max {
            settings.steps_total = settings.steps_total.min(rounds * settings.steps_per_round);
        }
        let mut admitted = BTreeMap::new();
        let (mut revoked, mut used) = (BTreeSet::new(), BTreeSet::new());
        let records = lines.into_iter().filter_map(|line| match line {
            Line::Admitted { admitted: site, name, fingerprint, invite } => {
                admitted.insert(fingerprint, Known { site, name });
                used.extend(invite);
                None
            }
            Line::Revoked { revoked: fingerprint } => {
                revoked.insert(fingerprint);
                None
            }
            Line::Decision(record) => Some(record),
        });
        let (coordinator, record) = Coordinator::recover(settings, briefing.initial_hash, records);
        store.append(&Line::Decision(record))?;
        let desk = Self {
            briefing,
            store,
            coordinator,
            options,
            admitted,
            revoked,
            invites: BTreeMap::new(),
            used,
            links: BTreeMap::new(),
            links_made: 0,
            training_since: None,
            unsettled: BTreeMap::new(),
            talks: BTreeMap::new(),
            done: false,
        };
        desk.announce(outlet);
        Ok(desk)
    }

    fn announce(&self, outlet: &mut dyn Outlet) {
        let config = &self.briefing.config;
        let step_tokens = (config.train.batch_samples * config.data.sequence_length) as u64;
        let resumed = self.coordinator.last().commit.round;
        outlet.tell(Event::RunStarted {
            run: config.run.name.clone(),
            strategy: config.sync.strategy.name().to_owned(),
            sites: config.sync.sites,
            parameters: self.briefing.parameters,
            tokens_planned: config.train.steps * step_tokens,
            rounds_planned: config.rounds_total(),
            engine: None,
            resumed_round: (resumed > Round(0)).then_some(resumed),
        });
    }

    /// Whether the run is over and every site has left.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The current term.
    pub fn term(&self) -> Term {
        self.coordinator.term()
    }

    /// Whether that machine was admitted, and not revoked since.
    pub fn knows(&self, fingerprint: &ContentHash) -> bool {
        self.admitted.contains_key(fingerprint) && !self.revoked.contains(fingerprint)
    }

    /// All machines that were.
    pub fn admitted(&self) -> impl Iterator<Item = ContentHash> + '_ {
        self.admitted.keys().copied().filter(|fingerprint| self.knows(fingerprint))
    }

    /// All that were ever admitted, by site id.
    pub fn members(&self) -> Vec<Member> {
        let member = |(fingerprint, known): (&ContentHash, &Known)| Member {
            site: known.site,
            name: known.name.clone(),
            fingerprint: *fingerprint,
            connected: self.links.contains_key(&known.site),
            revoked: self.revoked.contains(fingerprint),
        };
        let mut members: Vec<Member> = self.admitted.iter().map(member).collect();
        members.sort_by_key(|member| member.site);
        members
    }

    /// Digests of the invites that are valid at this moment, that for all included.
    pub fn invites(&self, at: Moment) -> BTreeSet<ContentHash> {
        let for_all = self.options.invite_seconds.is_some_and(|seconds| at.now < seconds);
        let for_one =
            self.invites.iter().filter(|(digest, ends)| at.unix_seconds < **ends && !self.used.contains(digest));
        for_one.map(|(digest, _)| *digest).chain(for_all.then(|| self.options.secret.digest())).collect()
    }

    /// Takes over who may come. Who is revoked leaves, and is in the log as revoked when this returns.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn set_access(&mut self, access: Access, now: f64, outlet: &mut dyn Outlet) -> Result<(), StoreError> {
        self.invites = access.invites;
        for revoked in access.revoked {
            if !self.revoked.contains(&revoked) && self.admitted.contains_key(&revoked) {
                self.store.append(&Line::Revoked { revoked })?;
                self.revoked.insert(revoked);
                self.show_out(revoked, now, outlet)?;
            }
        }
        Ok(())
    }

    fn show_out(&mut self, fingerprint: ContentHash, now: f64, outlet: &mut dyn Outlet) -> Result<(), StoreError> {
        let site = self.admitted.get(&fingerprint).map(|known| known.site);
        let Some(from) = site.and_then(|site| Some((site, *self.links.get(&site)?))) else { return Ok(()) };
        // It reads this, or the end of its connection.
        let dropped = FromCoordinator::Directive(Directive::Dropped { reason: LeaveReason::Revoked });
        let _full = outlet.send(from.1, dropped);
        self.part(from, LeaveReason::Revoked, now, outlet)
    }

    /// Whether that is the site's newest connection, and still in use.
    pub fn is_current(&self, site: SiteId, link: LinkNumber) -> bool {
        self.links.get(&site) == Some(&link)
    }

    /// Sample accounting so far.
    pub fn ledger(&self) -> &rounds::Ledger {
        self.coordinator.ledger()
    }

    /// Judges a visitor. A site that is new here is in the log when this returns.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn greet(&mut self, visitor: Visitor, at: Moment) -> Result<Verdict, StoreError> {
        let again = "ask for a new invite: `beringia admit` makes one";
        let refused = |reason: String, hint| Ok(Verdict::Refused { reason, hint });
        let Visitor { fingerprint, address, greeting } = visitor;
        if !greeting.is_acceptable() {
            let hint = "use the same version of beringia on both sides";
            return refused("its greeting is out of bounds".to_owned(), hint);
        }
        if greeting.run != self.briefing.config.run.name {
            return refused(format!("this is run '{}', not '{}'", self.briefing.config.run.name, greeting.run), again);
        }
        if self.revoked.contains(&fingerprint) {
            return refused("this machine's key was revoked".to_owned(), "ask who runs the coordinator");
        }
        let known = self.admitted.get(&fingerprint).map(|known| known.site);
        let invites = self.invites(at);
        let invite = greeting.secret.as_ref().map(Secret::digest).filter(|digest| invites.contains(digest));
        if known.is_none() && invite.is_none() {
            return refused("the invite is not valid any more".to_owned(), again);
        }
        let Role::Site(hello) = greeting.role else { return Ok(Verdict::Observer) };
        let Some(site) = self.site_id(known, &hello, (fingerprint, invite))? else {
            return refused(format!("this run has admitted {ADMISSIONS_MAX} machines already"), "start a second run");
        };
        self.links_made += 1;
        let address = site_address(&hello, address);
        let peer = Peer { site, name: hello.name.clone(), address, fingerprint };
        Ok(Verdict::Site(Box::new(Admission { link: LinkNumber(self.links_made), peer, hello })))
    }

    /// The id that a machine keeps; `None` where there are too many.
    fn site_id(
        &mut self,
        known: Option<SiteId>,
        hello: &SiteHello,
        (fingerprint, invite): (ContentHash, Option<ContentHash>),
    ) -> Result<Option<SiteId>, StoreError> {
        if known.is_some() || self.admitted.len() >= ADMISSIONS_MAX {
            return Ok(known);
        }
        let site = SiteId(self.admitted.len() as u32);
        let (name, invite) = (hello.name.clone(), invite.filter(|digest| self.invites.contains_key(digest)));
        self.store.append(&Line::Admitted { admitted: site, name: name.clone(), fingerprint, invite })?;
        self.used.extend(invite);
        self.admitted.insert(fingerprint, Known { site, name });
        Ok(Some(site))
    }

    /// Lets a site in, over the connection of that number: from now on the outlet takes messages for it.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn enter(&mut self, admission: Admission, now: f64, outlet: &mut dyn Outlet) -> Result<(), StoreError> {
        let Admission { link, peer, hello } = admission;
        let site = peer.site;
        if let Some(older) = self.links.insert(site, link) {
            outlet.close(older);
        }
        let welcome = FromCoordinator::Welcome(Welcome {
            site,
            run_toml: self.briefing.config_text.clone(),
            model_hash: self.briefing.config.model_hash(),
            files: self.briefing.files.clone(),
        });
        // An empty queue takes one message.
        let _fits = outlet.send(link, welcome);
        outlet.tell(Event::SiteJoined {
            site,
            name: peer.name.clone(),
            address: peer.address.clone(),
            engine: hello.engine,
            threads: hello.threads,
            slowdown: hello.slowdown,
        });
        self.decide(Input::Connected(peer), now, outlet)
    }

    /// A site said something over that connection.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn said(
        &mut self,
        (site, link): (SiteId, LinkNumber),
        message: FromSite,
        now: f64,
        outlet: &mut dyn Outlet,
    ) -> Result<(), StoreError> {
        if !self.is_current(site, link) {
            return Ok(());
        }
        match message {
            FromSite::Report(report) => self.decide(Input::Reported(site, report), now, outlet),
            FromSite::Evaluated { round, nats_per_token, bits_per_byte, bigram_bits_per_byte, tokens } => {
                let step = self.coordinator.step_of(round);
                let numbers = [nats_per_token, bits_per_byte, bigram_bits_per_byte];
                if !numbers.iter().all(|number| number.is_finite()) {
                    return Ok(());
                }
                let measured =
                    Event::Evaluated { round, step, nats_per_token, bits_per_byte, bigram_bits_per_byte, tokens };
                self.tell_for(site, measured, now, outlet);
                self.decide(Input::Evaluated { site, round, nats_per_token }, now, outlet)
            }
            // A line of the event log with such a number could not be read again.
            FromSite::Fetched { seconds, .. } if !(seconds.is_finite() && seconds >= 0.0) => Ok(()),
            FromSite::Fetched { round, from, bytes, seconds } => {
                self.tell_for(site, Event::DeltaFetched { round, from_site: from, bytes, seconds }, now, outlet);
                Ok(())
            }
            FromSite::Pulse => self.decide(Input::Heard(site), now, outlet),
        }
    }

    /// A connection ended, or was silent for too long.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn lost(
        &mut self,
        (site, link): (SiteId, LinkNumber),
        now: f64,
        outlet: &mut dyn Outlet,
    ) -> Result<(), StoreError> {
        if !self.is_current(site, link) {
            return Ok(());
        }
        self.part((site, link), LeaveReason::ConnectionLost, now, outlet)
    }

    /// Ends a site's connection, and its part in the run until it comes back.
    fn part(
        &mut self,
        (site, link): (SiteId, LinkNumber),
        reason: LeaveReason,
        now: f64,
        outlet: &mut dyn Outlet,
    ) -> Result<(), StoreError> {
        self.links.remove(&site);
        outlet.close(link);
        self.decide(Input::Disconnected(site, reason), now, outlet)
    }

    /// Time passed: called about once a second.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn tick(&mut self, now: f64, outlet: &mut dyn Outlet) -> Result<(), StoreError> {
        for link in self.links.values() {
            // A full queue is dealt with where a directive does not fit.
            let _full = outlet.send(*link, FromCoordinator::Pulse);
        }
        let trained = self.training_since.map_or(0.0, |since| now - since);
        if self.options.train_seconds_max.is_some_and(|max| trained >= max) {
            self.options.train_seconds_max = None;
            self.stop(now, outlet)?;
        }
        self.decide(Input::Tick, now, outlet)
    }

    /// Finish after the round in progress.
    ///
    /// # Errors
    /// The log cannot be written.
    pub fn stop(&mut self, now: f64, outlet: &mut dyn Outlet) -> Result<(), StoreError> {
        self.decide(Input::StopRequested, now, outlet)
    }

    /// Does what the decisions say, in their order: a record is on stable storage before any later message is queued.
    fn decide(&mut self, input: Input, now: f64, outlet: &mut dyn Outlet) -> Result<(), StoreError> {
        let mut inputs = vec![input];
        while let Some(input) = inputs.pop() {
            for command in self.coordinator.handle(input, now) {
                match command {
                    Command::Persist(record) => self.persist(record)?,
                    Command::Send(site, directive) => {
                        if !self.send(site, directive, outlet) {
                            inputs.push(Input::Disconnected(site, LeaveReason::ConnectionLost));
                        }
                    }
                    Command::Note(note) => self.note(note, now, outlet),
                    Command::Done => self.done = true,
                }
            }
        }
        Ok(())
    }

    fn persist(&mut self, record: Record) -> Result<(), StoreError> {
        self.store.append(&Line::Decision(record))
    }

    /// Queues a directive; false where the site does not take its messages, and its connection is given up.
    fn send(&mut self, site: SiteId, directive: Directive, outlet: &mut dyn Outlet) -> bool {
        let is_last = matches!(directive, Directive::Dropped { .. });
        let Some(link) = self.links.get(&site).copied() else { return true };
        let is_taken = outlet.send(link, FromCoordinator::Directive(directive));
        if is_last || !is_taken {
            self.links.remove(&site);
            outlet.close(link);
        }
        is_taken
    }

    fn note(&mut self, note: Note, now: f64, outlet: &mut dyn Outlet) {
        let event = match note {
            Note::RoundStarted(plan) => {
                self.training_since.get_or_insert(now);
                let leases = plan.assignments.iter().map(|assignment| LeaseShare {
                    site: assignment.site,
                    start: assignment.lease.first().map_or(0, |range| range.start),
                    end: assignment.lease.last().map_or(0, |range| range.end),
                    steps: assignment.steps,
                    samples_per_step: assignment.samples.div_ceil(assignment.steps.max(1)),
                    samples: assignment.samples,
                    ranges: assignment
                        .lease
                        .iter()
                        .map(|range| SampleSpan { start: range.start, end: range.end })
                        .collect(),
                    share: assignment.share,
                });
                Event::RoundStarted { round: plan.round, term: plan.term, leases: leases.collect() }
            }
            Note::Committed { commit, seconds, totals } => {
                let (round, term, cursor) = (commit.round, commit.term, commit.cursor);
                outlet.tell(Event::RoundClosed { round, term, contributors: weighed(&commit), cursor });
                self.unsettled.insert(commit.round, (commit, seconds));
                let LedgerTotals { leased, committed, returned, lost, .. } = totals;
                Event::Ledger { leased, committed, returned, lost }
            }
            Note::Agreed { round, state_hash } => match self.agreed(round, state_hash) {
                Some(event) => event,
                None => return,
            },
            Note::SiteReady { site, .. } | Note::SiteDevice { site, .. } | Note::Outdated { site, .. } => {
                if let Some(event) = event_of(note) {
                    self.tell_for(site, event, now, outlet);
                }
                return;
            }
            other => match event_of(other) {
                Some(event) => event,
                None => return,
            },
        };
        outlet.tell(event);
    }

    /// Tells people what a site says, as often as it likes to say it, up to [`WORDS_TOLD_PER_MINUTE_MAX`]: a member must not be able to fill
    /// the disk.
    fn tell_for(&mut self, site: SiteId, event: Event, now: f64, outlet: &mut dyn Outlet) {
        let talk = self.talks.entry(site).or_insert(Talk { since: now, words: 0 });
        if now - talk.since >= WORDS_SPAN_SECONDS {
            *talk = Talk { since: now, words: 0 };
        }
        talk.words = talk.words.saturating_add(1);
        match talk.words {
            ..=WORDS_TOLD_PER_MINUTE_MAX => outlet.tell(event),
            words if words == WORDS_TOLD_PER_MINUTE_MAX + 1 => outlet.tell(Event::Warning {
                message: format!(
                    "site {site} says more than {WORDS_TOLD_PER_MINUTE_MAX} things a minute; the rest is not logged"
                ),
                hint: Some("if it goes on, shut it out: `beringia revoke`".to_owned()),
            }),
            _ => {}
        }
    }

    /// A commit is told to people once all sites hold the same state.
    fn agreed(&mut self, round: Round, state_hash: ContentHash) -> Option<Event> {
        let (commit, seconds) = self.unsettled.remove(&round)?;
        Some(Event::RoundCommitted {
            round: commit.round,
            term: commit.term,
            contributors: weighed(&commit),
            cursor: commit.cursor,
            state_hash,
            seconds,
            tokens_total: self.tokens_committed(),
        })
    }

    fn tokens_committed(&self) -> u64 {
        self.coordinator.ledger().totals().committed * self.briefing.config.data.sequence_length as u64
    }

    /// How it ended, once [`Desk::is_done`].
    pub fn summarise(&self, outlet: &mut dyn Outlet) -> Summary {
        let last = self.coordinator.last();
        let (rounds, state_hash) = (last.commit.round, last.state_hash);
        let summary = Summary {
            rounds,
            state_hash,
            tokens: self.tokens_committed(),
            ledger: self.coordinator.ledger().totals(),
            finished: last.commit.step >= self.briefing.config.train.steps,
        };
        let verdict = match (summary.finished, state_hash) {
            (true, Some(_)) => "every planned step is done and all sites hold one state",
            (false, Some(_)) => "stopped; all sites hold one state and the run can go on",
            (_, None) => "stopped before the sites could agree on the last round",
        };
        outlet.tell(Event::RunFinished {
            verdict: verdict.to_owned(),
            state_hash: state_hash.unwrap_or_default(),
            rounds: rounds.0,
            tokens: summary.tokens,
        });
        summary
    }
}

/// The contributors of a commit with their weights in the merge.
fn weighed(commit: &Commit) -> Vec<Contributor> {
    let tokens: u64 = commit.contributors.iter().map(|contributor| contributor.tokens).sum();
    let weigh = |contributor: &rounds::Contributor| Contributor {
        site: contributor.site,
        tokens: contributor.tokens,
        weight: contributor.tokens as f64 / tokens.max(1) as f64,
    };
    commit.contributors.iter().map(weigh).collect()
}

/// Notes that need nothing but themselves to be told.
fn event_of(note: Note) -> Option<Event> {
    Some(match note {
        Note::SiteReady { site, tokens_per_second } => Event::SiteReady { site, tokens_per_second },
        Note::SiteDevice { site, device } => {
            let SiteDevice { engine, name, maker, driver, memory_bytes, precision } = *device;
            Event::SiteDevice { site, engine, name, maker, driver, memory_bytes, precision }
        }
        Note::SiteLeft { site, reason } => {
            let reason = serde_json::to_value(reason).ok().and_then(|v| v.as_str().map(str::to_owned));
            Event::SiteLeft { site, reason: reason.unwrap_or_default() }
        }
        Note::Computed { site, round, contribution } => Event::RoundComputed {
            round,
            site,
            tokens: contribution.tokens,
            compute_seconds: contribution.compute_seconds,
            loss_nats: contribution.loss_nats,
        },
        Note::Straggler { site, round, reason, waited_seconds } => {
            Event::Straggler { round, site, reason: describe_lateness(reason).to_owned(), waited_seconds }
        }
        Note::StepRecomputed { site, engine, round, by, verdict } => {
            recomputed_event((site, engine), round, by, verdict)
        }
        Note::Diverged { site, round, expected, found } => {
            Event::Diverged { round, site, hash_expected: expected, hash_found: found }
        }
        Note::SharesMoved { weights } => {
            let total: f64 = weights.iter().map(|(_, weight)| weight).sum();
            let share = |(site, weight): (SiteId, f64)| SiteShare { site, share: weight / total };
            let shares = weights.into_iter().map(share).collect();
            Event::SharesChanged { reason: "measured speeds moved".to_owned(), shares }
        }
        Note::SettingsChanged { round, change } => {
            let Choice { inner_steps, fragments, overlap_steps, codec, rank } = change.to;
            let (codec, reason) = (codec.name().to_owned(), change.reason);
            Event::SettingsChanged { round, inner_steps, fragments, overlap_steps, codec, rank, reason }
        }
        Note::ExchangeChosen { round, is_sharded, reason } => {
            let exchange = if is_sharded { "sharded" } else { "mesh" }.to_owned();
            Event::ExchangeChosen { round, exchange, reason }
        }
        Note::RolledBack { from, to } => Event::RolledBack { from, to },
        Note::Regrouped { round } => Event::Warning {
            message: format!(
                "no site here can get what the commit of round {round} needs: all are asked what they hold"
            ),
            hint: Some("start the sites that are away again with the same `beringia join`".to_owned()),
        },
        Note::Outdated { site, round, attempt } => Event::Warning {
            message: format!(
                "site {site} answered plan {attempt} for round {round}, which was withdrawn; it does not count"
            ),
            hint: None,
        },
        Note::RoundAbandoned { round } => Event::RoundAbandoned { round },
        _ => return None,
    })
}

fn recomputed_event((site, engine): (SiteId, String), round: Round, by: Option<SiteId>, verdict: StepVerdict) -> Event {
    let by = by.map_or_else(|| "itself".to_owned(), |by| format!("site {by}"));
    let StepVerdict { step, seconds, mismatch } = verdict;
    match mismatch {
        None => Event::StepRecomputed { site, round, step, by, seconds },
        Some(StepMismatch { quantity, difference, bound }) => {
            let quantity = quantity.name().to_owned();
            Event::StepMismatch { site, engine, round, step, quantity, difference, bound, by }
        }
    }
}

/// Where others dial a site that came from `seen`; empty where they cannot.
fn site_address(hello: &SiteHello, seen: SocketAddr) -> String {
    let host = match hello.advertised_host.as_str() {
        _ if hello.port == 0 => return String::new(),
        "" => seen.ip().to_string(),
        host => host.to_owned(),
    };
    let bracketed = if host.contains(':') { format!("[{host}]") } else { host };
    format!("{bracketed}:{}", hello.port)
}

fn describe_lateness(reason: Lateness) -> &'static str {
    match reason {
        Lateness::SlowCompute => "slow compute",
        Lateness::SlowLink => "slow link",
        Lateness::Silent => "silent",
    }
}

#[cfg(test)]
#[path = "desk_tests.rs"]
mod tests;
