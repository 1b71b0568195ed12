//! What a fault did to the run, read from the event logs: who took part again when, when the next commit came, how long the others
//! stood still. Pure: the logs in, figures out.
//!
//! Times are the clock's of one machine, so that the lab's and those of all logs are one time.

use super::{Fault, What};
use base::SiteId;
use serde::Serialize;
use std::collections::BTreeSet;
use telemetry::{Event, ProcessLog, RunLogs};

/// A fault that happened.
#[derive(Debug, Clone)]
pub(in super::super) struct Observed {
    pub(in super::super) fault: Fault,
    /// For people.
    pub(in super::super) text: String,
    /// Milliseconds since 1970-01-01 UTC.
    pub(in super::super) began_unix_ms: u64,
    /// The same, once it was mended.
    pub(in super::super) mended_unix_ms: Option<u64>,
}

/// What one fault did. What did not come before the end of the run is null.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(in super::super) struct FaultReport {
    /// What, as the command line says it.
    fault: String,
    /// `site`, `coordinator` or `link`.
    concerns: &'static str,
    /// Since the first round began.
    at_seconds: f64,
    /// From its beginning until it was mended: a killed process was started again.
    mended_after_seconds: Option<f64>,
    /// From then until the site has a part in a round again; of the coordinator, until it plans one.
    pub(in super::super) rejoin_seconds: Option<f64>,
    /// From then to the next commit.
    pub(in super::super) next_commit_seconds: Option<f64>,
    /// From the beginning of the fault to the first commit after it was mended that has a delta of every site.
    pub(in super::super) joint_commit_seconds: Option<f64>,
    /// Longest time between two commits from the last one before the fault to that joint commit.
    pub(in super::super) longest_commit_gap_seconds: Option<f64>,
    /// Longest time that a site which was not hit stood between two inner steps, beyond what it usually takes from one to the next.
    pub(in super::super) stall_seconds: Option<f64>,
}

impl FaultReport {
    pub(in super::super) fn is_of(&self, concerns: &str) -> bool {
        self.concerns == concerns
    }

    /// For people.
    pub(in super::super) fn line(&self) -> String {
        let seconds = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} s"));
        format!(
            "fault      {}: mended after {}; then back in a round after {}, a commit after {}; joint commit {} after the fault; \
             longest between commits {}, stall of others {}",
            self.fault,
            seconds(self.mended_after_seconds),
            seconds(self.rejoin_seconds),
            seconds(self.next_commit_seconds),
            seconds(self.joint_commit_seconds),
            seconds(self.longest_commit_gap_seconds),
            seconds(self.stall_seconds)
        )
    }
}

/// What each fault did, in the order in which they began. Sites in `logs` are in the order of their places.
pub(in super::super) fn observe(faults: &[Observed], logs: &RunLogs) -> Vec<FaultReport> {
    let timeline = Timeline::new(logs);
    faults.iter().map(|fault| timeline.report(fault, faults)).collect()
}

/// The times that matter, milliseconds since 1970-01-01 UTC.
struct Timeline {
    began: u64,
    /// The ids that the coordinator gave to the sites.
    ids: Vec<Option<SiteId>>,
    /// Each plan with the sites that have samples in it.
    plans: Vec<(u64, BTreeSet<SiteId>)>,
    commits: Vec<(u64, BTreeSet<SiteId>)>,
    /// Of each site.
    steps: Vec<Vec<u64>>,
}

impl Timeline {
    fn new(logs: &RunLogs) -> Self {
        let (mut plans, mut commits) = (Vec::new(), Vec::new());
        for record in &logs.coordinator.records {
            match &record.event {
                Event::RoundStarted { leases, .. } => {
                    let busy = leases.iter().filter(|lease| lease.samples > 0).map(|lease| lease.site);
                    plans.push((record.unix_ms, busy.collect()));
                }
                Event::RoundClosed { contributors, .. } => {
                    commits.push((record.unix_ms, contributors.iter().map(|contributor| contributor.site).collect()));
                }
                _ => {}
            }
        }
        Self {
            began: plans.first().map_or(0, |(at, _)| *at),
            ids: logs.sites.iter().map(|site| id_of(&logs.coordinator, &site.name)).collect(),
            plans,
            commits,
            steps: logs.sites.iter().map(steps).collect(),
        }
    }

