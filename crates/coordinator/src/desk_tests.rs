//! The desk without sockets: what leaves it, in which order, and what does not count.

use super::*;
use base::ModelShape;
use rounds::Report;
use std::sync::{Arc, Mutex};

/// What happened, in order.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    Written(Line),
    Sent(LinkNumber, String),
    Closed(LinkNumber),
}

type Steps = Arc<Mutex<Vec<Step>>>;

struct Log {
    steps: Steps,
    /// Appends that succeed.
    left: usize,
}

impl Store for Log {
    fn append(&mut self, line: &Line) -> Result<(), StoreError> {
        if self.left == 0 {
            let source = std::io::ErrorKind::StorageFull.into();
            return Err(StoreError::File { path: "log".into(), source });
        }
        self.left -= 1;
        self.steps.lock().unwrap().push(Step::Written(line.clone()));
        Ok(())
    }
}

struct Out {
    steps: Steps,
    /// A link that takes nothing.
    full: Option<LinkNumber>,
    /// What people were told.
    told: Vec<Event>,
}

impl Outlet for Out {
    fn send(&mut self, link: LinkNumber, message: FromCoordinator) -> bool {
        let word = match message {
            FromCoordinator::Directive(directive) => format!("{directive:?}"),
            other => format!("{other:?}"),
        };
        let word = word.split([' ', '(', '{']).next().unwrap().to_owned();
        self.steps.lock().unwrap().push(Step::Sent(link, word));
        self.full != Some(link)
    }

    fn close(&mut self, link: LinkNumber) {
        self.steps.lock().unwrap().push(Step::Closed(link));
    }

    fn tell(&mut self, event: Event) {
        self.told.push(event);
    }
}

fn config() -> RunConfig {
    let model = ModelShape {
        vocab_size: 8,
        hidden_size: 4,
        intermediate_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 1,
        num_key_value_heads: 1,
        max_position_embeddings: 256,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
    };
    RunConfig::new("run", model)
}

/// When visitors come, unless a test says otherwise.
const AT: Moment = Moment { now: 0.0, unix_seconds: 1_000 };

struct Office {
    desk: Desk,
    out: Out,
    steps: Steps,
    secret: Secret,
}

impl Office {
    fn new(lines: Vec<Line>, appends: usize) -> Self {
        let steps = Steps::default();
        let mut out = Out { steps: Arc::clone(&steps), full: None, told: Vec::new() };
        let secret = Secret::generate().unwrap();
        let briefing = Briefing {
            config: config(),
            config_text: String::new(),
            files: Vec::new(),
            initial_hash: ContentHash::default(),
            parameters: 1,
        };
        let options = DeskOptions {
            secret: secret.clone(),
            invite_seconds: Some(100.0),
            rounds_max: None,
            train_seconds_max: None,
        };
        let log: Box<dyn Store> = Box::new(Log { steps: Arc::clone(&steps), left: appends });
        let desk = Desk::open(briefing, (log, lines), options, &mut out).unwrap();
        Self { desk, out, steps, secret }
    }

    fn visitor(&self, name: &str, secret: Option<Secret>) -> Visitor {
        let hello = SiteHello {
            name: name.to_owned(),
            advertised_host: String::new(),
            port: 1,
            engine: "flex".to_owned(),
            threads: 1,
            slowdown: 1.0,
        };
        let greeting = Greeting { run: "run".to_owned(), secret, role: Role::Site(hello) };
        Visitor { fingerprint: ContentHash::of(name.as_bytes()), address: "10.0.0.1:5".parse().unwrap(), greeting }
    }

    fn admit(&mut self, name: &str) -> (SiteId, LinkNumber) {
        let visitor = self.visitor(name, Some(self.secret.clone()));
        let Verdict::Site(admission) = self.desk.greet(visitor, AT).unwrap() else { panic!("{name} is invited") };
        let from = (admission.peer.site, admission.link);
        self.desk.enter(*admission, 0.0, &mut self.out).unwrap();
        from
    }

    fn ready(&mut self, from: (SiteId, LinkNumber)) -> Result<(), StoreError> {
        let (round, state_hash) = (Round(0), ContentHash::default());
        let ready = FromSite::Report(Report::Ready { round, state_hash, tokens_per_second: 1.0, recall: 0 });
        self.desk.said(from, ready, 1.0, &mut self.out)
    }

