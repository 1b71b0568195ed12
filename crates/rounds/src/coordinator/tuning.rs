//! Settings that follow the links: what sites measure goes to [`crate::adaptive`], and what that decides becomes part of the log, and
//! then of every plan.
//!
//! Another codec or rank begins with the next round that is opened. Another H, P or tau waits until no round is open: then no fragment
//! is on its way, and what was committed before takes effect before the first step of the new schedule. A restarted coordinator goes
//! on with the settings that its log has, and measures anew.

use super::{Command, Coordinator, Note, OpenRound, Record, Settings};
use crate::adaptive::{Adaptive, Change, Choice, Exchange, Limits, LinkMeasure, Measured, Quality, Sharing};
use crate::plan::{LeaveReason, Measurement};
use base::{Round, SiteId};
use std::collections::BTreeMap;

/// A change must have this many times H inner steps before it: the first exchanges of a new schedule are not worth a pause at the end.
const EXCHANGES_LEFT_MIN: u64 = 2;

/// Of a residual that is this part of the delta nothing was sent: 1 / (1 - 0.999^2)^0.5 = 22 times what was.
const LOST_PART_MAX: f64 = 0.999;

/// What one site has measured last.
#[derive(Debug, Clone)]
struct Known {
    measurement: Measurement,
    /// Encoding and merging of one value of a fragment.
    host_seconds_per_element: f64,
    /// Norm of what coding left over, over the norm of what was sent, under the settings in use.
    residual_ratio: Option<f64>,
}

/// What the settings of a run follow.
#[derive(Debug, Clone)]
pub(super) struct Tuning {
    adaptive: Adaptive,
    known: BTreeMap<SiteId, Known>,
    /// The newest validation, with its inner step, if it has not been looked at.
    evaluated: Option<(u64, f64)>,
    /// Decided, and not in use yet.
    pending: Option<Change>,
}

impl Tuning {
    pub(super) fn new(settings: &Settings) -> Self {
        let adaptive =
            Adaptive::new(Limits::of_run(settings.steps_total), &settings.schema, Choice::of(&settings.sync));
        Self { adaptive, known: BTreeMap::new(), evaluated: None, pending: None }
    }

    pub(super) fn forget(&mut self, site: SiteId) {
        self.known.remove(&site);
    }

    fn quality(&mut self, step: u64) -> Quality {
        let ratios = self.known.values().filter_map(|known| known.residual_ratio);
        let residual_ratio = ratios.reduce(f64::max);
        match self.evaluated.take() {
            Some((step, loss)) => Quality { step, residual_ratio, validation_loss: Some(loss) },
            None => Quality { step, residual_ratio, validation_loss: None },
        }
    }
}

impl Coordinator {
    /// What a site has measured by the time it delivers for `round`.
    pub(super) fn measured(
        &mut self,
        site: SiteId,
        round: Round,
        measurement: &Measurement,
        commands: &mut Vec<Command>,
    ) {
        if !measurement.is_acceptable() {
            return self.drop_site(site, LeaveReason::Misbehaved, commands);
        }
        let known = |from: &SiteId| self.sites.contains_key(from);
        let links: Vec<_> = measurement.links.iter().filter(|link| known(&link.from)).copied().collect();
        self.exchanges.links.note(site, &links);
        let Some(plan) = self.open.iter().find(|open| open.plan.round == round).map(|open| open.plan.fragment) else {
            return;
        };
        let in_use = Choice::of(&self.settings.sync);
        let elements = self.settings.elements(plan).max(1) as f64;
        let Some(tuning) = &mut self.tuning else { return };
        let part = measurement.lost_part.min(LOST_PART_MAX);
        let is_in_use = (plan.codec, plan.rank, plan.count) == (in_use.codec, in_use.rank, in_use.fragments);
        let known = Known {
            host_seconds_per_element: (measurement.encode_seconds + measurement.merge_seconds) / elements,
            residual_ratio: is_in_use.then(|| part / (1.0 - part * part).sqrt()),
            measurement: measurement.clone(),
        };
        tuning.known.insert(site, known);
    }