    fn report(&self, observed: &Observed, all: &[Observed]) -> FaultReport {
        let Observed { fault, text, began_unix_ms: began, mended_unix_ms: mended } = observed;
        let (concerns, place) = match fault.what {
            What::Kill(place) | What::Stop(place) if place == self.ids.len() => ("coordinator", None),
            What::Kill(place) | What::Stop(place) => ("site", Some(place)),
            What::Cut { .. } => ("link", None),
        };
        let after = |from: Option<u64>, at: Option<u64>| Some(seconds(from?, at?));
        let joint = mended.and_then(|mended| self.joint_commit(mended));
        FaultReport {
            fault: text.clone(),
            concerns,
            at_seconds: seconds(self.began, *began),
            mended_after_seconds: after(Some(*began), *mended),
            rejoin_seconds: after(*mended, mended.and_then(|mended| self.part_in_a_round(mended, place))),
            next_commit_seconds: after(*mended, mended.and_then(|mended| first(&self.commits, mended, |_| true))),
            joint_commit_seconds: after(Some(*began), joint),
            longest_commit_gap_seconds: self.commit_gap(*began, joint),
            stall_seconds: self.stall(*began, joint, &hit(all, *began, joint)),
        }
    }

    /// The first plan after `mended` that has a part for that site, or of anybody where it is about no site.
    fn part_in_a_round(&self, mended: u64, place: Option<usize>) -> Option<u64> {
        match place {
            None => first(&self.plans, mended, |_| true),
            Some(place) => {
                let id = (*self.ids.get(place)?)?;
                first(&self.plans, mended, |sites| sites.contains(&id))
            }
        }
    }

    fn joint_commit(&self, mended: u64) -> Option<u64> {
        first(&self.commits, mended, |sites| sites.len() >= self.ids.len())
    }

    fn commit_gap(&self, began: u64, until: Option<u64>) -> Option<f64> {
        let times: Vec<u64> = self.commits.iter().map(|(at, _)| *at).collect();
        longest_gap(&times, began, until)
    }

    fn stall(&self, began: u64, until: Option<u64>, hit: &[usize]) -> Option<f64> {
        let others = self.steps.iter().enumerate().filter(|(place, _)| !hit.contains(place));
        let stalls = others.filter_map(|(_, steps)| Some(longest_gap(steps, began, until)? - usual_gap(steps)?));
        stalls.reduce(f64::max).map(|stall| stall.max(0.0))
    }
}

/// Places whose process is killed or stopped by any fault of that time: the next one may come before all commit together.
fn hit(all: &[Observed], from: u64, until: Option<u64>) -> Vec<usize> {
    let of_that_time =
        |fault: &&Observed| fault.began_unix_ms >= from && until.is_none_or(|until| fault.began_unix_ms < until);
    let place = |fault: &Observed| match fault.fault.what {
        What::Kill(place) | What::Stop(place) => Some(place),
        What::Cut { .. } => None,
    };
    all.iter().filter(of_that_time).filter_map(place).collect()
}

fn seconds(from: u64, to: u64) -> f64 {
    to.saturating_sub(from) as f64 / 1e3
}

fn id_of(coordinator: &ProcessLog, wanted: &str) -> Option<SiteId> {
    coordinator.records.iter().find_map(|record| match &record.event {
        Event::SiteJoined { site, name, .. } if name == wanted => Some(*site),
        _ => None,
    })
}

fn steps(site: &ProcessLog) -> Vec<u64> {
    let is_step = |record: &&telemetry::Record| matches!(record.event, Event::Step { .. });
    site.records.iter().filter(is_step).map(|record| record.unix_ms).collect()
}

fn first(times: &[(u64, BTreeSet<SiteId>)], from: u64, is: impl Fn(&BTreeSet<SiteId>) -> bool) -> Option<u64> {
    times.iter().find(|(at, sites)| *at >= from && is(sites)).map(|(at, _)| *at)
}

/// Longest time between two neighbours from the last one before `from` to the first one not before `until`, or to the end.
fn longest_gap(times: &[u64], from: u64, until: Option<u64>) -> Option<f64> {
    let start = times.partition_point(|at| *at < from).saturating_sub(1);
    let end = until.map_or(times.len(), |until| (times.partition_point(|at| *at < until) + 1).min(times.len()));
    let gaps = times.get(start..end)?.windows(2).map(|pair| seconds(pair[0], pair[1]));
    gaps.reduce(f64::max)
}

/// Median time from one to the next.
fn usual_gap(times: &[u64]) -> Option<f64> {
    let gaps: Vec<f64> = times.windows(2).map(|pair| seconds(pair[0], pair[1])).collect();
    median(&gaps)
}