    fn taken(&self) -> Vec<Step> {
        std::mem::take(&mut *self.steps.lock().unwrap())
    }

    fn words(&self, link: LinkNumber) -> Vec<String> {
        let of = |step| match step {
            Step::Sent(to, word) if to == link => Some(word),
            _ => None,
        };
        self.taken().into_iter().filter_map(of).collect()
    }
}

#[test]
fn a_site_is_in_the_log_before_it_is_welcome_and_keeps_its_id() {
    let mut office = Office::new(Vec::new(), 10);
    let (site, link) = office.admit("a");
    let steps = office.taken();
    assert!(matches!(&steps[..2], [Step::Written(_), Step::Written(Line::Admitted { admitted: SiteId(0), .. })]));
    assert_eq!(steps[2], Step::Sent(link, "Welcome".to_owned()));
    let stranger = office.visitor("b", None);
    assert!(matches!(office.desk.greet(stranger, AT).unwrap(), Verdict::Refused { .. }));
    let again = office.visitor("a", None);
    let Verdict::Site(admission) = office.desk.greet(again, AT).unwrap() else { panic!("it was admitted before") };
    assert_eq!((admission.peer.site, admission.peer.address.as_str()), (site, "10.0.0.1:1"));
    assert!(office.taken().is_empty(), "nothing new is in the log");
}

#[test]
fn a_new_process_goes_on_in_a_new_term_with_the_sites_of_its_log() {
    let fingerprint = ContentHash::of(b"a");
    let admitted = Line::Admitted { admitted: SiteId(0), name: "a".to_owned(), fingerprint, invite: None };
    let lines = vec![Line::Decision(Record::TermStarted { term: Term(4) }), admitted];
    let office = Office::new(lines, 10);
    assert_eq!(office.desk.term(), Term(5));
    assert_eq!(office.taken(), [Step::Written(Line::Decision(Record::TermStarted { term: Term(5) }))]);
    assert!(office.desk.knows(&fingerprint));
}

#[test]
fn a_site_is_told_the_term_before_anything_is_asked_of_it() {
    let mut office = Office::new(Vec::new(), 10);
    let from = office.admit("a");
    office.ready(from).unwrap();
    let words = office.words(from.1);
    let place = |word: &str| words.iter().position(|said| said == word);
    assert!(place("Lead") < place("Begin") && place("Lead").is_some(), "{words:?}");
}

#[test]
fn words_of_an_older_connection_do_not_count() {
    let mut office = Office::new(Vec::new(), 10);
    let old = office.admit("a");
    let new = office.admit("a");
    assert_eq!(old.0, new.0);
    assert!(office.taken().contains(&Step::Closed(old.1)));
    office.ready(old).unwrap();
    office.desk.lost(old, 1.0, &mut office.out).unwrap();
    assert!(office.taken().is_empty());
    office.ready(new).unwrap();
    assert!(office.words(new.1).contains(&"Begin".to_owned()));
}

#[test]
fn a_site_that_does_not_take_its_messages_is_dropped() {
    let mut office = Office::new(Vec::new(), 10);
    let from = office.admit("a");
    office.out.full = Some(from.1);
    office.ready(from).unwrap();
    assert!(office.taken().contains(&Step::Closed(from.1)));
    assert!(!office.desk.is_current(from.0, from.1));
}

#[test]
fn nothing_is_sent_of_a_decision_that_is_not_in_the_log() {
    // Room for the term and the admission.
    let mut office = Office::new(Vec::new(), 2);
    let from = office.admit("a");
    // A state that its coordinator does not know: the run is rolled back, which must be written down.
    office.taken();
    let other = office.visitor("b", Some(office.secret.clone()));
    assert!(matches!(office.desk.greet(other, AT), Err(StoreError::File { .. })));
    assert!(office.taken().is_empty() && office.desk.is_current(from.0, from.1));
}

fn is_refused(office: &mut Office, visitor: Visitor, at: Moment) -> bool {
    matches!(office.desk.greet(visitor, at).unwrap(), Verdict::Refused { .. })
}