    /// A validation of the state after `round`.
    pub(super) fn evaluated(&mut self, site: SiteId, round: Round, nats_per_token: f64) {
        let step = self.step_of(round);
        if let Some(tuning) = &mut self.tuning
            && self.sites.contains_key(&site)
            && nats_per_token.is_finite()
        {
            tuning.evaluated = Some((step, nats_per_token));
        }
    }

    /// Looks at a round that closes: should the next ones be of another kind?
    pub(super) fn tune(&mut self, closed: &OpenRound) {
        let planned = self.open.back().map_or(&closed.plan, |open| &open.plan);
        let steps_left = self.settings.steps_total.saturating_sub(planned.first_step + planned.steps);
        let measured = self.conditions(closed);
        let Some(tuning) = &mut self.tuning else { return };
        let is_late = steps_left < EXCHANGES_LEFT_MIN * self.settings.sync.inner_steps;
        if tuning.pending.is_some() || closed.plan.steps == 0 || is_late {
            return;
        }
        let quality = tuning.quality(closed.plan.first_step + closed.plan.steps);
        tuning.pending = tuning.adaptive.decide(&measured, &quality);
    }

    fn conditions(&self, closed: &OpenRound) -> Measured {
        let seconds = closed.deliveries.values().map(|delivery| delivery.contribution.compute_seconds);
        let fastest = seconds.filter(|seconds| *seconds > 0.0).fold(f64::INFINITY, f64::min);
        let known = || self.tuning.iter().flat_map(|tuning| &tuning.known);
        let name = |site: SiteId| self.sites.get(&site).map(|site| site.peer.name.clone());
        let links = known().flat_map(|(to, known)| {
            known.measurement.links.iter().filter_map(move |link| {
                Some(LinkMeasure {
                    from: name(link.from)?,
                    to: name(*to)?,
                    bytes_per_second: link.bytes_per_second,
                    round_trip_seconds: link.round_trip_seconds,
                    loss: link.loss,
                })
            })
        });
        Measured {
            // Without a time nothing is decided.
            step_seconds: if fastest.is_finite() { fastest / closed.plan.steps.max(1) as f64 } else { 0.0 },
            host_seconds_per_element: known().map(|(_, known)| known.host_seconds_per_element).fold(0.0, f64::max),
            sites: self.sites.current().len(),
            links: links.collect(),
            // Sites end their rounds, and so begin to fetch, at about the same time.
            sharing: Sharing::Together,
            // The dearer one of the two for any codec: a round is sharded only where that is faster.
            exchange: Exchange::Mesh,
        }
    }

    /// Takes over what was decided, before round `round` is planned; false while that has to wait for open rounds.
    pub(super) fn adapt(&mut self, round: Round, planned_steps: u64, commands: &mut Vec<Command>) -> bool {
        let in_use = Choice::of(&self.settings.sync);
        let Some(tuning) = &mut self.tuning else { return true };
        if planned_steps >= self.settings.steps_total {
            tuning.pending = None;
        }
        let Some(change) = tuning.pending.take() else { return true };
        let keeps_schedule = change.to.has_schedule_of(&in_use);
        if !keeps_schedule && !self.open.is_empty() {
            tuning.pending = Some(change);
            return false;
        }
        tuning.known.values_mut().for_each(|known| known.residual_ratio = None);
        let (choice, reason) = (change.to, change.reason.clone());
        commands.push(Command::Persist(Record::SettingsChanged { round, choice, reason }));
        commands.push(Command::Note(Note::SettingsChanged { round, change: Box::new(change) }));
        self.settings = self.settings.clone().with(&choice);
        // How long deltas are kept has changed: whoever comes with an older state fetches a new one.
        self.started_at = self.started_at.max(Round(round.0 - 1));
        if !keeps_schedule {
            self.schedule_from = round;
        }
        if choice.fragments != in_use.fragments {
            self.forget_fragments(in_use.fragments);
        }
        true
    }

    /// The parameters are cut anew: a new fragment counts as merged when the last of the old ones was.
    fn forget_fragments(&mut self, before: u32) {
        let after = self.settings.sync.fragments;
        for (_, site) in self.sites.iter_mut() {
            let merged = |fragment| site.merged_tokens.get(&fragment).copied().unwrap_or(0);
            let merged = (0..before).map(merged).min().unwrap_or(0);
            site.merged_tokens = (0..after).map(|fragment| (fragment, merged)).collect();
        }
    }
}