/// The middle value; the higher one of two in the middle.
pub(in super::super) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::{Round, Term};
    use telemetry::Record;
    use telemetry::event::{Contributor, LeaseShare};

    fn record(seconds: u64, event: Event) -> Record {
        Record { v: 1, seq: 0, unix_ms: seconds * 1_000, source: String::new(), event }
    }

    fn joined(site: u32, name: &str) -> Record {
        let (name, address, engine) = (name.to_owned(), String::new(), String::new());
        record(0, Event::SiteJoined { site: SiteId(site), name, address, engine, threads: 1, slowdown: 1.0 })
    }

    fn planned(at: u64, sites: &[u32]) -> Record {
        let lease = |site: &u32| LeaseShare {
            site: SiteId(*site),
            start: 0,
            end: 1,
            steps: 1,
            samples_per_step: 1,
            samples: 1,
            ranges: Vec::new(),
            share: 1.0,
        };
        let leases = sites.iter().map(lease).collect();
        record(at, Event::RoundStarted { round: Round(1), term: Term(1), leases })
    }

    fn closed(at: u64, sites: &[u32]) -> Record {
        let contributor = |site: &u32| Contributor { site: SiteId(*site), tokens: 1, weight: 1.0 };
        let contributors = sites.iter().map(contributor).collect();
        record(at, Event::RoundClosed { round: Round(1), term: Term(1), contributors, cursor: 0 })
    }

    fn step(at: u64) -> Record {
        record(
            at,
            Event::Step {
                site: SiteId(0),
                round: Round(1),
                step: 1,
                loss_nats: 1.0,
                learning_rate: 1.0,
                gradient_norm: 1.0,
                tokens: 1,
                seconds: 1.0,
            },
        )
    }

    /// Sites whose ids are not in the order of their names; the second is killed at 20 s and started again at 23 s.
    fn logs() -> RunLogs {
        let coordinator = vec![
            joined(1, "site-a"),
            joined(0, "site-b"),
            planned(10, &[0, 1]),
            closed(15, &[0, 1]),
            planned(15, &[0, 1]),
            closed(22, &[1]),
            planned(22, &[1]),
            closed(25, &[1]),
            planned(26, &[0, 1]),
            closed(29, &[0, 1]),
            closed(40, &[0, 1]),
        ];
        let log = |name: &str, records| ProcessLog { name: name.to_owned(), records, malformed_lines: 0 };
        let survivor = [11, 12, 13, 14, 15, 19, 24, 25, 26, 27, 28, 29, 30, 31, 39].map(step);
        RunLogs {
            coordinator: log("coordinator", coordinator),
            sites: vec![log("site-a", survivor.to_vec()), log("site-b", vec![step(11), step(28)])],
        }
    }

    fn observed(what: What, from: u64, to: u64) -> Observed {
        let fault = Fault { what, from: from as f64, to: to as f64 };
        let (began_unix_ms, mended_unix_ms) = (from * 1_000, Some(to * 1_000));
        Observed { fault, text: "it".to_owned(), began_unix_ms, mended_unix_ms }
    }

    #[test]
    fn a_killed_site_is_followed_until_all_commit_together() {
        let report = &observe(&[observed(What::Kill(1), 20, 23)], &logs())[0];
        let expected = FaultReport {
            fault: "it".to_owned(),
            concerns: "site",
            at_seconds: 10.0,
            mended_after_seconds: Some(3.0),
            rejoin_seconds: Some(3.0),
            next_commit_seconds: Some(2.0),
            joint_commit_seconds: Some(9.0),
            longest_commit_gap_seconds: Some(7.0),
            stall_seconds: Some(4.0),
        };
        assert_eq!(*report, expected, "from 19 to 24, less the one second that is usual");
    }

    #[test]
    fn a_coordinator_is_back_when_it_plans() {
        let report = &observe(&[observed(What::Kill(2), 20, 23)], &logs())[0];
        assert_eq!(
            (report.concerns, report.rejoin_seconds, report.next_commit_seconds),
            ("coordinator", Some(3.0), Some(2.0))
        );
        assert_eq!(report.stall_seconds, Some(4.0), "the site with the fewer steps has no gap beyond its usual one");
    }

    #[test]
    fn what_did_not_come_is_not_known() {
        let late = observed(What::Kill(1), 41, 44);
        let report = &observe(&[Observed { mended_unix_ms: None, ..late.clone() }, late], &logs());
        assert!(report.iter().all(|report| report.rejoin_seconds.is_none() && report.joint_commit_seconds.is_none()));
        assert!(
            report[0].line().ends_with("joint commit - after the fault; longest between commits -, stall of others -")
        );
    }
}