#[test]
fn the_invite_for_all_ends_and_those_who_came_with_it_stay() {
    let mut office = Office::new(Vec::new(), usize::MAX);
    office.admit("a");
    let late = Moment { now: 100.0, ..AT };
    let visitor = office.visitor("b", Some(office.secret.clone()));
    assert!(is_refused(&mut office, visitor, late));
    let again = office.visitor("a", None);
    assert!(!is_refused(&mut office, again, late));
}

#[test]
fn an_invite_for_one_admits_one_before_its_end_and_not_again_after_a_restart() {
    let mut office = Office::new(Vec::new(), usize::MAX);
    let (first, second) = (Secret::generate().unwrap(), Secret::generate().unwrap());
    let access = Access { invites: [(first.digest(), 2_000), (second.digest(), 2_000)].into(), ..Access::default() };
    office.desk.set_access(access.clone(), 0.0, &mut office.out).unwrap();
    let [a, b] = ["a", "b"].map(|name| office.visitor(name, Some(first.clone())));
    let Verdict::Site(_) = office.desk.greet(a.clone(), AT).unwrap() else { panic!("a is invited") };
    assert!(is_refused(&mut office, b.clone(), AT), "it was for one");
    let Verdict::Site(_) = office.desk.greet(a, AT).unwrap() else { panic!("a comes back by its key") };
    let c = office.visitor("c", Some(second.clone()));
    assert!(is_refused(&mut office, c.clone(), Moment { unix_seconds: 2_000, ..AT }), "it has ended");
    let lines = office.taken().into_iter().filter_map(|step| match step {
        Step::Written(line) => Some(line),
        _ => None,
    });
    let mut restarted = Office::new(lines.collect(), usize::MAX);
    restarted.desk.set_access(access, 0.0, &mut restarted.out).unwrap();
    assert!(is_refused(&mut restarted, b, AT), "the log remembers what was used");
    assert!(!is_refused(&mut restarted, c, AT));
}

#[test]
fn a_revoked_machine_leaves_at_once_and_for_good() {
    let mut office = Office::new(Vec::new(), usize::MAX);
    let from = office.admit("a");
    office.ready(from).unwrap();
    let revoked = ContentHash::of(b"a");
    let access = Access { revoked: [revoked, ContentHash::of(b"nobody")].into(), ..Access::default() };
    office.taken();
    office.desk.set_access(access, 1.0, &mut office.out).unwrap();
    let steps = office.taken();
    assert!(matches!(steps[0], Step::Written(Line::Revoked { revoked: found }) if found == revoked), "{steps:?}");
    assert!(!office.desk.knows(&revoked) && !office.desk.is_current(from.0, from.1));
    let members = office.desk.members();
    assert!(members.len() == 1 && members[0].revoked && !members[0].connected, "{members:?}");
    let invited = office.visitor("a", Some(office.secret.clone()));
    assert!(is_refused(&mut office, invited.clone(), AT));
    let lines = vec![
        Line::Admitted { admitted: SiteId(0), name: "a".to_owned(), fingerprint: revoked, invite: None },
        Line::Revoked { revoked },
    ];
    assert!(is_refused(&mut Office::new(lines, usize::MAX), invited, AT), "after a restart too");
}

#[test]
fn a_site_that_talks_without_end_fills_no_disk_and_what_it_cannot_have_measured_is_not_told() {
    let mut office = Office::new(Vec::new(), usize::MAX);
    let (a, b) = (office.admit("a"), office.admit("b"));
    let fetched = |seconds| FromSite::Fetched { round: Round(1), from: SiteId(0), bytes: 1, seconds };
    let mut say = |from, seconds, now| {
        office.out.told.clear();
        office.desk.said(from, fetched(seconds), now, &mut office.out).unwrap();
        office.out.told.len()
    };
    // A line with such a number could not be read again.
    assert_eq!([f64::NAN, f64::INFINITY, -1.0].map(|seconds| say(a, seconds, 0.0)), [0; 3]);
    let told: usize = (0..2 * WORDS_TOLD_PER_MINUTE_MAX).map(|_| say(a, 0.5, 1.0)).sum();
    assert_eq!(told as u32, WORDS_TOLD_PER_MINUTE_MAX + 1, "and one warning");
    assert_eq!((say(a, 0.5, 60.9), say(b, 0.5, 60.9), say(a, 0.5, 61.0)), (0, 1, 1));
}
